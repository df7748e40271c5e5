# SPDX-License-Identifier: Apache-2.0
"""The policy, a batch of pairs, and what the reference says of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from tests.integrations.other_trainers.stand_ins import (
    Batch,
    make_batch,
    make_model,
    plain_log_probs,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return fastpref.fuse_lm_head(make_model())


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch()


@pytest.fixture(scope="module")
def reference_tokens(batch: Batch) -> Tensor:
    """(2 P, T - 1) log-probabilities."""
    with torch.no_grad():
        return plain_log_probs(make_model(seed=1), batch)


@pytest.fixture(scope="module")
def reference(reference_tokens: Tensor) -> Tensor:
    """(2 P,) sums."""
    return reference_tokens.sum(-1)
