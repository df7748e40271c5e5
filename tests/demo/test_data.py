# SPDX-License-Identifier: Apache-2.0
"""Reading preference pairs and lists: what is accepted, and what an error says."""

import json

import pytest

from fastpref import objectives
from fastpref.demo import DemoError, arithmetic
from fastpref.demo.data import MIN_EXAMPLES, Example, load, named, split
from fastpref.demo.objective import columns
from fastpref.objectives.signature import Domain

GOOD = {"prompt": "How?\n", "chosen": "so", "rejected": "not so"}
GOOD_LIST = {"prompt": "How?\n", "completions": ["a", "b", "c"], "rewards": [0, 2, -1.5]}


def write(path, lines):
    path.write_bytes(b"\n".join(line.encode() for line in lines) + b"\n")
    return path


def good_lines(count=MIN_EXAMPLES, good=GOOD, **fields):
    return [json.dumps({**good, **fields}) for _ in range(count)]


def error_of(tmp_path, line, names=None):
    """What is said of `line`, the fifth of a file that is otherwise good."""
    path = write(tmp_path / "d.jsonl", [*good_lines(3), "", line, *good_lines(9)])
    with pytest.raises(DemoError) as caught:
        load(path, names)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 5: ")
    assert "expected" in message or "needs" in message
    assert "\n" not in message
    return message


def test_reads_pairs_and_passes_over_blank_lines_and_other_fields(tmp_path):
    lines = [*good_lines(source="x"), "", "  ", json.dumps({**GOOD, "chosen": "é\n2"})]
    found = load(write(tmp_path / "d.jsonl", lines))
    assert len(found.examples) == MIN_EXAMPLES + 1 and found.undecided == 0
    first = found.examples[0]
    assert (first.prompt, first.chosen, first.rejected) == ("How?\n", "so", "not so")
    assert list(first.rewards) == [1.0, 0.0]
    assert found.examples[-1].chosen == "é\n2"


def test_reads_lists_of_any_length_among_pairs(tmp_path):
    longer = {**GOOD_LIST, "completions": ["d"] * 4, "rewards": [1, 3, 3, 1]}
    lines = [*good_lines(good=GOOD_LIST), json.dumps(longer), *good_lines(1)]
    examples = load(write(tmp_path / "d.jsonl", lines)).examples
    assert [len(example.completions) for example in examples] == [3] * MIN_EXAMPLES + [4, 2]
    assert examples[0] == Example("How?\n", ["a", "b", "c"], [0.0, 2.0, -1.5])


def test_pairs_of_lists_are_the_first_best_and_the_first_worst(tmp_path):
    ties = {**GOOD_LIST, "completions": list("abcde"), "rewards": [1, 0, 2, 0, 2]}
    pairs = load(write(tmp_path / "d.jsonl", good_lines(good=ties))).pairs().examples
    assert pairs[0] == Example.pair("How?\n", "c", "b")
    assert (pairs[0].best, pairs[0].worst) == (0, 1)


def test_lists_of_equal_rewards_are_left_out_and_counted(tmp_path):
    lines = [*good_lines(good=GOOD_LIST), *good_lines(3, good=GOOD_LIST, rewards=[1, 1, 1.0])]
    found = load(write(tmp_path / "d.jsonl", lines))
    assert (len(found.examples), found.undecided) == (MIN_EXAMPLES, 3)
    assert found.pairs().undecided == 3
    with pytest.raises(DemoError, match=r"9 examples, without 3 lists of equal rewards, expected"):
        load(write(tmp_path / "d.jsonl", lines[1:]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "chosen": "b"}', 'the field "rejected" is missing'),
        ('{"prompt": "a", "rejected": "b"}', 'the field "chosen" is missing'),
        ('{"chosen": "a", "rejected": "b"}', 'the field "prompt" is missing'),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', 'the field "rejected" is empty'),
        ('{"prompt": "a", "chosen": " \\n", "rejected": "c"}', 'the field "chosen" is empty'),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', 'the field "chosen" is a number'),
        ('{"prompt": [], "chosen": "b", "rejected": "c"}', 'the field "prompt" is a list'),
        ('{"prompt": "a", "chosen": "b", "rejec', "broken JSON"),
        ('["a", "b", "c"]', "found a JSON list"),
    ],
)
def test_bad_line_is_named_with_what_was_expected(tmp_path, line, said):
    assert said in error_of(tmp_path, line)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": " "}, 'the field "prompt" is empty'),
        ({"completions": "a"}, 'the field "completions" is a text'),
        ({"completions": ["a"], "rewards": [1]}, 'the list "completions" has 1 of them'),
        ({"completions": ["a", "b", "\n"]}, 'text 3 of "completions" is empty'),
        ({"completions": ["a", None, "c"]}, 'text 2 of "completions" is a null'),
        ({"rewards": None}, 'the field "rewards" is a null'),
        ({"rewards": [1, 0]}, 'the list "rewards" has 2 numbers for 3 completions'),
        ({"rewards": [1, 0, "2"]}, "number 3 of \"rewards\" is '2'"),
        ({"rewards": [True, 0, 1]}, 'number 1 of "rewards" is True'),
        ({"rewards": [0, float("nan"), 1]}, 'number 2 of "rewards" is nan'),
        ({"rewards": [0, 1, 10**400]}, 'number 3 of "rewards" is inf'),
    ],
)
def test_bad_list_is_named_with_what_was_expected(tmp_path, fields, said):
    assert said in error_of(tmp_path, json.dumps({**GOOD_LIST, **fields}))


def test_list_without_rewards_is_named(tmp_path):
    line = json.dumps({name: GOOD_LIST[name] for name in ("prompt", "completions")})
    assert 'the field "rewards" is missing' in error_of(tmp_path, line)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DemoError, match=r"line 2: not UTF-8"):
        load(path)


def test_without_a_file_it_is_arithmetic(tmp_path):
    lines = arithmetic.to_jsonl(arithmetic.make_pairs()).splitlines()
    assert load(None) == load(write(tmp_path / "d.jsonl", lines)) and named(None) == "arithmetic"
    with pytest.raises(DemoError, match='arithmetic, line 1: the field "score" is missing'):
        load(None, {"score": Domain()})


def test_too_few_pairs_and_unreadable_files(tmp_path):
    with pytest.raises(DemoError, match=f"9 examples, expected at least {MIN_EXAMPLES}"):
        load(write(tmp_path / "d.jsonl", good_lines(9)))
    with pytest.raises(DemoError, match="cannot be read"):
        load(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "is missing; the objective needs a number there that is > 0"),
        ({"reward_margin": "2"}, "is '2'; the objective needs"),
        ({"reward_margin": True}, "is True; the objective needs"),
        ({"reward_margin": 0}, "is 0.0; the objective needs a number there that is > 0"),
        ({"score_chosen": 1}, "is missing; the objective needs"),
        ({"score_chosen": 1, "score_rejected": 1}, "is 0.0; the objective needs"),
    ],
)
def test_column_of_an_objective_is_required_within_its_domain(tmp_path, fields, said):
    lines = good_lines(reward_margin=2)
    asked = columns(objectives.get("odpo"))
    found = load(write(tmp_path / "d.jsonl", lines), asked)
    assert found.examples[0].numbers == {"reward_margin": 2.0}
    path = write(tmp_path / "e.jsonl", [*lines, json.dumps({**GOOD, **fields})])
    with pytest.raises(DemoError) as caught:
        load(path, asked)
    assert f'{path}, line 11: the field "reward_margin" {said}' in str(caught.value)


def test_reward_margin_is_the_difference_of_the_scores_where_there_is_none(tmp_path):
    scores = {"score_chosen": 3, "score_rejected": 0.5}
    lines = [
        *good_lines(**scores),
        *good_lines(1, reward_margin=7, **scores),
        *good_lines(1, good=GOOD_LIST),
    ]
    examples = load(write(tmp_path / "d.jsonl", lines), {"reward_margin": Domain()}).examples
    margins = [example.numbers["reward_margin"] for example in examples]
    assert margins == [2.5] * MIN_EXAMPLES + [7.0, 3.5]


def test_score_that_is_no_number_is_named(tmp_path):
    line = json.dumps({**GOOD, "score_chosen": "high", "score_rejected": 0})
    path = write(tmp_path / "d.jsonl", [line])
    with pytest.raises(DemoError, match="line 1: the field \"score_chosen\" is 'high'"):
        load(path, {"reward_margin": Domain()})


def test_split_is_a_partition_that_the_seed_decides():
    examples = [Example.pair(str(n), "a", "b") for n in range(80)]
    train, held_out = split(examples, 0)
    assert len(held_out) == 10
    assert sorted(e.prompt for e in train + held_out) == sorted(e.prompt for e in examples)
    assert split(examples, 0) == (train, held_out)
    assert split(examples, 1) != (train, held_out)
    assert len(split(examples * 100, 0)[1]) == 150
