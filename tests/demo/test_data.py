# SPDX-License-Identifier: Apache-2.0
"""Reading preference pairs: what is accepted, and what an error says."""

import json

import pytest

from fastpref.demo import DemoError
from fastpref.demo.data import MIN_PAIRS, Pair, load_pairs, split

GOOD = {"prompt": "How?\n", "chosen": "so", "rejected": "not so"}


def write(path, lines):
    path.write_bytes(b"\n".join(line.encode() for line in lines) + b"\n")
    return path


def good_lines(count=MIN_PAIRS, **fields):
    return [json.dumps({**GOOD, **fields}) for _ in range(count)]


def test_reads_pairs_and_passes_over_blank_lines_and_other_fields(tmp_path):
    lines = [*good_lines(source="x"), "", "  ", json.dumps({**GOOD, "chosen": "é\n2"})]
    pairs = load_pairs(write(tmp_path / "d.jsonl", lines))
    assert len(pairs) == MIN_PAIRS + 1
    assert pairs[0] == Pair("How?\n", "so", "not so")
    assert pairs[-1].chosen == "é\n2"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "chosen": "b"}', 'the field "rejected" is missing'),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', 'the field "rejected" is empty'),
        ('{"prompt": "a", "chosen": " \\n", "rejected": "c"}', 'the field "chosen" is empty'),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', 'the field "chosen" is a number'),
        ('{"prompt": [], "chosen": "b", "rejected": "c"}', 'the field "prompt" is a list'),
        ('{"prompt": "a", "chosen": "b", "rejec', "broken JSON"),
        ('["a", "b", "c"]', "found a JSON list"),
    ],
)
def test_bad_line_is_named_with_what_was_expected(tmp_path, line, said):
    path = write(tmp_path / "d.jsonl", [*good_lines(3), "", line, *good_lines(9)])
    with pytest.raises(DemoError) as caught:
        load_pairs(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 5: ")
    assert said in message and "expected" in message and "\n" not in message


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DemoError, match=r"line 2: not UTF-8"):
        load_pairs(path)


def test_too_few_pairs_and_unreadable_files(tmp_path):
    with pytest.raises(DemoError, match=f"9 pairs, expected at least {MIN_PAIRS}"):
        load_pairs(write(tmp_path / "d.jsonl", good_lines(9)))
    with pytest.raises(DemoError, match="cannot be read"):
        load_pairs(tmp_path / "missing.jsonl")


def test_numbers_of_an_objective_are_read_and_required(tmp_path):
    path = write(tmp_path / "d.jsonl", good_lines(reward_margin=2))
    assert load_pairs(path, ["reward_margin"])[0].numbers == {"reward_margin": 2.0}
    for bad, said in [({}, "is missing"), ({"reward_margin": "2"}, "is '2'")]:
        path = write(tmp_path / "e.jsonl", [*good_lines(reward_margin=2), *good_lines(1, **bad)])
        with pytest.raises(DemoError, match=rf'line 11: the field "reward_margin" {said}'):
            load_pairs(path, ["reward_margin"])


def test_split_is_a_partition_that_the_seed_decides():
    pairs = [Pair(str(n), "a", "b") for n in range(80)]
    train, held_out = split(pairs, 0)
    assert len(held_out) == 10
    assert sorted(pair.prompt for pair in train + held_out) == sorted(p.prompt for p in pairs)
    assert split(pairs, 0) == (train, held_out)
    assert split(pairs, 1) != (train, held_out)
    assert len(split(pairs * 100, 0)[1]) == 150
