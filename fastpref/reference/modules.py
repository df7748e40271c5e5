# SPDX-License-Identifier: Apache-2.0
"""A module as its weights are to be read and changed."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def bare(module: nn.Module) -> nn.Module:
    """Without what DDP or torch.compile puts around it, and in shards where it has any.

    FSDP2 leaves gathered what a forward needed, that of the root at least, until the backward,
    which a reference does not have; a change of the gathered weights would not last.
    """
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            break
        module = inner
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return module
