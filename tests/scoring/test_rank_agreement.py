# SPDX-License-Identifier: Apache-2.0
"""What ranks of a vocabulary-sharded head compare, how often, and what each of them raises."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastpref import (
    ScoringOptions,
    linear_divergence,
    linear_logits,
    linear_logprob,
    preference_loss,
    sparse_divergence,
)
from fastpref.scoring import agreement, backends, request
from fastpref.scoring.chosen import passes
from fastpref.scoring.head import Model
from fastpref.scoring.request import make_model, make_request
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy

N, H, V = 12, 6, 40
EXCHANGE = ("all_gather", 7)  # of what a rank says of itself, in int64
Counted = list[tuple[str, int]]  # collectives and the numbers in each


@contextmanager
def counted() -> Iterator[Counted]:
    """The collectives made within."""
    made: Counted = []

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            own = args[1] if name.startswith("all_gather") else args[0]
            made.append((name, own.numel() if isinstance(own, torch.Tensor) else -1))
            return original(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce_scatter")
    with mock.patch.multiple(dist, **{name: watched(name) for name in names}):
        yield made


def tensors(rank: int, world: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = V // world

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "hidden": draw(N, H).requires_grad_(),
        "weight": draw(V, H)[rank * rows : (rank + 1) * rows].clone().requires_grad_(),
        "target": torch.randint(V, (N,), generator=generator),
    }


TARGETS = {
    "drawn": lambda target: target,
    "one shard": lambda target: target % 3,
    "nobody's": lambda target: target + V,
    "some masked": lambda target: target.where(target % 2 == 0, -100),
}


def sequences(rank: int) -> dict[str, tuple[Counted, Counted]]:
    """Of the first call and of the next, by what the targets and the logits are."""
    found = {}
    group, world = dist.group.WORLD, dist.get_world_size()
    for schedule in ("keep", "recompute"):
        for name, change in TARGETS.items():
            given = tensors(rank, world)
            given["target"] = change(given["target"])
            options = ScoringOptions(schedule=schedule)
            twice = []
            for scale in (1.0, 300.0):  # logits far beyond what exponentials hold
                with counted() as made:
                    scores = linear_logprob(
                        given["hidden"] * scale,
                        given["weight"],
                        given["target"],
                        tp_group=group,
                        options=options,
                    )
                    scores.logp.nan_to_num().sum().backward()
                twice.append(made)
            found[f"{schedule}, {name}"] = tuple(twice)
    return found


def test_collectives_depend_on_no_data(four_ranks: Ranks) -> None:
    """But for N. Of [2 N] target logits and owners, of three numbers a row, and of the hidden
    gradient; before them, for a new head, one of seven numbers."""
    target = tensors(0, 4)["target"]
    for of_rank in four_ranks(sequences):
        for name, (first, second) in of_rank.items():
            n = int((TARGETS[name.split(", ")[1]](target) != -100).sum())
            expected = [("all_reduce", 2 * n), ("all_gather", 3 * n), ("all_reduce", n * H)]
            assert first == [EXCHANGE, *expected], name
            assert second == expected, name


def over_budget(rank: int) -> dict[str, Counted]:
    rows, vocab, found = 700, 32768, {}
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, H, generator=generator).requires_grad_()
    weight = torch.randn(vocab, H, generator=generator)[rank::2].clone().requires_grad_()
    target = torch.arange(rows)
    for schedule, logits in (("recompute", 2), ("keep", 2), ("keep", 5)):
        budget = vocab // 2 * 4 * rows // logits
        options = ScoringOptions(schedule=schedule, memory_budget=budget)
        for _ in range(2):
            with counted() as made:
                given = {"tp_group": dist.group.WORLD, "options": options}
                linear_logprob(hidden, weight, target, **given).logp.sum().backward()
        found[f"{schedule}, {logits}"] = made
    return found


def test_a_small_budget_cuts_columns(two_ranks: Ranks) -> None:
    """So that ranks meet as often as without one; twice where some rows are kept."""
    for found in two_ranks(over_budget):
        for name, parts in (
            ("recompute, 2", [700]),
            ("keep, 2", [256, 444]),
            ("keep, 5", [64, 636]),
        ):
            meetings = [(("all_reduce", 2 * n), ("all_gather", 3 * n)) for n in parts]
            expected = [*(one for pair in meetings for one in pair), ("all_reduce", 700 * H)]
            assert found[name] == expected, name


def all_masked(rank: int) -> tuple[Counted, float]:
    given = tensors(rank, dist.get_world_size())
    target = torch.full_like(given["target"], -100)
    with counted() as made:
        scores = linear_logprob(given["hidden"], given["weight"], target, tp_group=dist.group.WORLD)
        scores.logp.sum().backward()
    return made, given["hidden"].grad.abs().sum().item()


def test_nothing_scored(two_ranks: Ranks) -> None:
    """The same collectives, of nothing."""
    for made, grad in two_ranks(all_masked):
        assert made == [EXCHANGE, ("all_reduce", 0), ("all_gather", 0), ("all_reduce", 0)]
        assert grad == 0


def of_other_functions(rank: int) -> dict[str, tuple[Counted, Counted]]:
    group, world, found = dist.group.WORLD, dist.get_world_size(), {}
    given = tensors(rank, world)
    hidden, weight, target = given["hidden"], given["weight"], given["target"]
    ids, logps = target[:, None], torch.full((N, 1), -1.0)
    other = torch.randn(V // world, H)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "logits": lambda: linear_logits(hidden, weight, ids, tp_group=group),
        "sparse": lambda: sparse_divergence(hidden, weight, ids, logps, tp_group=group),
        "divergence": lambda: linear_divergence(
            hidden, weight, hidden.detach(), other, tp_group=group, vocab_size=V
        ),
        "ref_entropy": lambda: (
            preference_loss(
                hidden.view(4, 3, H),
                weight,
                target.view(4, 3),
                "mallows_po",
                ref_hidden=hidden.detach().view(4, 3, H),
                ref_weight=other,
                tp_group=group,
            ).loss
        ),
    }
    for name, call in calls.items():
        twice = []
        for _ in range(2):
            with counted() as made:
                call().sum().backward()
            twice.append(made)
        found[name] = (twice[0], twice[1])
    return found


def test_later_calls_compare_nothing(two_ranks: Ranks) -> None:
    for of_rank in two_ranks(of_other_functions):
        for name, (first, second) in of_rank.items():
            assert EXCHANGE in first, name
            assert second == [one for one in first if one != EXCHANGE], name


def heads_alike_here(rank: int) -> list[float]:
    """Two heads of which rank 0 holds as many rows, and the other rank does not."""
    sums, generator = [], torch.Generator().manual_seed(5)
    hidden = torch.randn(N, H, generator=generator)
    whole = torch.randn(V, H, generator=generator)
    for total in (V, V - 7, V):
        rows = slice(0, 10) if rank == 0 else slice(10, total)
        weight = whole[rows].clone()
        scores = linear_logprob(
            hidden, weight, torch.arange(N), tp_group=dist.group.WORLD, outputs=("lse",)
        )
        sums.append(scores.lse.sum().item())
    return [*sums, (hidden @ whole.T).logsumexp(1).sum().item()]


def test_heads_that_differ_elsewhere(two_ranks: Ranks) -> None:
    for first, second, third, whole in two_ranks(heads_alike_here):
        assert first == third == pytest.approx(whole, rel=1e-6) and second < first


# Arguments of the second rank alone.
MORE: dict[str, Callable[[], torch.Tensor | tuple[torch.Tensor, torch.Tensor, float]]] = {
    "bias": lambda: torch.zeros(20),
    "lora": lambda: (torch.zeros(2, H), torch.zeros(20, 2), 1.0),
    "temperature": lambda: torch.full((N,), 0.7),
}
# What the second rank does otherwise, and what is said of it: all that is compared.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "options": (
        {"options": ScoringOptions(memory_budget=1)},
        r"differ in options: ScoringOptions\(.*\) on rank 0, ScoringOptions\(.*=1.*\) on rank 1",
    ),
    # Of the products alone, and of what they are made of alone.
    "dtype": (
        {"autocast": True},
        r"differ in dtype of products: torch\.float32 on rank 0, torch\.bfloat16 on rank 1\. Pass",
    ),
    "dtypes": (
        {"weight in": torch.bfloat16},
        r"differ in dtype of hidden and weight: \(torch\.float32, torch\.float32\) on rank 0, "
        r"\(torch\.float32, torch\.bfloat16\) on rank 1\. Pass",
    ),
    "outputs": ({"outputs": ("logp", "entropy")}, "outputs: .* on rank 0, .*entropy.* on rank 1"),
    "softcap": ({"softcap": 3.0}, "softcap: .* on rank 0, .* on rank 1"),
    "frozen": ({"frozen": True}, "needed gradients: .* on rank 0, .* on rank 1"),
    "reduction": ({"reduce_hidden_grad": False}, "reduce_hidden_grad: True on rank 0, False on"),
    "ignore_index": ({"ignore_index": -1}, "ignore_index: -100 on rank 0, -1 on rank 1"),
    "bias": ({"more": "bias"}, "in bias: False on rank 0, True on rank 1"),
    "lora": ({"more": "lora", "frozen": True}, "rank of lora: None on rank 0, 2 on rank 1"),
    "temperatures": (
        {"more": "temperature"},
        "temperatures of tokens: False on rank 0, True on rank 1",
    ),
    "hidden size": ({"wider": True}, "in hidden size: 6 on rank 0, 7 on rank 1"),
    "scored tokens": ({"fewer": True}, "in scored tokens: 12 on rank 0, 11 on rank 1"),
    "backends": ({"backends": ("torch",)}, r"in backends: .* on rank 0, \('torch',\) on rank 1"),
    "version": ({"version": "fastpref"}, "version of fastpref: '.*' on rank 0, '0.0.9' on rank 1"),
    "version of torch": (
        {"version": "torch"},
        "version of torch: '.*' on rank 0, '0.0.9' on rank 1",
    ),
    "overlap": ({"vocab_range": (15, 35)}, r"ranks 0 and 1 overlap; .* rank 0 \[0, 20\), rank 1"),
    "gap": ({"vocab_range": (22, 42)}, r"ranks 0 and 1 leave ids out; .* rank 1 \[22, 42\)"),
}


def told(call: Callable[[], object]) -> str:
    """What ``call`` raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing raised"


def at_fault(rank: int, name: str) -> str:
    """What is raised where the second rank differs."""
    changes = dict(FAULTS[name][0]) if rank == 1 else {}
    group = dist.new_group([0, 1])
    given: dict[str, Any] = tensors(rank, 2)
    given["weight"] = given["weight"].detach().to(changes.pop("weight in", torch.float32))
    given["weight"].requires_grad_(not changes.pop("frozen", False))
    if "more" in changes:
        more = changes.pop("more")
        given[more] = MORE[more]()
    if changes.pop("wider", False):
        given |= {one: nn.functional.pad(given[one], (0, 1)) for one in ("hidden", "weight")}
    if changes.pop("fewer", False):
        given["target"][3] = -100
    there = changes.pop("backends", backends.available("cpu"))
    versions = agreement._versions()
    if "version" in changes:
        versions[f"version of {changes.pop('version')}"] = "0.0.9"
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=changes.pop("autocast", False)),
        mock.patch.object(agreement, "_versions", lambda: versions),
        mock.patch.object(backends, "available", lambda device: there),
    ):
        return told(lambda: linear_logprob(**given, tp_group=group, **changes))


@pytest.mark.parametrize("name", FAULTS)
def test_what_differs_is_raised_on_every_rank(name: str, two_ranks: Ranks) -> None:
    first, second = two_ranks(at_fault, name)
    assert first == second
    with pytest.raises(ValueError, match=FAULTS[name][1]):
        raise ValueError(first)


def on_another_device(rank: int, function: str) -> str:
    """A meta device stands for a GPU of the second rank alone; what ranks tell goes by the CPU."""
    given, group, exchange = tensors(rank, 2), dist.new_group([0, 1]), agreement._gathered
    model = make_model(**given, tp_group=group)
    asked = make_request([model], ignore_index=-100, options=None)
    if rank == 1:
        head = model.head._replace(weight=model.head.weight.to("meta"))
        model = Model(model.hidden.to("meta"), head)

    def by_cpu(group: Any, words: list[int], _: torch.device, name: str) -> list[list[int]]:
        return exchange(group, words, torch.device("cpu"), name)

    calls = {
        "scores": lambda: request._agreed(asked, request.LOGP_ALONE, [model], False, N),
        "logits": lambda: passes._agreed(asked, model, N),
    }
    with (
        mock.patch.object(agreement, "_gathered", by_cpu),
        mock.patch.object(backends, "available", lambda device: ("torch",)),
    ):
        return told(calls[function])


@pytest.mark.parametrize("function", ["scores", "logits"])
def test_devices(function: str, two_ranks: Ranks) -> None:
    first, second = two_ranks(on_another_device, function)
    assert first == second
    with pytest.raises(ValueError, match=r"differ in device: 'cpu' on rank 0, 'meta' on rank 1\."):
        raise ValueError(first)


# Of a second head, and of chosen logits: what the second rank changes of its tensors or adds to
# the call, and what is said of it.
Change = Callable[[dict[str, Any]], dict[str, Any]]


def wider(*names: str) -> Change:
    return lambda given: {name: nn.functional.pad(given[name], (0, 1)) for name in names}


TEACHERS: dict[str, tuple[Change, str]] = {
    "dtype": (
        lambda given: {"teacher_weight": given["teacher_weight"].bfloat16()},
        r"dtype of second hidden and weight: .*float32\) on rank 0, .*bfloat16\) on rank 1\. P",
    ),
    "hidden size": (
        wider("teacher_hidden", "teacher_weight"),
        "second hidden size: 6 on rank 0, 7 on rank 1. Pass",
    ),
    "bias": (
        lambda _: {"teacher_bias": torch.zeros(20)},
        "second bias: False on rank 0, True on rank 1. Pass",
    ),
    "lora": (
        lambda _: {"teacher_lora": (torch.zeros(2, H), torch.zeros(20, 2), 1.0)},
        "rank of second lora: None on rank 0, 2 on rank 1. Pass",
    ),
    "vocab_size": (
        lambda _: {"vocab_size": V - 1},
        "vocab_size: 40 on rank 0, 39 on rank 1. Pass",
    ),
}
LOGITS: dict[str, tuple[Change, str]] = {
    "products": (
        lambda _: {"autocast": True},
        "dtype of products: torch.float32 on rank 0, torch.bfloat16 on rank 1. Pass",
    ),
    "dtype": (
        lambda given: {"weight": given["weight"].bfloat16()},
        r"dtype of hidden and weight: .*float32\) on rank 0, .*bfloat16\) on rank 1\. Pass",
    ),
    "hidden size": (wider("hidden", "weight"), "hidden size: 6 on rank 0, 7 on rank 1. Pass"),
    "tokens": (
        lambda given: {name: given[name][1:] for name in ("hidden", "ids")},
        "scored tokens: 12 on rank 0, 11 on rank 1. Pass",
    ),
    "bias": (lambda _: {"bias": torch.zeros(20)}, "bias: False on rank 0, True on rank 1. Pass"),
    "lora": (
        lambda _: {"lora": (torch.zeros(2, H), torch.zeros(20, 2), 1.0)},
        ".*; rank of lora: None on rank 0, 2 on rank 1. Pass",
    ),
    "softcap": (
        lambda _: {"softcap": 3.0},
        "temperature, logit_scale and softcap: .* on rank 0, .*3.0.* on rank 1. Pass",
    ),
    "frozen": (
        lambda given: {"hidden": given["hidden"].detach()},
        "needed gradients: .* on rank 0, .* on rank 1. Pass",
    ),
    "reduction": (
        lambda _: {"reduce_hidden_grad": False},
        "reduce_hidden_grad: True on rank 0, False on rank 1. Pass",
    ),
}


def teacher_at_fault(rank: int, name: str) -> str:
    mine, theirs = tensors(rank, 2), tensors(rank, 2)
    given: dict[str, Any] = {"teacher_hidden": theirs["hidden"], "teacher_weight": theirs["weight"]}
    given |= {"student_hidden": mine["hidden"], "student_weight": mine["weight"]}
    given["vocab_size"] = V if name == "vocab_size" else None
    given |= TEACHERS[name][0](given) if rank == 1 else {}
    group = dist.new_group([0, 1])
    return told(lambda: linear_divergence(**given, tp_group=group))


def logits_at_fault(rank: int, name: str) -> str:
    given: dict[str, Any] = tensors(rank, 2)
    given["weight"] = given["weight"].detach()
    given["ids"] = given.pop("target")[:, None]
    given |= LOGITS[name][0](given) if rank == 1 else {}
    group = dist.new_group([0, 1])
    with torch.autocast("cpu", torch.bfloat16, enabled=given.pop("autocast", False)):
        return told(lambda: linear_logits(**given, tp_group=group))


@pytest.mark.parametrize(
    ("call", "name"),
    [(teacher_at_fault, name) for name in TEACHERS] + [(logits_at_fault, name) for name in LOGITS],
)
def test_other_functions(call: Callable[[int, str], str], name: str, two_ranks: Ranks) -> None:
    _, wanted = (TEACHERS if call is teacher_at_fault else LOGITS)[name]
    first, second = two_ranks(call, name)
    assert first == second
    with pytest.raises(ValueError, match=f"differ in {wanted}"):
        raise ValueError(first)


def of_other_worlds(rank: int) -> str:
    """Rank 0 takes two ranks for its group, and the others four."""
    how = {"timeout": timedelta(seconds=4)}
    groups = [dist.new_group([0, 1], **how), dist.new_group([0, 1, 2, 3], **how)]
    try:
        linear_logprob(**tensors(rank, 4), tp_group=groups[rank > 0])
    except RuntimeError as error:
        return str(error)
    return "nothing raised"


def test_groups_of_different_ranks(four_ranks: Ranks) -> None:
    for rank, said in enumerate(four_ranks(of_other_worlds)):
        ranks = "0, 1, 2, 3" if rank else "0, 1"
        assert f"rank {rank} did not meet the other ranks of its tp_group ({ranks})" in said


def refused_here(rank: int, function: str) -> tuple[str, str]:
    given, group = tensors(rank, 4), dist.new_group(list(range(4)))
    if rank == 2:
        given["target"] = given["target"].float()
    try:
        if function == "preference_loss":
            given = {"hidden": given["hidden"].view(4, 3, H), "weight": given["weight"]} | {
                "target": given["target"].view(4, 3)
            }
            preference_loss(**given, objective="simpo", tp_group=group)
        elif function == "linear_divergence":
            hidden, weight, mask = given["hidden"], given["weight"], given["target"] > 3
            mask = mask.float() if rank == 2 else mask
            linear_divergence(hidden, weight, hidden, weight, mask, tp_group=group)
        else:
            linear_logprob(**given, tp_group=group)
    except (RuntimeError, TypeError) as error:
        return type(error).__name__, str(error)
    return "", "nothing raised"


@pytest.mark.parametrize("function", ["linear_logprob", "preference_loss", "linear_divergence"])
def test_arguments_refused_on_one_rank(function: str, four_ranks: Ranks) -> None:
    """At a group's first call its other ranks, which would wait, say which rank and why."""
    found = four_ranks(refused_here, function)
    assert found[2][0] == "TypeError"
    for rank in (0, 1, 3):
        kind, said = found[rank]
        assert kind == "RuntimeError" and "rank 2: TypeError: " in said and found[2][1] in said
