# SPDX-License-Identifier: Apache-2.0
"""What a call on the rows tier is predicted to take on a GPU, from counts alone: bytes and
instructions a logit, launches, and rates that are assumed.

    a pass over the logits takes the longer of its bytes and its instructions
    a call takes its products, its passes, what it reads and writes of (N, H), and its launches
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

ROWS = 8192  # N


class Card(NamedTuple):
    """Rates that are reached, not those of the data sheet."""

    name: str
    flops: float  # a second, of a product in 16 bits
    bytes: float  # a second, read and written
    instructions: float  # a second, of single threads


_ISSUE = 132 * 128 * 1.7e9  # multiprocessors, lanes of each, clock
CARDS = (Card("H100", 700e12, 3.0e12, _ISSUE), Card("H200", 700e12, 4.3e12, _ISSUE))
LAUNCH_SECONDS = 3e-6  # of a small kernel, with the gap to the next
HEADS = ((4096, 128256), (2048, 128256), (896, 151936))  # H, V


# Of a pass, by its kernel: the logits' elements read and written.
PASSES = {
    "exp_rows": (1, 0),
    "exp_rows statistics": (1, 0),
    "exp_rows write": (1, 1),
    "exp_rows write statistics": (1, 1),
    "join_shares write": (1, 1),
    "join_shares write statistics": (1, 1),
    "logit_grad_rows": (1, 1),
}


class Call(NamedTuple):
    """``kept``: the forward pass keeps exponentials; ``statistics``: with TRL's outputs."""

    name: str
    kept: bool = False
    statistics: bool = False
    recomputed: bool = False

    def kernels(self, element: str) -> list[str]:
        """Triton's, that a first call compiles: the tile of its probe is one of few rows, which are
        split and joined."""
        suffix = " statistics" * self.statistics
        # Halves are written once the sums are known.
        halves = element == "fp16"
        return [
            "target_logits",
            "exp_rows" + " write" * (self.kept and not halves) + suffix,
            "join_shares" + " write" * self.kept + suffix,
            "row_scores" + " store" * self.kept + suffix,
            *(["scale_rows"] if self.kept else []),
            *(["logit_grad_rows"] if self.recomputed else []),
        ]

    def passes(self, element: str) -> list[str]:
        """Those of ``kernels`` that go over all logits of a call with many rows."""
        joined = self.kept and element == "fp16"
        return [
            one
            for one in self.kernels(element)
            if one in PASSES and (joined or not one.startswith("join_shares"))
        ]

    @property
    def launched(self) -> list[str]:
        """Names of its parts in launches.py."""
        if self.recomputed:
            return ["no gradient", "recomputed, backward"]
        forward = "exponentials kept" if self.kept else "no gradient"
        parts = [forward + ", TRL's outputs" * self.statistics]
        return [*parts, "exponentials kept, backward"] if self.kept else parts


CALLS = (
    Call("no gradient"),
    Call("no gradient, with statistics", statistics=True),
    Call("exponentials kept", kept=True),
    Call("exponentials kept, with statistics", kept=True, statistics=True),
    Call("recomputed gradient", recomputed=True),
)


@dataclass(frozen=True)
class Counts:
    """Of a call, forward and backward, on one chip."""

    call: Call
    element: str
    registers: int  # most of a pass
    instructions: tuple[float, ...]  # a logit, of each pass
    read: int  # bytes a logit
    written: int
    launches: int  # Triton's and torch's
    triton_launches: int
    forward_launches: int
    compile_seconds: float

    def plain(self) -> dict[str, object]:
        """For JSON."""
        fields = {name: value for name, value in vars(self).items() if name != "call"}
        return {"call": self.call.name} | fields


def counts(
    call: Call,
    element: str,
    compiled: Mapping[str, Mapping[str, float]],
    launched: Mapping[str, tuple[int, int]],
) -> Counts:
    """``compiled``: registers, row_loop and seconds by kernel; ``launched``: Triton's and torch's
    launches by the names of launches.py."""
    passes, size = call.passes(element), 4 if element == "fp32" else 2
    parts = [launched[name] for name in call.launched]
    return Counts(
        call,
        element,
        max(int(compiled[one]["registers"]) for one in passes),
        tuple(compiled[one]["row_loop"] for one in passes),
        size * sum(PASSES[one][0] for one in passes),
        size * sum(PASSES[one][1] for one in passes),
        sum(map(sum, parts)),
        sum(triton for triton, _ in parts),
        sum(parts[0]),
        round(sum(compiled[one]["seconds"] for one in call.kernels(element)), 2),
    )


class Aim(NamedTuple):
    name: str
    call: str
    products: int  # of them the bare ones
    most: tuple[float, float, float] | None  # ratio to the bare products, by head
    over_trl: float | None = None  # at H=4096, how many times as fast as TRL's head


AIMS = (
    Aim("1u", "no gradient", 1, (1.06, 1.12, 1.27)),
    Aim("2u", "exponentials kept", 2, (1.06, 1.10, 1.25)),
    Aim("3u", "exponentials kept", 3, (1.05, 1.09, 1.18)),
    Aim("TRL's call, 1u", "no gradient, with statistics", 1, (1.11, 1.17, 1.32)),
    Aim("TRL's call, 2u", "exponentials kept, with statistics", 2, (1.11, 1.15, 1.30), 1.45),
    Aim("TRL's call, 3u", "exponentials kept, with statistics", 3, (1.10, 1.14, 1.23), 1.3),
    Aim("recomputed, 4u", "recomputed gradient", 4, None),
)


def bare(card: Card, head: tuple[int, int], products: int) -> float:
    """Seconds of that many products."""
    return products * 2 * ROWS * head[0] * head[1] / card.flops


def seconds(card: Card, head: tuple[int, int], products: int, counted: Counts) -> float:
    """Of a call, in 16 bits."""
    width, vocab = head
    logits, states = ROWS * vocab, ROWS * width
    passes = counted.call.passes(counted.element)
    moving = 0.0
    for name, instructions in zip(passes, counted.instructions, strict=True):
        nbytes = 2 * sum(PASSES[name])
        moving += logits * max(nbytes / card.bytes, instructions / card.instructions)
    # The target's row of each matrix; (N, H) scaled before one product and after another.
    beside = states * (4 + 8 * counted.call.kept)
    if counted.call.statistics:
        # The mean row of the weight, and its product with the states, which are widened.
        beside += 2 * width * vocab + 10 * states
    launching = (counted.launches - products) * LAUNCH_SECONDS
    return bare(card, head, products) + moving + beside / card.bytes + launching


def trl_seconds(card: Card, head: tuple[int, int], products: int) -> float:
    """Of TRL 1.16's own head, which forms one product more, reads all logits, and in backward reads
    and writes them."""
    return bare(card, head, products + 1) + ROWS * head[1] * 6 / card.bytes


def predicted(found: Mapping[str, Counts]) -> Iterator[tuple[Aim, Card, list[float], float | None]]:
    """Milliseconds by head and, where that is aimed at, times TRL's head, of counts by call."""
    for aim in AIMS:
        for card in CARDS:
            all_seconds = [seconds(card, head, aim.products, found[aim.call]) for head in HEADS]
            times = None
            if aim.over_trl is not None:
                times = trl_seconds(card, HEADS[0], aim.products) / all_seconds[0]
            yield aim, card, [1e3 * one for one in all_seconds], times
