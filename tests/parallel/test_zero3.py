# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO-3 itself, on the CPU: gradients of one process with the whole batch. Not among
the pinned packages: ``DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8``."""

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.policies import (
    PAIRS,
    check,
    expected_gradients,
    make_policy,
    rows_of,
    whole_batch,
)
from tests.ranks import Ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.slow


def engine_of(rank: int, model: Any) -> Any:
    """Within the process group that is there."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import deepspeed

    # It would be compiled, for speed alone.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", dist_init_required=False)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def gradients_of(engine: Any, model: Any, loss: Tensor) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    engine.backward(loss)
    found = {name: safe_get_full_grad(value) for name, value in model.named_parameters()}
    found = {name: one.clone() for name, one in found.items() if one is not None}
    engine.step()
    return found


def plain(rank: int, split: int, settings: dict[str, bool]) -> None:
    policy = make_policy(**settings)
    engine = engine_of(rank, policy)
    part = rows_of(whole_batch(), *((0, split), (split, PAIRS))[rank])
    for _ in range(2):
        assert policy.head.weight.numel() == 0  # from the second forward on it stays until backward
        loss = engine(part, denominator=PAIRS / 2)
        found = gradients_of(engine, policy, loss)
    check(found, expected_gradients(**settings))


def causal_lm(rank: int, how: str, fields: dict[str, Any]) -> None:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from tests.integrations.causal_lm.models import make
    from tests.integrations.trl.test_sharded_heads import patch_of, put_head
    from tests.parallel import causal_lms as lms

    model = make(**fields)
    put_head(model, how)
    engine = engine_of(rank, model)
    # By which transformers and TRL know of it; it is alive as long as something refers to it.
    known = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    items = lms.count() / 2
    with patch_of(how):
        for _ in range(2):
            output = engine(**lms.own_part(rank), fused_lm_head=True, num_items_in_batch=items)
            found = gradients_of(engine, model, output.loss)
    del known
    check(found, lms.expected("llama", **fields))


@pytest.mark.parametrize("split", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"tied": True}, {"functional": True}], ids=str)
def test_a_plain_module(two_ranks: Ranks, split: int, settings: dict[str, bool]) -> None:
    two_ranks(plain, split, settings)


@pytest.mark.parametrize("how", ["patched", "fused"])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=["", "tied"])
def test_causal_lm(two_ranks: Ranks, how: str, fields: dict[str, Any]) -> None:
    two_ranks(causal_lm, how, fields)
