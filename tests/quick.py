# SPDX-License-Identifier: Apache-2.0
"""Which tests ``make test-quick`` runs."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain

import pytest


def sample(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """All that are not heavy, and of the cases of a test those of ``each_value_once``."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("heavy") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    return chain.from_iterable(map(each_value_once, cases.values()))


def each_value_once(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Few cases of one test that have each value of each parameter, in mixed company."""
    values = {case: values_of(case) for case in cases}
    wanted, used, kept = set(chain(*values.values())), Counter[tuple[str, ...]](), []

    def worth(case: pytest.Item) -> tuple[int, int]:
        return len(wanted & values[case]), -sum(used[value] for value in values[case])

    while wanted:
        best = max(cases, key=worth)
        kept.append(best)
        wanted.difference_update(values[best])
        used.update(values[best])
    return kept


def values_of(case: pytest.Item) -> set[tuple[str, ...]]:
    if not hasattr(case, "callspec"):
        return {()}
    return {(name, repr(value)) for name, value in case.callspec.params.items()}
