# SPDX-License-Identifier: Apache-2.0
"""A module whose forward calls preference_loss, within DDP, FSDP and FSDP2, on two ranks that have
different pairs: gradients of one process with the whole batch."""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo  # which DDP takes long to import, while its peer waits
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastpref import ScoringOptions
from tests.parallel import policies
from tests.parallel.policies import Batch, Policy, check, make_policy, rows_of, whole_batch
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy

# Of rank 0 from pair 0 on, of rank 1 up to the last, which has no scored token.
EVEN, UNSCORED, EMPTY = 2, 3, 4
PLACE: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}


class Case(NamedTuple):
    wrapper: str  # ddp, fsdp1, fsdp2
    head: str = "root"  # in the root's unit, or "alone", or "with norm"
    split: int = EVEN
    tied: bool = False
    functional: bool = False
    accumulated: int = 1
    offloaded: bool = False  # FSDP1's pins memory, which takes an accelerator
    low_precision: bool = False  # of parameters in forward and backward
    schedule: str = "auto"

    @property
    def settings(self) -> dict[str, bool]:
        return {"tied": self.tied, "functional": self.functional}


def wrapped(case: Case, policy: Policy) -> nn.Module:
    if case.wrapper == "ddp":
        return DistributedDataParallel(policy)
    if case.wrapper == "fsdp1":
        place = dict(PLACE)
        if case.low_precision:
            low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
            place["mixed_precision"] = MixedPrecision(**low)
        if case.head == "alone":
            policy.head = FullyShardedDataParallel(policy.head, **place)  # type: ignore[assignment]
        return FullyShardedDataParallel(policy, **place)
    how: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if case.offloaded:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if case.low_precision:
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if case.head == "alone":
        fully_shard(policy.head, **how)
    if case.head == "with norm":
        fully_shard([policy.norm, policy.head], **how)
    fully_shard(policy.layer, **how)
    fully_shard(policy, **how)
    return policy


def unsynchronised(module: Any, last: bool) -> AbstractContextManager[None]:
    """Within it, unless it is the last, gradients stay on their rank."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else module.no_sync()


def parts(batch: Batch, case: Case, rank: int) -> Iterator[Batch]:
    """What is accumulated on this rank."""
    start, stop = ((0, case.split), (case.split, policies.PAIRS))[rank]
    bounds = [start + (stop - start) * step // case.accumulated for step in range(case.accumulated)]
    for first, last in itertools.pairwise([*bounds, stop]):
        yield rows_of(batch, first, last)


def gradients_of(policy: Policy, module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module, with_grads=True):
            return {
                name.replace("_fsdp_wrapped_module.", ""): value.grad.clone()
                for name, value in module.named_parameters()
                if value.grad is not None
            }
    found = {name: value.grad for name, value in policy.named_parameters()}
    return {
        name: one.full_tensor() if isinstance(one, DTensor) else one
        for name, one in found.items()
        if one is not None
    }


def on_a_rank(rank: int, cases: list[Case]) -> None:
    batch = whole_batch()
    for case in cases:
        policy = make_policy(**case.settings)
        module = wrapped(case, policy)
        # A mean over ranks becomes one over pairs.
        given: dict[str, Any] = {"denominator": policies.PAIRS / dist.get_world_size()}
        given["options"] = ScoringOptions(schedule=case.schedule)  # type: ignore[arg-type]
        for _ in range(2):
            module.zero_grad()
            for step, part in enumerate(parts(batch, case, rank)):
                with unsynchronised(module, step == case.accumulated - 1):
                    module(part, **given).backward()
        expected = policies.expected_gradients(**case.settings)
        try:
            check(gradients_of(policy, module), expected, 3e-2 if case.low_precision else 1e-6)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


COMMON = {
    "ddp": [
        Case("ddp"),
        Case("ddp", split=UNSCORED, tied=True),
        Case("ddp", split=EMPTY, functional=True),
        Case("ddp", accumulated=2),
    ],
    "fsdp2": [
        Case("fsdp2", functional=True, split=UNSCORED),
        Case("fsdp2", tied=True, split=EMPTY),
        Case("fsdp2", "alone", split=UNSCORED, accumulated=2),
        Case("fsdp2", "alone", split=EMPTY, offloaded=True),
        Case("fsdp2", "with norm", accumulated=2),
        Case("fsdp2", "with norm", functional=True, split=EMPTY),
        Case("fsdp2", "alone", low_precision=True),
        Case("fsdp2", "alone", schedule="recompute"),
        Case("fsdp2", "alone", schedule="batches"),
    ],
    "fsdp1": [
        Case("fsdp1", tied=True, split=UNSCORED),
        Case("fsdp1", "alone", split=EMPTY, accumulated=2),
        Case("fsdp1", "alone", schedule="batches"),
        Case("fsdp1", low_precision=True),
    ],
}


@pytest.mark.parametrize("wrapper", COMMON)
def test_as_one_process(two_ranks: Ranks, wrapper: str) -> None:
    """``EMPTY``: a rank without a row, which must take part all the same."""
    two_ranks(on_a_rank, COMMON[wrapper])


def swept(wrapper: str) -> Iterator[Case]:
    for head in ("root", "alone", "with norm") if wrapper == "fsdp2" else ("root", "alone"):
        for split in (EVEN, UNSCORED, EMPTY):
            for accumulated in (1, 2):
                for offloaded in (False, True) if wrapper == "fsdp2" else (False,):
                    for low_precision in (False, True):
                        more = (split, False, False, accumulated, offloaded, low_precision)
                        for schedule in ("auto", "recompute", "batches"):
                            yield Case(wrapper, head, *more, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp2"])
def test_all_combinations(two_ranks: Ranks, wrapper: str) -> None:
    cases = list(swept(wrapper))
    for start in range(0, len(cases), 24):  # a call of the fixture is bounded in time
        two_ranks(on_a_rank, cases[start : start + 24])
