# SPDX-License-Identifier: Apache-2.0
"""The pairs: the same everywhere, and checked by a solver that reads the questions."""

import hashlib
import math
import re

import pytest

from fastpref.demo.arithmetic import (
    MISTAKES,
    PAIRS,
    Step,
    make_pairs,
    to_jsonl,
    work,
)
from fastpref.demo.words import WORDINGS

# What a question asks for, by a phrase of it, of the numbers in the order of its text.
ASKED = {
    r"finds \d+ more|brings \d+ more|over \d+ more": lambda a, b: a + b,
    "are left": lambda a, b: a - b,
    "in all": lambda a, b: a * b,
    "go in each": lambda a, b: a / b,
    "How many more": lambda a, b: a - b,
    "remain": lambda a, b, c: a + b - c,
    "altogether": lambda a, b, c: a * b + c,
    "still whole": lambda a, b, c: a * b - c,
    "together[?]": lambda a, b: a + (a + b),
    "coins does": lambda a, b, c: a - b * c,
}
EQUATION = re.compile(r"(\d+) ([-+x/]) (\d+) = (\d+)")
MADE = make_pairs()


def solve(prompt: str) -> float:
    solvers = [
        f for phrase, f in ASKED.items() if re.search(rf"(?<!al){phrase}|\b{phrase}", prompt)
    ]
    assert len(solvers) == 1, prompt
    return solvers[0](*map(int, re.findall(r"\d+", prompt)))


def stated(completion: str) -> int:
    return int(re.search(r"Answer: (\d+) \w+$", completion)[1])


def holds(left: str, operation: str, right: str, result: str) -> bool:
    a, b, c = int(left), int(right), int(result)
    return {"+": a + b == c, "-": a - b == c, "x": a * b == c, "/": a == b * c}[operation]


def test_bytes_are_the_same_everywhere():
    """In every Python and on every machine: results of the demo can be compared."""
    found = hashlib.sha256(to_jsonl(MADE).encode()).hexdigest()
    assert found == "380c46adcb3bf4bcc0411bf2c59c482b9380e2c53caa2de43fda7a85f8d1d1ea"


def test_rounded_margins_are_far_from_a_tie():
    """log1p of a platform may be off in its last bits, and the fourth decimal be the same."""
    apart = {abs(stated(pair["chosen"]) - stated(pair["rejected"])) for pair in MADE}
    assert min(abs(math.log1p(one) * 1e4 % 1 - 0.5) for one in apart) > 1e-4


def test_every_chosen_answer_is_right():
    for pair in MADE:
        equations = EQUATION.findall(pair["chosen"])
        assert equations and all(holds(*equation) for equation in equations), pair
        assert int(equations[-1][3]) == stated(pair["chosen"]) == solve(pair["prompt"]), pair


def test_every_rejected_answer_is_wrong():
    for pair in MADE:
        assert stated(pair["rejected"]) != solve(pair["prompt"]), pair


def test_reward_margin_says_how_far_off_the_wrong_answer_is():
    for pair in MADE:
        apart = abs(stated(pair["chosen"]) - stated(pair["rejected"]))
        assert pair["reward_margin"] > 0
        assert pair["reward_margin"] == pytest.approx(math.log(1 + apart), abs=6e-5), pair


def test_both_answers_are_worded_alike():
    for pair in MADE:
        opening, noun = pair["chosen"].split(" ")[0], pair["chosen"].split(" ")[-1]
        assert pair["rejected"].split(" ")[0] == opening
        assert pair["rejected"].split(" ")[-1] == noun


def test_prompts_differ_and_every_kind_occurs_often():
    assert len({pair["prompt"] for pair in MADE}) == len(MADE) == PAIRS
    counts = [
        sum(re.search(rf"(?<!al){phrase}", pair["prompt"]) is not None for pair in MADE)
        for phrase in ASKED
    ]
    assert min(counts) > PAIRS / len(MISTAKES) / 2
    assert set(MISTAKES) == set(WORDINGS)


def test_longer_list_starts_with_the_shorter():
    assert make_pairs(20)[:8] == make_pairs(8)
    assert make_pairs(8, seed=1) != make_pairs(8)


@pytest.mark.parametrize(
    ("steps", "lines", "result"),
    [
        ([Step(14, "+", 9)], ["14 + 9 = 23"], 23),
        ([Step(3, "x", 4), Step(None, "-", 5)], ["3 x 4 = 12", "12 - 5 = 7"], 7),
        ([Step(3, "x", 4), Step(20, "-", None)], ["3 x 4 = 12", "20 - 12 = 8"], 8),
        ([Step(27, "/", 3, slip=1)], ["27 / 3 = 10"], 10),
    ],
)
def test_work_writes_and_computes_the_steps(steps, lines, result):
    assert work(steps) == (lines, result)
