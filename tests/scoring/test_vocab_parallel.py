# SPDX-License-Identifier: Apache-2.0
"""A vocabulary-sharded head on 2 and 4 processes against one process and the float64 reference."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import INPUTS, check_scores, make_case, references, upstream_of

V = 2051
ALL = ("logp", "entropy", "mean_logits", "lse")
LINEAR = {"bias": True, "ignored": 0.3, "temperature": 1.5}  # without a cap
MEANS = {"arguments": LINEAR, "outputs": OUTPUTS, "differentiated": ("logp", "mean_logits")}
FEATURES = {"bias": True, "ignored": 0.3, "softcap": 5.0, "temperature": 1.5}


@dataclass(frozen=True)
class ShardedCase:
    dtype: torch.dtype = torch.float32
    arguments: dict[str, Any] = field(default_factory=dict)  # of make_case
    options: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("logp",)
    differentiated: tuple[str, ...] = ("logp",)
    needs: tuple[str, ...] = INPUTS
    even: bool = True
    padding: int = 0  # rows of each shard beyond its range
    turned: bool = False  # the last rank has the first ids


def case(dtype=torch.float32, **changes):
    return ShardedCase(dtype=dtype, arguments=changes.pop("arguments", FEATURES), **changes)


CASES = {
    **{
        f"{str(dtype)[6:]} {name}": case(dtype, **options)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for name, options in {
            "kept": {},
            "all outputs": {"outputs": OUTPUTS, "differentiated": ALL},
            "recomputed": {"options": {"schedule": "recompute"}, "even": False},
        }.items()
    },
    "without gradient": case(outputs=OUTPUTS, differentiated=()),
    "direct": case(needs=("hidden",), even=False),
    "mean logits": case(**MEANS, padding=5, even=False),
    "mean logits, direct": case(
        **MEANS | {"outputs": ("logp", "mean_logits")}, needs=("hidden",), even=False
    ),
    "weight only": case(needs=("weight",)),
    "padded shards": case(padding=5, even=False, outputs=OUTPUTS, differentiated=ALL),
    "ids from the last rank on": case(turned=True, padding=5, even=False, outputs=OUTPUTS),
    **{
        f"{str(dtype)[6:]} far below, {schedule}": case(
            dtype, arguments={"below": 0.5}, options={"schedule": schedule}
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for schedule in ("keep", "recompute")
    },
    "far below, direct": case(arguments={"below": 0.5}, needs=("hidden",)),
    "far below, all outputs": case(arguments={"below": 0.5}, outputs=OUTPUTS, differentiated=ALL),
    # A rank whose best logit lies far below another's.
    **{
        f"{str(dtype)[6:]} sharp, {schedule}": case(
            dtype, arguments={"spread": 60.0}, options={"schedule": schedule}
        )
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for schedule in ("keep", "recompute")
    },
    "sharp, direct": case(arguments={"spread": 60.0}, needs=("hidden",)),
    "least tile": case(options={"memory_budget": 1}, even=False),
    "uneven chunks": case(options={"memory_budget": 80 * 700 * 4}, even=False),
    "uneven kept rows": case(
        options={"memory_budget": 120 * 700 * 4, "schedule": "keep"}, even=False
    ),
}


def bounds(spec: ShardedCase, world: int) -> list[tuple[int, int]]:
    """Vocabulary ids of each rank's rows."""
    first = V // world if spec.even else V // (2 * world)
    inner = [0, *(first + i * ((V - first) // (world - 1)) for i in range(world - 1)), V]
    found = list(itertools.pairwise(inner))
    return found[::-1] if spec.turned else found


def shard(tensor: torch.Tensor, start: int, stop: int, padding: int) -> torch.Tensor:
    """Rows [start, stop), then rows of NaN that take no part."""
    rows = tensor[start:stop].detach()
    return torch.cat([rows, rows.new_full((padding, *rows.shape[1:]), torch.nan)])


def on_a_rank(rank: int, name: str) -> dict[str, torch.Tensor]:
    """Scores with the rank's shard, and the gradients of what it holds."""
    spec, group = CASES[name], dist.group.WORLD
    case = make_case(**spec.arguments, dtype=spec.dtype)
    start, stop = bounds(spec, group.size())[rank]
    leaves = {
        "hidden": torch.where(case.scored[:, None], case.hidden, torch.nan),
        "weight": shard(case.weight, start, stop, spec.padding),
    }
    if case.bias is not None:
        leaves["bias"] = shard(case.bias, start, stop, spec.padding)
    leaves = {key: leaf.clone().requires_grad_(key in spec.needs) for key, leaf in leaves.items()}
    scores = linear_logprob(
        **leaves,
        target=case.target,
        outputs=spec.outputs,
        tp_group=group,
        vocab_range=(start, stop) if spec.padding else None,
        options=ScoringOptions(**spec.options),
        **case.map,
    )
    results = {key: getattr(scores, key).detach() for key in spec.outputs}
    if spec.differentiated:
        upstream = upstream_of(case, spec.differentiated)
        tensors = [getattr(scores, key) for key in spec.differentiated]
        torch.autograd.backward(
            tensors, [g.to(t.dtype) for g, t in zip(upstream.values(), tensors, strict=True)]
        )
        results |= {f"d {key}": leaf.grad for key, leaf in leaves.items() if leaf.requires_grad}
    return results


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", ["two_ranks", "four_ranks"])
def test_against_the_whole_vocabulary(name, world, request):
    spec, ranks = CASES[name], request.getfixturevalue(world)
    results = ranks(on_a_rank, name)
    shards = bounds(spec, len(results))
    for result, (start, stop) in zip(results, shards, strict=True):
        for key in ("d weight", "d bias"):
            if key in result:
                assert (result[key][stop - start :] == 0).all()
                result[key] = result[key][: stop - start]
    # Every rank holds the same bits of what all of them hold.
    for key in set(results[0]) - {"d weight", "d bias"}:
        for result in results[1:]:
            assert torch.equal(result[key], results[0][key]), key
    whole = dict(results[0])
    for key in ("d weight", "d bias"):
        if key in whole:
            parts = [result[key] for result in results]
            whole[key] = torch.cat(parts[::-1] if spec.turned else parts)
    expected = {f"d {name}" for name in spec.needs if spec.differentiated}
    if not spec.arguments.get("bias"):
        expected -= {"d bias"}
    assert {key for key in whole if key.startswith("d ")} == expected
    eager, exact = references(spec.dtype, spec.outputs, spec.differentiated, **spec.arguments)
    check_scores(make_case(dtype=spec.dtype, **spec.arguments), whole, eager, exact)


def test_vocab_range_without_a_group():
    """Rows beyond the range take no part, ids count from its start."""
    from tests.scoring.cases import run

    whole = make_case(vocab=300, bias=True)
    start, stop = 40, 260
    padded = torch.full((20, 7), torch.nan, dtype=torch.float64)
    part = type(whole)(
        whole.hidden,
        torch.cat([whole.weight[start:stop], padded]),
        whole.target % (stop - start) + start,
        torch.cat([whole.bias[start:stop], padded[:, 0]]),
    )
    small = type(whole)(
        whole.hidden,
        whole.weight[start:stop],
        whole.target % (stop - start),
        whole.bias[start:stop],
    )
    upstream = {"logp": torch.randn(140, dtype=torch.float64)}
    actual = run(part, outputs=OUTPUTS, upstream=upstream, vocab_range=(start, stop))
    expected = run(small, outputs=OUTPUTS, upstream=upstream)
    for name, value in expected.items():
        rows = value.shape[0] if name in ("d weight", "d bias") else None
        torch.testing.assert_close(actual[name][:rows], value, msg=name)
        assert (actual[name][220:] == 0).all() or rows is None
