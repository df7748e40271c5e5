# SPDX-License-Identifier: Apache-2.0
"""Which products and casts a call makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Operations(TorchDispatchMode):
    """Flop of the matrix products, and the casts of tensors of one size."""

    def __init__(self, watched=-1):
        super().__init__()
        self.flop, self.casts, self.watched = 0, 0, watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten.mm, aten.addmm):
            a, b = args[-2:]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        if func.overloadpacket is aten._to_copy and args[0].numel() == self.watched:
            self.casts += 1
        return func(*args, **(kwargs or {}))
