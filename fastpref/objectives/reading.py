# SPDX-License-Identifier: Apache-2.0
"""Which tensors' values can be looked at."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def readable(tensor: Tensor) -> bool:
    """Whether looking at the values of ``tensor`` costs nothing and has one answer: it lies on the
    CPU, holds data, and neither torch.compile nor torch.func.vmap stands for many of it."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, FakeTensor)
        and not is_mapped(tensor)
    )


def is_mapped(tensor: Tensor) -> bool:
    """Whether torch.func.vmap maps over ``tensor``."""
    if not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
