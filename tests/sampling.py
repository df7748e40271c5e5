# SPDX-License-Identifier: Apache-2.0
"""Which of the many cases of a test ``make test`` runs, and which ``make test-quick``.

Of a product of parameters those that have each value, in mixed company.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain

import pytest

MANY = 12  # cases that one test may have before some of them are a sweep's
MANY_HEAVY = 3  # of one whose every case is heavy


def sweep(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """What ``make test`` leaves to ``make test-slow``: of tests of many cases, drawn from two
    parameters or more, those beyond ``each_value``."""
    for cases in _by_test(item for item in items if item.get_closest_marker("slow") is None):
        heavy = all(case.get_closest_marker("heavy") is not None for case in cases)
        many = MANY_HEAVY if heavy else MANY
        if len(cases) > many and len(values_of(cases[0])) > 1:
            kept = {id(case) for case in each_value(cases)}
            yield from (case for case in cases if id(case) not in kept)


def sample(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """What ``make test-quick`` runs: all that are not heavy, and of the cases of a test those of
    ``each_value``."""
    light = (item for item in items if item.get_closest_marker("heavy") is None)
    return chain.from_iterable(map(each_value, _by_test(light)))


def _by_test(items: Iterable[pytest.Item]) -> Iterable[list[pytest.Item]]:
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    return cases.values()


def each_value(cases: list[pytest.Item]) -> list[pytest.Item]:
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
