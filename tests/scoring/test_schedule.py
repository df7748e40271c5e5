# SPDX-License-Identifier: Apache-2.0
"""The choice of schedule as the pure function it is: tables of problems and plans."""

import pytest
import torch

from fastpref import ScoringOptions
from fastpref.scoring import plan as schedule
from fastpref.scoring.backends import column_sums
from fastpref.scoring.memory import total_memory
from fastpref.scoring.plan import Problem, choose

N, H, V = 4096, 1024, 32768
ROW = V * 2  # bytes of a row of E
GIB = 1 << 30


def problem(**changes):
    return Problem(
        **{
            "scored": N,
            "hidden_size": H,
            "vocab_size": V,
            "dtype": torch.bfloat16,
            "needs_hidden": True,
            "needs_weight": True,
            "needs_bias": False,
            "only_logp": True,
            "trained_size": H,
            "copies_weight": False,
            "backend": "torch",
            "device_type": "cpu",
            "scores_in_tiles": True,
            "temporary_bytes": 0,
            "total_memory": 1024 * GIB,
            **changes,
        }
    )


def plan(changes=None, **options):
    return choose(problem(**(changes or {})), ScoringOptions(**options))


FROZEN = {"needs_weight": False}
NO_GRADIENT = {"needs_weight": False, "needs_hidden": False}


@pytest.mark.parametrize(
    "changes, options, name, kept, units",
    [
        (NO_GRADIENT, {}, "score", 0, 1),
        (NO_GRADIENT, {"schedule": "keep"}, "score", 0, 1),
        (NO_GRADIENT, {"memory_budget": 1}, "score", 0, 1),
        (FROZEN, {}, "direct", 0, 2),
        (FROZEN, {"schedule": "direct"}, "direct", 0, 2),
        (FROZEN, {"memory_budget": 600 * ROW}, "direct", 0, 2),
        (FROZEN, {"schedule": "keep"}, "keep", N, 2),
        (FROZEN, {"schedule": "recompute"}, "recompute", 0, 3),
        (FROZEN | {"only_logp": False}, {}, "keep", N, 2),
        (FROZEN | {"needs_bias": True}, {}, "keep", N, 2),
        ({"needs_hidden": False}, {}, "keep", N, 2),
        ({"needs_hidden": False}, {"memory_budget": 1}, "recompute", 0, 3),
        ({}, {}, "keep", N, 3),
        ({"only_logp": False}, {}, "keep", N, 3),
        ({}, {"schedule": "keep"}, "keep", N, 3),
        ({}, {"schedule": "recompute"}, "recompute", 0, 4),
        ({}, {"memory_budget": 2 * N * ROW}, "keep", N, 3),
        ({}, {"memory_budget": 1024 * ROW}, "keep/recompute", 768, 4 - 768 / N),
        ({}, {"memory_budget": 1024 * ROW, "schedule": "keep"}, "keep/recompute", 768, 3.8125),
        ({}, {"memory_budget": 1024 * ROW, "schedule": "recompute"}, "recompute", 0, 4),
        ({}, {"memory_budget": 1}, "recompute", 0, 4),
        ({"scored": 0}, {}, "keep", 0, None),
        ({"scored": 1}, {}, "keep", 1, 3),
    ],
)
def test_choice(changes, options, name, kept, units):
    chosen = plan(changes, **options)
    assert (chosen.schedule, chosen.kept_rows) == (name, kept)
    assert units is None or chosen.units == pytest.approx(units)


@pytest.mark.parametrize(
    "changes", [{}, {"needs_bias": True, **FROZEN}, FROZEN | {"only_logp": False}]
)
def test_direct_refuses_what_it_cannot_serve(changes):
    with pytest.raises(ValueError, match=r"schedule='direct'.*needs.*use schedule='auto'"):
        plan(changes, schedule="direct")


def test_default_budget_is_a_share_of_total_memory():
    """Of total, not of free memory: the same on every rank and in every run."""
    assert plan().memory_budget == 1024 * GIB // schedule.BUDGET_SHARE
    assert plan(memory_budget=12345).memory_budget == 12345
    small = plan({"total_memory": schedule.BUDGET_SHARE * 1024 * ROW})
    assert small == plan(
        {"total_memory": schedule.BUDGET_SHARE * 1024 * ROW}, memory_budget=1024 * ROW
    )


def test_total_memory_of_the_cpu():
    total = total_memory(torch.device("cpu"))
    assert total == total_memory(torch.device("cpu"))
    assert GIB // 2 < total < 1 << 50


def tiles(chosen):
    return [tile for tile in (chosen.forward_tile, chosen.backward_tile) if tile is not None]


BUDGETS = [1, 10**5, 10**6, 10**7, 10**8, 10**9, 10**10, 10**12]


@pytest.mark.parametrize("name", ["auto", "keep", "recompute"])
@pytest.mark.parametrize("changes", [{}, FROZEN, NO_GRADIENT, {"dtype": torch.float32}])
@pytest.mark.parametrize("scored", [0, 1, 63, 64, 100, 4097])
@pytest.mark.parametrize("vocab", [1, 1000, 1024, 32769])
def test_tiles_and_kept_rows_fit_the_budget(name, changes, scored, vocab):
    """Or are the least tile, which is smaller than any useful budget."""
    for budget in BUDGETS:
        chosen = plan(
            {**changes, "scored": scored, "vocab_size": vocab}, schedule=name, memory_budget=budget
        )
        itemsize = chosen.dtype.itemsize
        kept = chosen.kept_rows * vocab * itemsize
        least = schedule.LEAST_ROWS * schedule.LEAST_COLS * itemsize
        assert 0 <= chosen.kept_rows <= scored
        assert kept <= budget
        for tile in tiles(chosen):
            assert 1 <= tile.cols <= vocab
            assert tile.cols == vocab or tile.cols % schedule.LEAST_COLS == 0
            if chosen.schedule == "keep":
                assert (tile.rows, tile.cols) == (scored, vocab)
            else:
                assert 1 <= tile.rows <= max(1, scored)
                assert kept + tile.rows * tile.cols * itemsize <= max(budget, kept + least)


@pytest.mark.parametrize("budget", [1, 10**6, 10**7, 10**8])
def test_direct_keeps_to_the_least_tile(budget):
    """Rows of a product, never single rows."""
    chosen = plan(FROZEN, schedule="direct", memory_budget=budget)
    assert chosen.forward_tile.cols == V
    assert schedule.LEAST_ROWS <= chosen.forward_tile.rows


def test_chunk_rows():
    for name in ("recompute", "direct"):
        changes = FROZEN if name == "direct" else {}
        assert plan(changes, schedule=name, chunk_rows=100).forward_tile.rows <= 100
    assert plan(NO_GRADIENT, chunk_rows=100).forward_tile.rows <= 100
    assert plan(NO_GRADIENT).forward_tile.rows >= schedule.FEWEST_GOOD_ROWS


def test_chunks_are_even():
    """2049 rows are not a chunk of 2048 and one of 1."""
    chosen = plan(NO_GRADIENT | {"scored": schedule.MOST_CHUNK_ROWS + 1})
    assert chosen.forward_tile.rows == schedule.MOST_CHUNK_ROWS // 2 + 1


ON_CUDA = {"device_type": "cuda"}


def test_on_a_gpu_the_budget_alone_bounds_a_chunk():
    """Each chunk has its launches; 2048 rows are what serves a CPU best."""
    for changes in (NO_GRADIENT, FROZEN):
        changes = changes | ON_CUDA | {"scored": 8192}
        assert plan(changes).forward_tile == (8192, V)
        assert plan(changes, memory_budget=5000 * ROW).forward_tile.rows == 4096
        assert plan(changes, chunk_rows=100).forward_tile.rows <= 100
    assert plan(NO_GRADIENT | {"scored": 8192}).forward_tile.rows == schedule.MOST_CHUNK_ROWS


def test_on_a_gpu_the_budget_alone_bounds_a_tile_of_two_heads():
    """Of whole rows, two of them: of student and teacher."""
    for device_type, rows in (("cpu", schedule.MOST_CHUNK_ROWS), ("cuda", 8192)):
        both = FROZEN | {"device_type": device_type, "scored": 8192, "partner_size": H}
        assert plan(both).forward_tile == (rows, V)
        assert plan(both, memory_budget=200 * ROW).forward_tile == (100, V)


def test_the_bias_gradient_is_in_the_workspace():
    for device_type in ("cpu", "cuda"):
        changes = {"device_type": device_type}
        without, with_bias = plan(changes), plan(changes | {"needs_bias": True})
        needed = column_sums.temporary_bytes(N, V, device_type, torch.bfloat16)
        assert with_bias.workspace_bytes - without.workspace_bytes == needed
    assert column_sums.temporary_bytes(N, V, "cpu", torch.bfloat16) == 32 * V * 4
    assert column_sums.temporary_bytes(N, V, "cpu", torch.float32) == 0


def descent(chosen, **arguments):
    """Each plan after memory ran out under the one before."""
    found = [chosen]
    while (smaller := schedule.less(found[-1], **arguments)) is not None:
        found.append(smaller)
    return found


def held(chosen):
    tile = max(one.rows * one.cols for one in tiles(chosen))
    return chosen.kept_rows * chosen.vocab_size + tile


PLANS = {
    "keep": ({}, {}),
    "keep, forced": ({}, {"schedule": "keep"}),
    "keep in part": ({}, {"memory_budget": 1024 * ROW}),
    "recompute": ({}, {"schedule": "recompute"}),
    "direct": (FROZEN, {}),
    "direct, forced": (FROZEN, {"schedule": "direct", "memory_budget": 1}),
    "score": (NO_GRADIENT, {}),
    "on a GPU": (ON_CUDA, {}),
    "rows of my own": ({}, {"schedule": "recompute", "chunk_rows": 300}),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("keep", [True, False])
def test_with_less_until_the_least(name, keep):
    changes, options = PLANS[name]
    steps = descent(plan(changes, **options), keep=keep)
    assert 2 < len(steps) < 12
    sizes = [held(one) for one in steps]
    assert sizes == sorted(set(sizes), reverse=True)
    rows = [one.forward_tile.rows for one in steps]
    assert rows == sorted(rows, reverse=True)
    least = steps[-1]
    assert least.kept_rows == 0
    for tile in tiles(least):
        assert tile == (schedule.LEAST_ROWS, schedule.LEAST_COLS)
    if not keep:
        assert not any(one.kept_rows for one in steps[1:])
    assert steps == descent(plan(changes, **options), keep=keep)
    assert "after memory ran out" in str(least)


def test_with_less_where_temporaries_bound_the_rows():
    """Of a backend that forms no products in memory where it keeps none."""
    changes = NO_GRADIENT | ON_CUDA | {"scores_in_tiles": False, "temporary_bytes": 1000 * N}
    steps = descent(plan(changes))
    rows = [one.forward_tile.rows for one in steps]
    assert rows[0] == N and rows[-1] == schedule.LEAST_ROWS
    assert rows == sorted(set(rows), reverse=True) and 2 < len(rows) < 8


def test_a_plan_says_where_its_budget_comes_from():
    assert "(budget 12.0 MiB, memory_budget)" in str(plan(memory_budget=12 << 20))
    share = 1024 * GIB // schedule.BUDGET_SHARE // (1 << 20)
    assert f"(budget {share}.0 MiB, a sixteenth of the device's memory)" in str(plan())


def test_workspace_grows_with_what_it_holds():
    keep, recompute = plan(), plan(schedule="recompute", memory_budget=64 * ROW)
    assert keep.saved_bytes >= N * ROW
    assert keep.workspace_bytes >= keep.saved_bytes
    assert recompute.saved_bytes < N * H * 2
    direct = plan(FROZEN)
    assert N * H * 2 <= direct.saved_bytes < N * H * 2 + 64 * N
    double = plan({"scored": 2 * N}, schedule="recompute", memory_budget=64 * ROW)
    assert double.workspace_bytes - recompute.workspace_bytes <= 20 * N * H


def test_workspace_holds_the_tiles():
    for options in ({"memory_budget": 1024 * ROW}, {"schedule": "recompute"}, {"memory_budget": 1}):
        chosen = plan(**options)
        kept = chosen.kept_rows * ROW
        for tile in tiles(chosen):
            assert chosen.workspace_bytes >= kept + tile.rows * tile.cols * 2


def test_workspace_of_kept_rows_that_pass_through_a_tile():
    """Under an entropy gradient, or with rows without gradient: beside the kept rows."""
    chosen = plan()
    kept = chosen.kept_rows * chosen.vocab_size * chosen.dtype.itemsize
    assert chosen.schedule == "keep"
    tile = min(kept, chosen.memory_budget - kept)
    assert chosen.workspace_bytes > chosen.saved_bytes + 0.9 * tile


def test_plans_are_values():
    assert plan() == plan()
    assert hash(plan()) == hash(plan())
    with pytest.raises(AttributeError):
        plan().schedule = "keep"
