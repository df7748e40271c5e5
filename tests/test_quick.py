# SPDX-License-Identifier: Apache-2.0
"""The sample of ``make test-quick``: what is heavy is left out, each value is there."""

import itertools
from types import SimpleNamespace
from typing import Any

from tests.quick import each_value_once, sample


def a_case(name: str, heavy: bool = False, **params: Any) -> Any:
    # Compared as pytest's items are: by identity.
    class Case(SimpleNamespace):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    marks = {"heavy": True} if heavy else {}
    given = {"callspec": SimpleNamespace(params=params)} if params else {}
    return Case(nodeid=f"{name}[{params}]", get_closest_marker=marks.get, **given)


def test_each_value_once_in_mixed_company() -> None:
    dtypes, backends, sizes = ("a", "b", "c", "d"), ("torch", "cpp"), ((1, 2), (3, 4), (5, 6))
    cases = [
        a_case("test", dtype=dtype, backend=backend, sizes=size)
        for dtype, backend, size in itertools.product(dtypes, backends, sizes)
    ]
    params = [case.callspec.params for case in each_value_once(cases)]
    assert len(params) == 4
    for name, values in (("dtype", dtypes), ("backend", backends), ("sizes", sizes)):
        assert {one[name] for one in params} == set(values)
    assert [one["backend"] for one in params].count("cpp") == 2


def test_each_test_is_sampled_by_itself_and_what_is_heavy_is_left_out() -> None:
    first = [a_case("first", dtype=dtype) for dtype in "ab"]
    plain, heavy = a_case("plain"), a_case("heavy", heavy=True)
    part = [a_case("part", heavy=dtype == "a", dtype=dtype) for dtype in "ab"]
    other = [a_case("other", dtype="a")]
    kept = list(sample([*first, plain, heavy, *part, *other]))
    assert kept == [*first, plain, part[1], *other]
