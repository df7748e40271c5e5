# SPDX-License-Identifier: Apache-2.0
"""The loops around the loss print the effects that their papers claim."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.examples.loading import load, printed

pytestmark = pytest.mark.heavy


def rows_of(text: str) -> dict[str, list[float]]:
    """Of each line its first words, and the numbers with a point in it."""
    lines = [line for line in text.splitlines() if line.strip()]
    return {
        re.split(r"\s{2,}", line)[0]: [float(one) for one in re.findall(r"-?\d+\.\d+", line)]
        for line in lines
    }


def test_dno_rises_and_goes_beyond_its_first_samples(capsys: pytest.CaptureFixture[str]) -> None:
    load("dno_iteration").main()
    text = capsys.readouterr().out
    *iterations, offline = printed(text, "policy")
    assert len(iterations) == 4
    assert iterations == sorted(iterations) and iterations[0] > 0.55
    assert iterations[-1] > offline + 0.03


def test_dno_win_rates() -> None:
    """Against every other response of the group, by itself."""
    example = load("dno_iteration")
    ids = torch.randint(example.VOCABULARY, (2 * example.GROUP, 1 + example.LENGTH))
    ids[3, 1:] = (ids[3, 0] + torch.arange(1, 1 + example.LENGTH)) % example.VOCABULARY
    got, scores = example.win_rates(ids), example.score(ids).double()
    assert float(scores[3]) == example.LENGTH
    for group in range(2):
        own = scores[group * example.GROUP : (group + 1) * example.GROUP]
        for k in range(example.GROUP):
            others = [j for j in range(example.GROUP) if j != k]
            want = sum(1 / (1 + torch.exp(own[j] - own[k])) for j in others) / len(others)
            assert float(got[group, k]) == pytest.approx(float(want), rel=1e-5)


def test_curry_dpo_is_better_than_either(capsys: pytest.CaptureFixture[str]) -> None:
    load("curry_dpo").main()
    found = {name: numbers[0] for name, numbers in rows_of(capsys.readouterr().out).items()}
    assert found["curriculum"] > found["random order"] + 0.02
    assert found["curriculum"] > found["easiest pairs"] + 0.02
    assert found["random order"] > found["before"] + 0.02


def test_dstc_learns_from_its_own_tests(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("dstc")
    example.main()
    found = rows_of(capsys.readouterr().out)
    rounds = [found[f"round {n}"] for n in range(1, example.ROUNDS + 1)]
    rates = [found["before"][0], *(one[0] for one in rounds)]
    assert rates == sorted(rates) and rates[-1] > rates[0] + 0.15
    for _, chosen, rejected, passing, failing in rounds:
        assert chosen > 0.8 and rejected < 0.1
        assert chosen - rejected > passing - failing + 0.1  # than by a single test


def test_dstc_programs_agree_on_no_argument() -> None:
    """So that a test which several pass, is passed by what are the same programs."""
    example = load("dstc")
    programs = example.true_programs(torch.arange(example.FUNCTIONS))
    arguments = example.NUMBERS + torch.tensor(example.ARGUMENTS)
    made = example.run(programs[:, None], arguments.expand(len(programs), -1))
    assert (made >= example.NUMBERS).all()
    for values in made.T:
        assert len(set(values.tolist())) == example.FUNCTIONS


def test_dstc_executes() -> None:
    """Programs on arguments, in Python."""
    example = load("dstc")
    ids = example.write(200, right=0.5)
    made = example.run(ids[:, 1:3], ids[:, 3])
    for row, value in zip(ids.tolist(), made.tolist(), strict=True):
        _, operation, a, x, _ = row
        a, x = a - example.NUMBERS, x - example.NUMBERS
        want = x + a if operation == example.PLUS else x * a
        assert value == (example.NUMBERS + want if want < example.LARGEST else -1)
    assert 0.4 < float(example.are_right(ids).float().mean()) < 0.75
    passes = example.execute(ids.view(20, 10, 5), ids.view(20, 10, 5))
    assert passes.shape == (20, 10, 10)
    own = passes.diagonal(dim1=1, dim2=2).flatten()
    assert torch.equal(own, made == ids[:, 4])


@pytest.fixture(scope="module")
def peft_is_there() -> None:
    pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.usefixtures("peft_is_there")
def test_cofs_forgets_less(capsys: pytest.CaptureFixture[str]) -> None:
    load("ofs_dpo").main()
    found = rows_of(capsys.readouterr().out)
    (first,), without, with_cofs = (
        found[name] for name in ("after task 0", "without COFS", "with COFS")
    )
    assert first > 0.85 and without[1] > 0.85
    assert without[0] < first - 0.25
    assert with_cofs[0] > without[0] + 0.15 and with_cofs[1] > 0.65
    assert found["forgetting"] == pytest.approx(
        [first - without[0], first - with_cofs[0]], abs=2e-3
    )


def test_search_finds_what_the_pairs_were_made_by(capsys: pytest.CaptureFixture[str]) -> None:
    load("reward_search").main()
    likeliest, ranked = printed(capsys.readouterr().out, "reward")[-2:]
    assert ranked > likeliest + 0.3


def test_search_ranks_by_log_ratios() -> None:
    """Of whole logits, beam by beam; of parts of responses too."""
    example = load("reward_search")
    torch.manual_seed(0)
    policy, reference = example.make_model().eval(), example.make_model().eval()
    prompts = torch.randint(1, example.VOCABULARY, (2, example.PROMPT))

    def summed(model: Any, rows: Tensor) -> Tensor:
        logits = type(model).forward(model, input_ids=rows).logits[:, :-1].double()
        logps = logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
        return logps[:, example.PROMPT - 1 :].sum(1)

    likeliest, best = example.search(policy, reference, prompts)
    assert torch.equal(likeliest[:, : example.PROMPT], prompts)
    with torch.no_grad():
        for rows in (best, best[:, :-2]):
            want = example.BETA * (summed(policy, rows) - summed(reference, rows))
            got = example.rewards(policy, reference, rows)
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        ours, theirs = (example.rewards(policy, reference, rows) for rows in (best, likeliest))
    assert (ours >= theirs).all()
