# SPDX-License-Identifier: Apache-2.0
"""The samples of ``make test`` and ``make test-quick``: each value is there, and what is heavy or a
sweep is left out."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.sampling import MANY, MANY_HEAVY, each_value, sample, sweep

ROOT = Path(__file__).resolve().parents[1]


def a_case(name: str, *marks: str, **params: Any) -> Any:
    # Compared as pytest's items are: by identity.
    class Case(SimpleNamespace):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    given = {"callspec": SimpleNamespace(params=params)} if params else {}
    return Case(
        nodeid=f"{name}[{params}]", get_closest_marker=dict.fromkeys(marks, True).get, **given
    )


DTYPES, BACKENDS, SIZES = ("a", "b", "c", "d"), ("torch", "cpp"), ((1, 2), (3, 4), (5, 6))


def product(*marks: str) -> list[Any]:
    return [
        a_case("test", *marks, dtype=dtype, backend=backend, sizes=size)
        for dtype, backend, size in itertools.product(DTYPES, BACKENDS, SIZES)
    ]


def test_each_value_once_in_mixed_company() -> None:
    params = [case.callspec.params for case in each_value(product())]
    assert len(params) == 4
    for name, values in (("dtype", DTYPES), ("backend", BACKENDS), ("sizes", SIZES)):
        assert {one[name] for one in params} == set(values)
    assert [one["backend"] for one in params].count("cpp") == 2


def test_each_test_is_sampled_by_itself_and_what_is_heavy_is_left_out() -> None:
    first = [a_case("first", dtype=dtype) for dtype in "ab"]
    plain, heavy = a_case("plain"), a_case("heavy", "heavy")
    part = [a_case("part", *["heavy"] * (dtype == "a"), dtype=dtype) for dtype in "ab"]
    other = [a_case("other", dtype="a")]
    kept = list(sample([*first, plain, heavy, *part, *other]))
    assert kept == [*first, plain, part[1], *other]


def test_what_is_beyond_the_sample_of_many_is_a_sweep() -> None:
    few, many = product()[:MANY], product()
    assert len(many) > MANY and not list(sweep(few))
    rest = list(sweep(many))
    assert len(rest) + len(each_value(many)) == len(many)
    assert not {id(one) for one in rest} & {id(one) for one in each_value(many)}
    heavy = [case for case in product("heavy") if case.callspec.params["sizes"] == (1, 2)]
    assert len(heavy) == 8 and len(list(sweep(heavy))) == 4
    assert not list(sweep(heavy[:MANY_HEAVY]))
    assert not list(sweep([*heavy, a_case("test", dtype="light")]))
    one_parameter = [a_case("one", number=number) for number in range(100)]
    assert not list(sweep(one_parameter))
    assert not list(sweep(product("slow")))


def test_what_needs_a_gpu_is_marked_and_no_target_of_all_tests_runs_it() -> None:
    for path in (ROOT / "tests" / "gpu").glob("test_*.py"):
        assert re.search(r"^pytestmark = pytest\.mark\.gpu$", path.read_text(), re.MULTILINE), path
    if not (ROOT / "Makefile").exists():
        pytest.skip("not run from a checkout")
    marks = re.findall(r'-m pytest -q.* -m ("[^"]*"|\S+)', (ROOT / "Makefile").read_text())
    assert len(marks) == 3 and all("not gpu" in one for one in marks), marks
