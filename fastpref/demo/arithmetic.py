# SPDX-License-Identifier: Apache-2.0
"""Arithmetic word problems, each with a right and a wrong worked answer: the demo's preference set.

A right answer does the steps that the question asks for and ends with the result of the last one.
A wrong answer is worded alike, makes the mistake that is typical of its kind of problem
(`MISTAKES`) and ends with another number. So the text alone does not say which of the two habits is
wanted, a preference does, and both halves of every pair can be checked.

The set is a pure function of its seed. Only ``random.Random.random`` is drawn from, whose sequence
Python guarantees across versions, so it is not shipped but made where it is asked for.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

from .words import ADJECTIVES, BOXES, FIRST_STEPS, ITEMS, NAMES, NEXT_STEPS, PLACES, WORDINGS

NAME = "arithmetic"
PAIRS = 1150
SEED = 20

# The mistake a wrong answer makes, by the kind of problem, and the line it is made in.
MISTAKES: Mapping[str, tuple[str, int]] = {
    "gain": ("slip", 0),
    "loss": ("slip", 0),
    "groups": ("operation", 0),
    "share": ("operation", 0),
    "difference": ("operation", 0),
    "gain_loss": ("answer", 1),
    "groups_gain": ("early", 1),
    "groups_loss": ("slip", 0),
    "together": ("early", 1),
    "change": ("operation", 0),
}

_SWAPPED = {"+": "-", "-": "+", "x": "+", "/": "-"}
_COMPUTE: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "x": lambda left, right: left * right,
    "/": lambda left, right: left // right,
}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a worked answer; an operand None stands for the result of the line before."""

    left: int | None
    operation: str
    right: int | None
    slip: int = 0

    def operands(self, previous: int) -> tuple[int, int]:
        """Both operands, given the result of the line before."""
        left = previous if self.left is None else self.left
        return left, previous if self.right is None else self.right

    def run(self, previous: int) -> tuple[str, int]:
        """The line as an equation, and its result."""
        left, right = self.operands(previous)
        result = _COMPUTE[self.operation](left, right) + self.slip
        return f"{left} {self.operation} {right} = {result}", result


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, the steps that answer it, and the noun of the answer."""

    question: str
    steps: tuple[Step, ...]
    noun: str


def pick(random: Random, choices: Sequence[_T]) -> _T:
    """One of `choices`, by a draw that is the same in every Python version."""
    return choices[int(random.random() * len(choices))]


def _number(random: Random, low: int, high: int) -> int:
    return low + int(random.random() * (high - low + 1))


def _steps(random: Random, kind: str) -> tuple[dict[str, int], tuple[Step, ...]]:
    """The numbers of a problem in the order of its text, and what is to be done with them."""
    small, each = _number(random, 2, 9), _number(random, 2, 9)
    a, b = _number(random, 11, 30), _number(random, 2, 9)
    product = small * each
    lost = _number(random, 1, min(10, product - 1))
    purse = product + _number(random, 1, 20)
    times = Step(small, "x", each)
    table: dict[str, tuple[tuple[int, ...], tuple[Step, ...]]] = {
        "gain": ((a, b), (Step(a, "+", b),)),
        "loss": ((a, b), (Step(a, "-", b),)),
        "groups": ((small, each), (times,)),
        "share": ((product, each), (Step(product, "/", each),)),
        "difference": ((a, b), (Step(a, "-", b),)),
        "gain_loss": ((a, b, small), (Step(a, "+", b), Step(None, "-", small))),
        "groups_gain": ((small, each, b), (times, Step(None, "+", b))),
        "groups_loss": ((small, each, lost), (times, Step(None, "-", lost))),
        "together": ((a, b), (Step(a, "+", b), Step(a, "+", None))),
        "change": ((purse, small, each), (times, Step(purse, "-", None))),
    }
    numbers, steps = table[kind]
    return dict(zip("abc", numbers, strict=False)), steps


def make_problem(random: Random, kind: str) -> Problem:
    """A problem of a kind (a key of `MISTAKES`), with random people, things and numbers."""
    name = pick(random, NAMES)
    other = pick(random, [person for person in NAMES if person != name])
    noun = pick(random, ITEMS)
    numbers, steps = _steps(random, kind)
    question = pick(random, WORDINGS[kind]).format(
        name=name,
        other=other,
        items=f"{pick(random, ADJECTIVES)} {noun}",
        box=pick(random, BOXES),
        place=pick(random, PLACES),
        **numbers,
    )
    return Problem(question, steps, "coins" if kind == "change" else noun)


def work(steps: Sequence[Step]) -> tuple[list[str], int]:
    """The equations of `steps`, and the result of the last one."""
    lines, result = [], 0
    for step in steps:
        line, result = step.run(result)
        lines.append(line)
    return lines, result


def _slip(step: Step, previous: int) -> int:
    """What is missed by not carrying or borrowing a ten, or by counting one group too few."""
    left, right = step.operands(previous)
    if step.operation == "+":
        return -10 if left % 10 + right % 10 >= 10 else 0
    if step.operation == "-":
        return 10 if left % 10 < right % 10 else 0
    return -right


def _spoil(steps: tuple[Step, ...], mistake: str, at: int) -> tuple[list[str], int]:
    """The equations of `steps` with `mistake` made in line `at`, and the number then stated."""
    before = work(steps[:at])[1]
    if mistake == "early":
        return work(steps[:at])
    if mistake == "answer":
        return work(steps)[0], before
    if mistake == "operation":
        step = replace(steps[at], operation=_SWAPPED[steps[at].operation])
    else:
        step = replace(steps[at], slip=_slip(steps[at], before))
    return work((*steps[:at], step, *steps[at + 1 :]))


def _write(openings: Sequence[str], lines: Sequence[str], answer: int, noun: str) -> str:
    worked = [f"{opening} {line}." for opening, line in zip(openings, lines, strict=False)]
    return " ".join([*worked, f"Answer: {answer} {noun}"])


def make_pair(random: Random) -> dict[str, Any]:
    """One problem as ``{"prompt", "chosen", "rejected", "reward_margin"}``, of which the last says
    how far off the wrong answer is: log(1 + |wrong - right|)."""
    kind = pick(random, tuple(MISTAKES))
    openings = (pick(random, FIRST_STEPS), pick(random, NEXT_STEPS))
    while True:
        problem = make_problem(random, kind)
        lines, right = work(problem.steps)
        spoiled, wrong = _spoil(problem.steps, *MISTAKES[kind])
        # Without a ten to carry there is no slip, and 2 x 2 is 2 + 2: draw other numbers.
        if wrong != right and min(int(line.split("= ")[1]) for line in spoiled) >= 0:
            return {
                "prompt": problem.question + "\n",
                "chosen": _write(openings, lines, right, problem.noun),
                "rejected": _write(openings, spoiled, wrong, problem.noun),
                "reward_margin": round(math.log1p(abs(wrong - right)), 4),
            }


def make_pairs(count: int = PAIRS, seed: int = SEED) -> list[dict[str, Any]]:
    """`count` pairs with different prompts; a longer list starts with the shorter one."""
    random = Random(seed)
    pairs: dict[str, dict[str, Any]] = {}
    while len(pairs) < count:
        pair = make_pair(random)
        pairs.setdefault(pair["prompt"], pair)
    return list(pairs.values())


def to_jsonl(pairs: Sequence[Mapping[str, Any]]) -> str:
    """`pairs` as JSON Lines."""
    return "".join(json.dumps(pair) + "\n" for pair in pairs)
