# SPDX-License-Identifier: Apache-2.0
"""The effects of the loops are no luck of one seed."""

import pytest
import torch

from tests.examples import test_loops

pytestmark = pytest.mark.slow
LOOPS = (
    test_loops.test_dno_rises_and_goes_beyond_its_first_samples,
    test_loops.test_curry_dpo_is_better_than_either,
    test_loops.test_dstc_learns_from_its_own_tests,
    test_loops.test_cofs_forgets_less,
    test_loops.test_search_finds_what_the_pairs_were_made_by,
)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda one: one.__name__)
def test_other_seeds(loop, seed, capsys, monkeypatch):
    if loop is test_loops.test_cofs_forgets_less:
        pytest.importorskip("peft", reason="peft is not installed")
    seeded = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda value: seeded(value + 1000 * seed))
    loop(capsys)
