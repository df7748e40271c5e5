# SPDX-License-Identifier: Apache-2.0
"""What a pass over tiles costs, and which schedule runs: a value that follows from sizes, who needs
a gradient, and the memory budget alone.

    score           1u        no gradient: one product, nothing stored
    direct          2u        only hidden needs one: the forward pass multiplies the exponentials
                              with the weight and keeps (N, H); backward scales rows
    keep            2u or 3u  the forward pass keeps exponentials (N, V); backward is plain products
    keep/recompute  to 4u     as many rows kept as the budget holds; the others' products are formed
                              again in backward, one slab of the vocabulary at a time
    recompute       3u or 4u  no row kept

1u is one product of 2 N H V flop. A gradient that arrives at ``entropy`` or ``lse``, or under a cap
at ``mean_logits``, always recomputes: +1u at most. Of two models side by side the products of both
are formed, and formed again.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

import torch

from . import scaled
from .backends import column_sums, divergences
from .products import PRODUCT_BYTES, room_bytes, split
from .types import Schedule, ScoringOptions, statistics_dtype

BUDGET_SHARE = 16  # of the device's total memory, or of the container's
LEAST_ROWS = 64
LEAST_COLS = 1024
MEASURED_BYTES = 1 << 24  # a slab of the weight's gradient whose columns are measured
# Below about 512 rows a product spends its time packing the weight. On a CPU chunks above 2048 only
# take memory; on a GPU each chunk has its launches.
FEWEST_GOOD_ROWS = 512
MOST_CHUNK_ROWS = 2048
SHORTAGE = 4  # by this the budget is divided whenever memory ran out
MEBIBYTE = 1 << 20


class Tile(NamedTuple):
    """Rows of one product, and columns: the whole vocabulary unless the budget is small."""

    rows: int
    cols: int

    def nbytes(self, itemsize: int) -> int:
        return self.rows * self.cols * itemsize


class Product(NamedTuple):
    when: Literal["forward", "backward"]
    of: Literal["logits", "hidden", "weight"]  # logits, or the gradient of hidden or the weight
    units: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that the choice depends on.

    - ``scored``: N.
    - ``hidden_size``: H, widened by a low-rank update.
    - ``partner_size``: that of a second model, looked at side by side; 0 without one.
    - ``matrices``: kept of a row, each as large as its logits.
    - ``formed_again``: models whose products are formed again where rows are not kept.
    - ``trained_size``: columns of the weight gradient: H, an update's rank or a basis's columns.
    - ``projected_size``: of them, those of the basis itself; others are measured, not kept.
    - ``vocab_size``: V, columns held by the rank that holds the most.
    - ``dtype``: of the products.
    - ``needs_hidden``, ``needs_weight``, ``needs_bias``: whether these need a gradient.
    - ``only_logp``: whether no output but logp can receive a gradient through its row's logits.
    - ``copies_weight``: into the dtype of the products, or beside a low-rank update.
    - ``backend``: the one that runs, by the name of its option.
    - ``device_type``: "cpu" or "cuda".
    - ``scores_in_tiles``: forms products in memory even where it keeps no exponentials.
    - ``temporary_bytes``: of the backend, beside a tile.
    - ``total_memory``: of the device, or the container's limit, in bytes.
    - ``active``: share of the rows with a gradient, where the others cost nothing.
    - ``copies_partner``: the weight of the second model.
    - ``sharded``: over the vocabulary.
    - ``mixes``: the logits of both models, in plain torch.
    - ``widens``: products run in float32, block by block.
    - ``directed``: the direction of each row's gradient is known before its scores: all that two
      models make of a row is added up at once, and none is formed again.
    """

    scored: int
    hidden_size: int
    partner_size: int = 0
    matrices: int = 1
    formed_again: int = 1
    trained_size: int
    projected_size: int = 0
    vocab_size: int
    dtype: torch.dtype
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool
    only_logp: bool
    copies_weight: bool
    backend: str
    device_type: str
    scores_in_tiles: bool
    temporary_bytes: int
    total_memory: int
    active: float = 1.0
    copies_partner: bool = False
    sharded: bool = False
    mixes: bool = False
    widens: bool = False
    directed: bool = False

    @property
    def models(self) -> int:
        return 2 if self.partner_size else 1

    @property
    def row_bytes(self) -> int:
        """Of a row of logits."""
        return max(1, self.vocab_size * self.itemsize)

    @property
    def kept_row_bytes(self) -> int:
        """Of all that is kept of one."""
        return self.matrices * self.row_bytes

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def measured_size(self) -> int:
        return self.trained_size - self.projected_size if self.projected_size else 0

    @property
    def measured_cols(self) -> int:
        """Of the vocabulary, at most, that a product in backward spans; all unless columns of the
        weight's gradient are measured, for which it lies in memory a slab at a time."""
        whole = max(1, self.vocab_size)
        if not self.measured_size:
            return whole
        column = self.trained_size * statistics_dtype(self.dtype).itemsize
        return min(whole, max(1, MEASURED_BYTES // column))

    @property
    def needs_grad(self) -> bool:
        return self.needs_hidden or self.needs_weight or self.needs_bias

    @property
    def slab_bytes(self) -> int:
        """Of the weight's gradient, a column of the vocabulary: 16-bit products of several groups
        of rows add up in float32."""
        exact = statistics_dtype(self.dtype).itemsize
        return self.trained_size * exact if self.needs_weight and self.itemsize < exact else 0


@dataclass(frozen=True, kw_only=True)
class Plan(Problem):
    """A schedule for a problem, with its sizes and cost. What ``explain`` returns.

    - ``schedule``: "score", "direct", "keep", "keep/recompute" or "recompute".
    - ``kept_rows``: rows whose exponentials live until backward.
    - ``forward_tile``: rows and columns of one product of the forward pass.
    - ``backward_tile``: the same of backward; None where that need not recompute.
    - ``memory_budget``: bytes for tiles and kept exponentials.
    - ``budget_from``: where that comes from, in words.
    """

    schedule: str
    kept_rows: int
    forward_tile: Tile
    backward_tile: Tile | None
    memory_budget: int
    budget_from: str = field(compare=False)

    def of_rows(self, scored: int) -> Problem:
        """The problem with another number of rows."""
        same = {one.name: getattr(self, one.name) for one in fields(Problem)}
        return Problem(**same | {"scored": scored})

    @property
    def sizes(self) -> tuple[int, Tile, Tile | None]:
        """What depends on the budget."""
        return self.kept_rows, self.forward_tile, self.backward_tile

    @functools.cached_property
    def chunks(self) -> tuple[slice, ...]:
        """Rows of the forward pass. Kept ones in one chunk, so that their product is one, unless
        there is a second model, whose tile lies beside them; no rows still make one chunk, empty,
        for its dtypes."""
        whole = self.kept_rows if not self.partner_size else self.forward_tile.rows
        kept = split(0, self.kept_rows, whole)
        others = split(self.kept_rows, self.scored, self.forward_tile.rows)
        return (*kept, *others) or (slice(0, 0),)

    def backward_room(self, rows: int, vocab_size: int, held: int, beside: bool) -> Tile:
        """What rows that must be copied or formed again are worked through in, most of them
        ``rows``, while the exponentials of ``held`` rows are in memory; ``beside`` says whether
        their products add up with those of rows that are read in place or copied."""
        if self.partner_size:
            return Tile(self.forward_tile.rows, vocab_size)
        budget = tile_budget(self, self.memory_budget) - held * vocab_size * self.itemsize
        slab_bytes = self.slab_bytes if beside else 0
        return recompute_tile(rows, vocab_size, self.itemsize, budget, slab_bytes)

    @property
    def products(self) -> tuple[Product, ...]:
        """All there are, for a gradient at logp; one at entropy or lse, or under a cap at
        mean_logits, projects every row again."""
        partner = self.partner_size / self.hidden_size
        found = [Product("forward", "logits", 1 + partner)]
        if self.schedule == "direct":
            found.append(Product("forward", "hidden", float(self.matrices)))
        elif self.needs_grad:
            again = self.active * (1 - self.kept_rows / max(1, self.scored))
            logits = 1 + partner * (self.formed_again - 1)
            found.append(Product("backward", "logits", again * logits))
            if self.needs_hidden:
                found.append(Product("backward", "hidden", self.active))
            if self.needs_weight:
                share = self.active * self.trained_size / self.hidden_size
                found.append(Product("backward", "weight", share))
        return tuple(found)

    @property
    def forward_units(self) -> float:
        return sum(one.units for one in self.products if one.when == "forward")

    @property
    def backward_units(self) -> float:
        return sum(one.units for one in self.products if one.when == "backward")

    @property
    def units(self) -> float:
        """Cost in u, one u being a product of 2 N H V flop."""
        return self.forward_units + self.backward_units

    @property
    def saved_bytes(self) -> int:
        """Held from forward to backward, beside the arguments."""
        exact = statistics_dtype(self.dtype).itemsize
        held = 7 * self.scored * exact + self.kept_rows * self.kept_row_bytes
        if self.schedule == "direct":
            held += self.matrices * self._row_bytes
        if self.copies_weight:
            held += self.vocab_size * self.hidden_size * self.itemsize
        if self.copies_partner:
            held += self.vocab_size * self.partner_size * self.itemsize
        return held

    @property
    def workspace_bytes(self) -> int:
        """Working memory at its peak, ``saved_bytes`` included, results and gradients not."""
        tile = 0
        if self.schedule == "direct" or (self.scores_in_tiles and self.schedule != "keep"):
            tile = self.models * self.forward_tile.nbytes(self.itemsize)
        elif self.partner_size:
            tile = self.forward_tile.nbytes(self.itemsize)
        partner = self.scored * self.partner_size * self.itemsize
        room = self._blocks_bytes
        forward = self._row_bytes + partner + self.temporary_bytes + room + tile
        if not self.needs_grad or self.schedule == "direct":
            return self.saved_bytes + forward
        # Packed rows, those with a gradient, the same scaled, and their gradient.
        backward = 4 * self._row_bytes + partner
        again = self.backward_tile
        if again is None:
            # A gradient at entropy or lse, or rows without any, make kept rows pass through a tile.
            # A GPU's host cannot look for such rows.
            kept = self.kept_rows * self.vocab_size * self.itemsize
            spare = tile_budget(self, self.memory_budget) - kept
            again = Tile(0, self.vocab_size)
            if self.device_type == "cpu" or not self.only_logp:
                again = recompute_tile(self.scored, self.vocab_size, self.itemsize, spare)
        backward += self.models * again.nbytes(self.itemsize) + self.temporary_bytes + room
        backward += self._sum_bytes(again) + self._basis_bytes
        if self.needs_bias:
            # Kept rows are summed where they lie, whole.
            shape = max(again.rows, self.kept_rows), self.vocab_size
            backward += column_sums.temporary_bytes(*shape, self.device_type, self.dtype)
        return self.saved_bytes + max(forward, backward)

    @property
    def _basis_bytes(self) -> int:
        """Of a basis: its columns, rows projected on them, scaled too, the gradient before it is
        added to the caller's, and a slab of what is measured."""
        if not self.projected_size or not self.needs_weight:
            return 0
        exact = statistics_dtype(self.dtype).itemsize
        rows = 2 * self.scored * self.trained_size * self.itemsize
        columns = 2 * self.hidden_size * self.trained_size * self.itemsize
        slab = self.measured_cols * self.trained_size * exact if self.measured_size else 0
        return rows + columns + self.vocab_size * self.projected_size * exact + 2 * slab

    def _sum_bytes(self, tile: Tile) -> int:
        """Of products that add up in float32: those of 16 bits over slabs and row groups, and the
        gradient of a weight in another dtype."""
        exact = statistics_dtype(self.dtype).itemsize
        sums, products = 0, [0]
        cols = min(tile.cols, self.measured_cols)
        if self.needs_hidden and self.itemsize < exact and cols < self.vocab_size:
            sums += self.scored * self.hidden_size * exact
            products.append(self._row_bytes)
        several = 0 < self.kept_rows < self.scored or tile.rows < self.scored - self.kept_rows
        if several and self.slab_bytes:
            sums += tile.cols * self.slab_bytes
            products.append(tile.cols * self.trained_size * self.itemsize)
        if self.needs_weight and self.copies_weight:
            products.append(tile.cols * self.trained_size * self.itemsize)
        return sums + min(max(products), PRODUCT_BYTES)

    @functools.cached_property
    def product_room(self) -> int:
        """Bytes in which products are formed in float32; 0 where they run in their own dtype."""
        return room_bytes(self.memory_budget) if self.widens else 0

    @property
    def _blocks_bytes(self) -> int:
        """Of it, what the largest product fills."""
        inner = max(self.hidden_size, self.partner_size)
        rows, vocab = self.scored, self.vocab_size
        each = rows * vocab, inner * rows, inner * vocab
        return min(
            self.product_room, statistics_dtype(self.dtype).itemsize * (sum(each) + max(each))
        )

    @property
    def _row_bytes(self) -> int:
        return self.scored * self.hidden_size * self.itemsize

    def __str__(self) -> str:
        names = ("hidden", "weight", "bias")
        needed = (self.needs_hidden, self.needs_weight, self.needs_bias)
        gradients = [name for name, need in zip(names, needed, strict=True) if need]
        return (
            f"{self.schedule} on {self.backend}: {self.units:.2f}u "
            f"({self.forward_units:.2f} forward, {self.backward_units:.2f} backward), "
            f"workspace {self.workspace_bytes / MEBIBYTE:.1f} MiB "
            f"(budget {self.memory_budget / MEBIBYTE:.1f} MiB, {self.budget_from}), "
            f"{self.kept_rows} of {self.scored} rows kept, "
            f"gradients: {', '.join(gradients) or 'none'}"
            f"{in_float32(self)}"
        )


def in_float32(plan: Plan) -> str:
    name = str(plan.dtype).removeprefix("torch.")
    return f", {name} products in float32 blocks" if plan.widens else ""


GIVEN = "memory_budget"
SHARE = "a sixteenth of the device's memory"
RAN_OUT = "after memory ran out"


def choose(problem: Problem, options: ScoringOptions) -> Plan:
    """The plan for ``problem``. Raises ValueError where ``options.schedule`` cannot serve it."""
    if options.schedule == "batches":
        raise ValueError(
            "schedule='batches' needs to know the objective; call fastpref.preference_loss with it"
        )
    budget = memory_budget(problem, options)
    source = SHARE if options.memory_budget is None else GIVEN
    chosen = _choice_of_two if problem.partner_size else _choice
    schedule, kept, forward, backward = chosen(problem, tile_budget(problem, budget), options)
    given = {one.name: getattr(problem, one.name) for one in fields(Problem)}
    if problem.partner_size:
        # Of the rows that are compared at a time.
        given["temporary_bytes"] = divergences.temporary_bytes(
            *forward,
            problem.device_type,
            problem.dtype,
            problem.backend,
            problem.mixes,
            problem.sharded,
        )
        if problem.matrices > 1 or problem.directed:
            given["temporary_bytes"] += scaled.temporary_bytes(problem.dtype)
    return Plan(
        **given,
        schedule=schedule,
        kept_rows=kept,
        forward_tile=forward,
        backward_tile=backward,
        memory_budget=budget,
        budget_from=source,
    )


def _choice(
    problem: Problem, budget: int, options: ScoringOptions
) -> tuple[str, int, Tile, Tile | None]:
    """Schedule, kept rows, and the tiles of both passes."""
    if not problem.needs_grad:
        return "score", 0, _score_tile(problem, budget, options), None
    if options.schedule == "direct" and (
        problem.needs_weight or problem.needs_bias or not problem.only_logp
    ):
        raise ValueError(
            "schedule='direct' forms d logp / d hidden in the forward pass: it needs a weight and "
            "bias without gradient and neither entropy nor lse among outputs (under a softcap, nor "
            "mean_logits); use schedule='auto'"
        )
    frozen = not (problem.needs_weight or problem.needs_bias)
    if frozen and problem.only_logp and options.schedule in ("auto", "direct"):
        tile = _forward_tile(problem, budget, options)
        if tile.cols == problem.vocab_size:
            return "direct", 0, tile, None
        if options.schedule == "direct":
            whole_rows = max(LEAST_ROWS, budget // problem.row_bytes)
            rows = min(max(1, problem.scored), whole_rows)
            return "direct", 0, Tile(rows, problem.vocab_size), None
    kept = 0 if options.schedule == "recompute" else rows_to_keep(problem, budget)
    if kept >= problem.scored:
        whole = Tile(problem.scored, problem.vocab_size)
        return "keep", problem.scored, whole, None
    kept -= kept % LEAST_ROWS
    left = budget - kept * problem.row_bytes
    forward = _score_tile(problem, left, options)
    slab_bytes = problem.slab_bytes if kept else 0
    backward = recompute_tile(
        problem.scored - kept, problem.vocab_size, problem.itemsize, left, slab_bytes
    )
    return "keep/recompute" if kept else "recompute", kept, forward, backward


def _choice_of_two(
    problem: Problem, budget: int, options: ScoringOptions
) -> tuple[str, int, Tile, Tile | None]:
    """As ``_choice``, of two models side by side: their tiles hold whole rows, and lie beside kept
    rows in a quarter of the budget."""
    trains = problem.needs_weight or problem.needs_bias
    if options.schedule == "direct" and trains:
        raise ValueError(
            "schedule='direct' does not serve two heads, of which one is trained; use "
            "schedule='auto', 'keep' or 'recompute'"
        )
    # Of two matrices each has a product with the weight in a direct pass, their sum one.
    keeps = problem.needs_grad and (trains or problem.matrices > 1)
    keeps = keeps and options.schedule != "direct"
    wanted = most_chunk_rows(problem, options.chunk_rows)
    share = budget // 4 if keeps else budget
    tile = Tile(min(wanted, max(LEAST_ROWS, share // (2 * problem.row_bytes))), problem.vocab_size)
    if not keeps:
        return "direct" if problem.needs_grad else "score", 0, tile, None
    kept = problem.scored if problem.directed else 0
    if not problem.directed and options.schedule != "recompute":
        left = budget - 2 * tile.nbytes(problem.itemsize)
        kept = min(problem.scored, max(0, left) // problem.kept_row_bytes)
    if kept >= problem.scored:
        return "keep", kept, tile, tile
    if not trains and options.schedule == "auto":
        return "direct", 0, tile, None
    return "keep/recompute" if kept else "recompute", kept, tile, tile


def memory_budget(problem: Problem, options: ScoringOptions) -> int:
    return options.memory_budget or problem.total_memory // BUDGET_SHARE


def tile_budget(problem: Problem, budget: int) -> int:
    """What is left of a budget beside the room of products. Ranks that share a vocabulary must cut
    their rows alike, whatever processors they have: there it lies on top."""
    if not problem.widens or problem.sharded:
        return budget
    return max(1, budget - room_bytes(budget))


def less(plan: Plan, keep: bool = True) -> Plan | None:
    """The plan to follow where memory ran out under ``plan``; None where that is the least.

    Args:
        keep: whether exponentials may be kept; not in backward, where those of the forward pass are
            given back and their rows recomputed.
    """
    tiles = (tile.nbytes(plan.itemsize) for tile in plan.sizes[1:] if isinstance(tile, Tile))
    budget = plan.kept_rows * plan.kept_row_bytes + plan.models * max(
        tiles
    )  # at most this was taken
    schedule: Schedule = "auto" if plan.schedule == "direct" else "keep"
    if not keep or plan.schedule == "recompute":
        schedule = "recompute"
    while budget > 1:
        budget = max(1, budget // SHORTAGE)
        options = ScoringOptions(
            schedule=schedule, memory_budget=budget, chunk_rows=plan.forward_tile.rows
        )
        found = replace(choose(plan.of_rows(plan.scored), options), budget_from=RAN_OUT)
        if found.sizes != plan.sizes:
            return found
    return None


def rows_to_keep(problem: Problem, budget: int) -> int:
    """Rows of exponentials that ``budget`` holds. A quarter stays free for a wide tile: rows to
    recompute, or the kept rows that have a gradient at all."""
    return max(0, budget - budget // 4) // problem.kept_row_bytes


def _score_tile(problem: Problem, budget: int, options: ScoringOptions) -> Tile:
    """Of rows that are scored and not kept. Without products in memory, what bounds them is the
    backend's temporaries."""
    if problem.scores_in_tiles:
        if problem.sharded and options.chunk_rows is None:
            # Ranks meet once a tile of rows: cut columns instead.
            return recompute_tile(problem.scored, problem.vocab_size, problem.itemsize, budget)
        return _forward_tile(problem, budget, options)
    row_bytes = max(1, problem.temporary_bytes // max(1, problem.scored))
    rows = min(most_chunk_rows(problem, options.chunk_rows), max(LEAST_ROWS, budget // row_bytes))
    return Tile(rows, max(1, problem.vocab_size))


def most_chunk_rows(problem: Problem, asked: int | None = None) -> int:
    """Of a chunk, whatever the budget, which alone bounds it on a GPU."""
    most = asked or problem.scored
    if problem.device_type == "cpu":
        most = min(most, MOST_CHUNK_ROWS)
    return max(1, min(most, problem.scored))


def _forward_tile(problem: Problem, budget: int, options: ScoringOptions) -> Tile:
    """Whole rows when the budget holds enough of them, else fewer columns."""
    vocab, itemsize = max(1, problem.vocab_size), problem.itemsize
    wanted = most_chunk_rows(problem, options.chunk_rows)
    enough = min(wanted, FEWEST_GOOD_ROWS)
    if enough * vocab * itemsize <= budget:
        most = min(budget // (vocab * itemsize), most_chunk_rows(problem))
        return Tile(min(wanted, _even(problem.scored, most)), vocab)
    cols = _multiple(budget // (enough * itemsize), LEAST_COLS)
    rows = max(min(wanted, LEAST_ROWS), min(enough, budget // (cols * itemsize)))
    return Tile(rows, min(vocab, cols))


def _even(total: int, most: int) -> int:
    """The size of chunks no larger than ``most`` that split ``total`` most evenly."""
    chunks = max(1, math.ceil(total / max(1, most)))
    return math.ceil(max(1, total) / chunks)


def _multiple(value: int, of: int) -> int:
    return max(of, value - value % of)


def recompute_tile(
    rows: int, vocab_size: int, itemsize: int, budget: int, slab_bytes: int = 0
) -> Tile:
    """All ``rows`` at once where the budget holds them, so that each slab of dW is one product.

    ``slab_bytes`` a column lie beside the tile, where kept rows add up with these.
    """
    rows, vocab = max(1, rows), max(1, vocab_size)
    cols = budget // (rows * itemsize + slab_bytes)
    if cols < LEAST_COLS:
        cols = LEAST_COLS
        rows = max(min(rows, LEAST_ROWS), min(rows, budget // (cols * itemsize)))
    return Tile(rows, vocab if cols >= vocab else _multiple(cols, LEAST_COLS))
