# SPDX-License-Identifier: Apache-2.0
"""Objectives of tokens under ``seq_group``, rows spread over two ranks in any way, against one
process: everything that preference_loss returns, and the gradients of what each rank holds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import ScoringOptions, explain, preference_loss
from fastpref.objectives import Objective
from fastpref.objectives.registry import catalogue
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy

B, T, H, V = 6, 9, 5, 23
# Positions of each rank, in the order that it holds them.
FORMS: dict[str, list[list[int]]] = {
    "contiguous": [[0, 1, 2, 3], [4, 5, 6, 7, 8]],
    "even": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "zigzag": [[0, 1, 7, 8], [2, 3, 4, 5, 6]],
    "shuffled": [[8, 2], [6, 0, 1, 7, 3, 5, 4]],
    "none on the first": [[], [0, 1, 2, 3, 4, 5, 6, 7, 8]],
    "none on the last": [[0, 1, 2, 3, 4, 5, 6, 7, 8], []],
}
TOKEN = {one.name: one for one in catalogue() if one.unit == "token"}
# What is set wherever it is taken: numbers at which this batch has tokens on both sides of a clip.
CHOSEN: dict[str, Any] = {
    "beta": 0.3,
    "delta": 1.6,
    "max_completion_length": 7,
    "use_bias_correction_kl": True,
    "epsilon_low": 0.2,
    "epsilon_high": 0.3,
}
LEVELS = "importance_sampling_level"
METRICS = ("entropy", "mean_logits", "accuracy")


def order_of(tokens: Tensor, form: str) -> Tensor:
    """(B, T) as the ranks of ``form`` hold them, one after the other."""
    return tokens[:, list(itertools.chain(*FORMS[form]))]


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(12)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = {"hidden": draw(B, T, H), "target": torch.randint(V, (B, T), generator=generator)}
    given |= {"ref_hidden": draw(B, T, H), "ref_logps": -3 - draw(B, T).abs()}
    given |= {"weight": draw(V, H), "bias": draw(V), "ref_weight": draw(V, H)}
    given |= {"old_token_logp": -3 - draw(B, T), "advantages": draw(B, T)}
    given["sampler_ratio"] = draw(B, T).exp()
    unscored = torch.rand(B, T, generator=generator) < 0.3
    unscored[4] = True  # an empty response
    given["target"][unscored] = -100
    for name in ("hidden", "old_token_logp", "advantages", "sampler_ratio"):
        given[name][unscored] = torch.nan
    given["unit_advantages"] = draw(B)
    given |= {"rewards": torch.arange(B) % 2, "group_ids": torch.arange(B) // 3}
    return given


def settings(name: str, level: str | None) -> dict[str, Any]:
    taken = TOKEN[name].signature.hyperparameters
    found = {key: value for key, value in CHOSEN.items() if key in taken}
    if name == "cispo":
        found["epsilon_high"] = 1.2
    if name == "disco":
        found["score"] = level
    elif level is not None:
        found[LEVELS] = level
    return found


def levels(name: str) -> tuple[str | None, ...]:
    if name == "disco":
        return ("log_likelihood", "likelihood_ratio")
    return ("token", "sequence") if LEVELS in TOKEN[name].signature.hyperparameters else (None,)


CASES: list[dict[str, Any]] = [
    {"objective": name, "level": level} for name in TOKEN for level in levels(name)
]


def call(
    given: dict[str, Tensor],
    *,
    objective: str,
    level: str | None,
    reference: str | None = "hidden",
    old: bool = True,
    by_token: bool = True,  # advantages, and the sampler's ratios
    upstream: bool = False,  # a gradient for each loss and for the sums
    **changes: Any,
) -> dict[str, Tensor]:
    taken = TOKEN[objective].extras
    extras = {key: given[key] for key in ("rewards", "group_ids") if key in taken}
    if "advantages" in taken:
        extras["advantages"] = given["advantages" if by_token else "unit_advantages"]
    if "sampler_ratio" in taken:
        ratio = given["sampler_ratio"]
        extras["sampler_ratio"] = ratio if by_token else given["unit_advantages"].exp()
    if old:
        extras["old_token_logp"] = given["old_token_logp"]
    hyperparameters = settings(objective, level)
    if reference is None and "beta" in hyperparameters:
        hyperparameters["beta"] = 0.0
    wanted = ("hidden", "weight", "bias")
    leaves = {key: given[key].clone().requires_grad_() for key in wanted}
    if reference == "hidden":
        changes |= {key: given[key] for key in ("ref_hidden", "ref_weight")}
    elif reference == "logps":
        changes["ref_logps"] = given["ref_logps"]
    output = preference_loss(
        target=given["target"],
        objective=objective,
        extras=extras,
        outputs=METRICS,
        **leaves,
        **changes,
        **hyperparameters,
    )
    total = output.loss
    if upstream:
        factors = torch.linspace(-1, 2, B, dtype=torch.float64)
        total = (output.loss * factors).sum() + (output.logps * factors.flip(0)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    found = {"loss": output.loss, "losses": output.losses, "rewards": output.rewards}
    found |= {"logps": output.logps} | output.metrics
    if output.ref_logps is not None:
        found["ref_logps"] = output.ref_logps
    found = {key: one.detach() for key, one in found.items()}
    return found | {f"d {key}": one for key, one in zip(wanted, gradients, strict=True)}


def part_of(given: dict[str, Tensor], positions: list[int]) -> dict[str, Tensor]:
    return {
        key: one[:, positions] if one.shape[:2] == (B, T) else one for key, one in given.items()
    }


def on_a_rank(rank: int, form: str, cases: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    part = part_of(batch(), FORMS[form][rank])
    return [call(part, seq_group=dist.group.WORLD, **case) for case in cases]


def check(form: str, cases: list[dict[str, Any]], ranks: list[list[dict[str, Tensor]]]) -> None:
    held = [one for positions in FORMS[form] for one in positions]
    for case, of_ranks in zip(cases, zip(*ranks, strict=True), strict=True):
        whole = call(part_of(batch(), sorted(held)), **case)
        for key, want in whole.items():
            found = [one[key] for one in of_ranks]
            if key == "d hidden":
                want = want[:, [sorted(held).index(one) for one in held]]
                found = [torch.cat(found, 1)]
            elif key.startswith("d "):
                found = [sum(found)]
            for got in found:
                torch.testing.assert_close(
                    got, want, rtol=1e-9, atol=1e-10, msg=lambda m, k=key, c=case: f"{c} {k}: {m}"
                )


@pytest.mark.parametrize("form", FORMS)
def test_every_objective_as_one_process(form: str, two_ranks: Ranks) -> None:
    check(form, CASES, two_ranks(on_a_rank, form, CASES))


def test_what_is_compared_is_something() -> None:
    """The batch clips tokens, has a divergence, and every loss a gradient."""
    for case in CASES:
        found = call(batch(), **case)
        assert found["d hidden"].abs().max() > 1e-4, case
        if case["objective"] not in ("disco", "sapo", "vespo"):
            assert 0 < found["clip_ratio/region_mean"] < 1, case
        assert found["kl"] != 0, case


def swept() -> Iterator[dict[str, Any]]:
    schedules = [{}, {"options": ScoringOptions(schedule="recompute")}]
    schedules.append({"options": ScoringOptions(memory_budget=1)})
    reductions: list[dict[str, Any]] = [{"reduction": "sum"}, {"denominator": 11.0}]
    reductions.append({"reduction": "none", "upstream": True})
    for case in CASES:
        for reference, old, by_token in itertools.product(
            ("hidden", "logps", None), (True, False), (True, False)
        ):
            for schedule, reduction in zip(schedules, reductions, strict=True):
                given = {"reference": reference, "old": old, "by_token": by_token}
                yield case | given | schedule | reduction


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zigzag", "none on the first"])
def test_combinations(form: str, two_ranks: Ranks) -> None:
    cases = list(swept())
    for start in range(0, len(cases), 60):  # a call of the fixture is bounded in time
        some = cases[start : start + 60]
        check(form, some, two_ranks(on_a_rank, form, some))


def own_function(
    logp: Tensor, old: Tensor | None = None, *, mask: Tensor, ids: Tensor, gate: Tensor
) -> Any:
    """Takes what no dtype of a loss holds: integers that float32 rounds, and a bool."""
    odd = torch.where(gate, ids % 2, 0)
    losses = torch.where(mask, logp * odd, 0).sum(1)
    return losses, torch.ones_like(logp), torch.zeros_like(mask), None


def with_a_function_of_ones_own(rank: int, rows: int) -> list[Tensor]:
    """Losses of one process, and of rows that are spread."""
    objective = Objective(own_function, unit="token", scope="unit")
    generator = torch.Generator().manual_seed(1)
    given = batch()
    given["ids"] = 2**31 + torch.randint(100, (B, T), generator=generator)
    given["gate"] = torch.rand(B, T, generator=generator) < 0.5
    found = []
    for group, positions in ((None, range(T)), (dist.group.WORLD, FORMS["zigzag"][rank])):
        part = part_of(given, list(positions))
        hidden, target, ids, gate = (
            part[key][:rows] for key in ("hidden", "target", "ids", "gate")
        )
        output = preference_loss(
            hidden.float(),
            part["weight"].float(),
            target,
            objective,
            extras={"ids": ids, "gate": gate},
            seq_group=group,
        )
        found.append(output.losses)
    return found


@pytest.mark.parametrize("rows", [B, 1, 0])
def test_extras_of_any_dtype_arrive_as_they_are(rows: int, two_ranks: Ranks) -> None:
    for whole, spread in two_ranks(with_a_function_of_ones_own, rows):
        assert rows == 0 or whole[0].abs() > 1
        torch.testing.assert_close(spread, whole)


def plain(part: dict[str, Tensor], extras: dict[str, Tensor], **changes: Any) -> Any:
    given = {"hidden": part["hidden"], "weight": part["weight"], "target": part["target"]}
    return preference_loss(**given, objective="grpo", extras=extras, **changes)


def refused(rank: int, what: str) -> str:
    part = part_of(batch(), FORMS["contiguous"][rank])
    extras = {"advantages": part["unit_advantages"]}
    group, old = dist.new_group([0, 1]), part["old_token_logp"]
    if what == "fewer rows, later":
        plain(part, extras, seq_group=group)
        if rank == 1:
            part = {key: one if key == "weight" else one[:4] for key, one in part.items()}
            extras = {"advantages": extras["advantages"][:4]}
    elif what == "whole rows":
        extras["old_token_logp"] = batch()["old_token_logp"]
    elif what == "an extra":
        extras |= {"old_token_logp": old} if rank == 0 else {}
    else:
        extras["old_token_logp"] = old if rank == 0 else old.float()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        plain(part, extras, seq_group=group)
    return str(caught.value)


REFUSED = {
    "fewer rows, later": ["rank 0 has 6 rows, 9 bytes a token; rank 1 has 4 rows, 9 bytes"] * 2,
    "whole rows": [
        r"under seq_group old_token_logp must be shaped like target, \(6, 4\), got \(6, 9\)",
        r"shaped like target, \(6, 5\), got \(6, 9\)",
    ],
    "an extra": ["differ in extras: .*'old_token_logp'.* on rank 0"] * 2,
    "dtypes": ["differ in extras: .*float32.* on rank 1"] * 2,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_refused_on_every_rank(what: str, two_ranks: Ranks) -> None:
    for said, wanted in zip(two_ranks(refused, what), REFUSED[what], strict=True):
        assert re.search(wanted, said), said


def traced(rank: int) -> None:
    part = part_of(batch(), FORMS["contiguous"][rank])
    extras = {"advantages": part["unit_advantages"]}

    def run(hidden: Tensor) -> Tensor:
        loss: Tensor = plain(part | {"hidden": hidden}, extras, seq_group=dist.group.WORLD).loss
        return loss

    with pytest.raises(Exception, match=r"not traced by torch\.compile"):
        torch.compile(run, fullgraph=True, backend="eager")(part["hidden"])


@pytest.mark.slow
def test_it_is_not_traced(two_ranks: Ranks) -> None:
    two_ranks(traced)


def explained(rank: int) -> list[str]:
    """The plans of this rank's tokens, alone and of the group."""
    part = part_of(batch(), FORMS["contiguous"][rank])
    given = [part[key] for key in ("hidden", "weight", "target")]
    given[0].requires_grad_(), given[1].requires_grad_()
    extras = {"advantages": part["unit_advantages"], "old_token_logp": part["old_token_logp"]}
    groups = (None, dist.group.WORLD)
    return [str(explain(*given, "dapo", extras=extras, seq_group=one)) for one in groups]


def test_the_plan_is_that_of_the_ranks_own_tokens(two_ranks: Ranks) -> None:
    for alone, spread in two_ranks(explained):
        assert spread == alone and "u, workspace" in spread
