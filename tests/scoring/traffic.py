# SPDX-License-Identifier: Apache-2.0
"""Bytes that the operators of a call read and write."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Operators that read each operand once and write their result once. Any other on a matrix is an
# error: it may be made of several (logsumexp is).
ONE_PASS = {
    aten.mul.Tensor,
    aten.mul.out,
    aten.mul_.Tensor,
    aten.mul_.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.add_.Tensor,
    aten.add_.Scalar,
    aten.sub.Tensor,
    aten.sub_.Tensor,
    aten.rsub.Scalar,
    aten.addcmul.default,
    aten.addcmul_.default,
    aten.exp.default,
    aten.exp_.default,
    aten.sign_.default,
    aten.clamp_.default,
    aten.nan_to_num_.default,
    aten.logaddexp.out,
    aten.special_entr.default,
    aten.sum.dim_IntList,
    aten.nansum.default,
    aten.argmax.default,
    aten.linalg_vector_norm.default,
    aten.cat.default,
    aten.pow_.Scalar,
    aten.copy_.default,
    aten._to_copy.default,
    # A row in registers or in cache between its maximum, its sum and the result.
    aten._softmax.default,
    aten._log_softmax.default,
}
# Of one element a row.
ONE_COLUMN = {aten.index.Tensor, aten.index_put_.default}
ALLOCATIONS = {aten.empty.memory_format, aten.new_empty.default}


def own_bytes(tensor: torch.Tensor) -> int:
    """Of the elements that lie in memory: a broadcast dimension has one."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(1 if stride == 0 else size for size, stride in sizes)


def is_view(func) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )


class Traffic(TorchDispatchMode):
    """Each operand of an operator once, a written tensor once, so that an operation in place counts
    its tensor twice; of gathers and scatters what they touch; views and allocations nothing. A cast
    that an operator makes of an operand counts nothing, as on a GPU.

    ``matrix``: elements from which on a tensor is a matrix."""

    def __init__(self, matrix: int) -> None:
        super().__init__()
        self.matrix = matrix
        self.of_matrices = self.of_rows = 0

    @property
    def total(self) -> int:
        return self.of_matrices + self.of_rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_view(func) or func in ALLOCATIONS:
            return result
        given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        written, read = [], []
        for one in func._schema.arguments:
            tensors = [x for x in tree_leaves(given.get(one.name)) if isinstance(x, torch.Tensor)]
            changed = one.alias_info is not None and one.alias_info.is_write
            written += tensors if changed else []
            # An out= argument is not read.
            read += [] if changed and one.is_out else tensors
        fresh = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        written += [x for x in fresh if not any(x is other for other in written)]
        if func in ONE_COLUMN:
            # The matrix it takes elements from or changes is not passed over.
            rest = [x for x in read if x is not args[0]]
            touched = 2 * own_bytes(fresh[0]) if func is aten.index.Tensor else own_bytes(args[2])
            self.of_rows += sum(map(own_bytes, rest)) + touched
            return result
        if any(x.numel() >= self.matrix for x in (*read, *written)) and func not in ONE_PASS:
            raise AssertionError(f"how often does {func} read its operands?")
        for tensor in (*self._once(read), *written):
            if tensor.numel() >= self.matrix and own_bytes(tensor) >= self.matrix:
                self.of_matrices += own_bytes(tensor)
            else:
                self.of_rows += own_bytes(tensor)
        return result

    @staticmethod
    def _once(tensors):
        return {(x.data_ptr(), x.shape, x.stride(), x.dtype): x for x in tensors}.values()
