# SPDX-License-Identifier: Apache-2.0
"""preference_loss on four ranks, over which vocabulary, tokens and pairs are spread one at a time
and two at a time, against one process: losses, and the gradients of what each rank holds."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from fastpref import ScoringOptions, objectives, preference_loss
from tests.ranks import Ranks, device

pytestmark = pytest.mark.heavy

P, T, H, V, RANK = 4, 8, 5, 22, 2  # pairs, interleaved
B = 2 * P
BATCHES = ScoringOptions(schedule="batches", memory_budget=V * 8 * T * 2)
RECOMPUTED = ScoringOptions(schedule="recompute")
TEMPERATURE = torch.linspace(0.4, 1.8, B * T, dtype=torch.float64).view(B, T)
OF_TOKENS = ("old_token_logp", "advantages")  # extras
BY_TOKEN = ("hidden", "ref_hidden", "target", "token_weights", "temperature", *OF_TOKENS)
OF_VOCABULARY = ("weight", "bias", "ref_weight", "ref_bias", "b")
# Columns, tokens and pairs of each rank; a rank may hold no token, and no pair.
COLUMNS = {2: [9, 13], 4: [4, 5, 7, 6]}
PAIRS = {2: [3, 1], 4: [2, 0, 1, 1]}


def tokens_of(form: str, index: int, size: int) -> Tensor:
    positions = torch.arange(T)
    if form == "contiguous":
        return positions.chunk(size)[index]
    if form == "zigzag":  # as ring attention has them, the early with the late
        parts = positions.chunk(2 * size)
        return torch.cat([parts[index], parts[2 * size - 1 - index]])
    return positions if index == size - 1 else positions[:0]  # all on the last


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(V, (B, T), generator=generator)
    target[torch.rand(B, T, generator=generator) < 0.3] = -100
    target[:, -2:] = -100  # the last of four contiguous parts has no scored token
    return {
        "hidden": draw(B, T, H),
        "weight": draw(V, H),
        "target": target,
        "bias": draw(V),
        "ref_hidden": draw(B, T, H),
        "ref_weight": draw(V, H),
        "ref_bias": draw(V),
        "a": draw(RANK, H),
        "b": draw(V, RANK),
        "token_weights": draw(B, T).relu(),
        "temperature": TEMPERATURE,
        "old_token_logp": -3 + draw(B, T),
        "advantages": draw(B, T),
    }


def place(given: dict[str, Tensor], spread: dict[str, tuple[int, int]], form: str) -> Any:
    """The part of each tensor, by name, that the rank at ``spread`` holds."""
    part = dict(given)
    for name, value in given.items():
        if "tp" in spread and name in OF_VOCABULARY:
            index, size = spread["tp"]
            part[name] = value.split(COLUMNS[size])[index]
        if name in BY_TOKEN:
            if "dp" in spread:
                index, size = spread["dp"]
                value = value.split([2 * pairs for pairs in PAIRS[size]])[index]
            if "seq" in spread:
                value = value[:, tokens_of(form, *spread["seq"])]
            part[name] = value
    return part


# Objective, and what is passed or asked for beside; "updated": LoRA, "temperatures": of tokens.
CASES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo"},
    "dpo, batches": {"objective": "dpo", "options": BATCHES},
    "dpo, recomputed, cap": {"objective": "dpo", "options": RECOMPUTED, "softcap": 3.0},
    "dpo, least tile": {"objective": "dpo", "options": ScoringOptions(memory_budget=1)},
    "dpo, frozen": {"objective": "dpo", "frozen": True},
    "dpo, updated": {"objective": "dpo", "updated": True, "temperatures": True},
    "simpo, weights": {"objective": "simpo", "weighted": True, "outputs": ("entropy", "accuracy")},
    "tdpo": {"objective": "tdpo"},
    "tdpo, recomputed": {"objective": "tdpo", "options": RECOMPUTED},
    "mallows_po": {"objective": "mallows_po"},
    "epsilon_dpo": {"objective": "epsilon_dpo"},
    "aot": {"objective": "aot"},
    "kto": {"objective": "kto", "labels": True},
    "bco": {"objective": "bco", "labels": True},
    "grpo": {"objective": "grpo", "tokens": OF_TOKENS, "beta": 0.1},
    "gspo, recomputed": {"objective": "gspo", "tokens": OF_TOKENS, "options": RECOMPUTED},
    "dapo": {"objective": "dapo", "tokens": OF_TOKENS, "beta": 0.1},
    "disco": {"objective": "disco", "tokens": OF_TOKENS[:1], "answers": True},
}
ALONE = tuple(CASES)
TOGETHER = ("dpo", "dpo, batches", "dpo, frozen", "tdpo", "aot", "kto", "grpo", "dapo", "disco")


def run(given: dict[str, Tensor], name: str, labels: Tensor, **groups: Any) -> dict[str, Tensor]:
    given, settings = dict(given), dict(CASES[name])
    updated, frozen = settings.pop("updated", False), settings.pop("frozen", False)
    if not settings.pop("weighted", False):
        del given["token_weights"]
    if not settings.pop("temperatures", False):
        del given["temperature"]
    of_tokens = {one: given.pop(one) for one in OF_TOKENS}
    taken = settings.pop("tokens", ())
    if settings.pop("labels", False):
        settings["extras"] = {"labels": labels}
    elif taken:
        settings["extras"] = {one: of_tokens[one] for one in taken}
        if settings.pop("answers", False):  # of one prompt, on all ranks
            prompts = {"rewards": labels, "group_ids": labels.new_zeros(len(labels)).long()}
            settings["extras"] |= prompts
    elif not objectives.get(settings["objective"]).needs_reference:
        given = {key: value for key, value in given.items() if not key.startswith("ref_")}
    wanted = ["hidden"] if frozen else ["hidden", "bias", *(("a", "b") if updated else ("weight",))]
    leaves = [given[one].clone().requires_grad_() for one in wanted]
    given |= dict(zip(wanted, leaves, strict=True))
    a, b = given.pop("a"), given.pop("b")
    if updated:
        settings["lora"] = (a, b, 0.7)
    output = preference_loss(**given, layout="interleaved", reduction="sum", **settings, **groups)
    found = dict(zip(wanted, torch.autograd.grad(output.loss, leaves), strict=True))
    metrics = {key: one for key, one in output.metrics.items() if key in ("entropy",)}
    return {"loss": output.loss.detach(), "logps": output.logps.detach()} | metrics | found


LABELS = torch.arange(B) % 3 == 0


def on_a_rank(rank: int, sizes: dict[str, int], form: str, names: tuple[str, ...]) -> Any:
    """What the rank finds, and where it is in the mesh."""
    mesh = init_device_mesh(device().type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    spread = {one: (mesh.get_local_rank(one), size) for one, size in sizes.items()}
    groups = {f"{one}_group": mesh.get_group(one) for one in sizes}
    labels = LABELS
    if "dp" in spread:
        index, size = spread["dp"]
        labels = LABELS.split([2 * pairs for pairs in PAIRS[size]])[index]
    here = {key: one.to(device()) for key, one in batch().items()}
    part, labels = place(here, spread, form), labels.to(device())
    return spread, {name: run(part, name, labels, **groups) for name in names}


def added_up(ranks: Any, name: str, key: str, over: set[str], chosen: Any) -> Tensor:
    """Of the ranks that agree with ``chosen`` in every dimension but those of ``over``."""
    return sum(
        found[name][key]
        for spread, found in ranks
        if all(spread[one] == chosen[one] for one in spread if one not in over)
    )


def check(ranks: Any, names: tuple[str, ...], form: str) -> None:
    for name in names:
        whole = run(batch(), name, LABELS)
        for spread, found in ranks:
            here = place(whole, spread, form)
            for key, got in found[name].items():
                # Tokens and pairs of all ranks add up; pairs alone in the loss.
                over = {"dp"} if key == "loss" else set()
                over = {"seq", "dp"} if key in ("weight", "bias", "a", "b") else over
                want = here[key]
                if key == "logps" and "dp" in spread:
                    index, size = spread["dp"]
                    want = want.split([2 * pairs for pairs in PAIRS[size]])[index]
                if key == "entropy" and "dp" in spread:
                    continue  # a mean of its own rows
                got = added_up(ranks, name, key, over, spread) if over & set(spread) else got
                torch.testing.assert_close(got, want, msg=lambda m, n=name, k=key: f"{n} {k}: {m}")


@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        ({"tp": 4}, ""),
        ({"seq": 4}, "contiguous"),
        ({"seq": 4}, "zigzag"),
        ({"seq": 4}, "last"),
        ({"dp": 4}, ""),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_four_of_one_kind(sizes: dict[str, int], form: str, four_ranks: Ranks) -> None:
    names = TOGETHER if form in ("contiguous", "last") else ALONE
    if "seq" in sizes:  # whose rows are never whole: no batches
        names = tuple(name for name in names if "batches" not in name)
    check(four_ranks(on_a_rank, sizes, form, names), names, form)


@pytest.mark.parametrize("kinds", list(itertools.combinations(("dp", "seq", "tp"), 2)))
def test_two_by_two(kinds: tuple[str, str], four_ranks: Ranks) -> None:
    sizes = dict.fromkeys(kinds, 2)
    names = tuple(name for name in TOGETHER if "seq" not in kinds or "batches" not in name)
    check(four_ranks(on_a_rank, sizes, "zigzag", names), names, "zigzag")
