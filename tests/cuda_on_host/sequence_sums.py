# SPDX-License-Identifier: Apache-2.0
"""The CUDA sums over sequences on CPU tensors, called with the arguments of their operator."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.scoring.types import statistics_dtype
from tests.cuda_on_host.kernels import ELEMENTS, compile_library, pointer


class SequenceSumsStruct(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("scored", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("values_stride", ctypes.c_int64),
        ("weights_stride", ctypes.c_int64),
        ("scored_stride", ctypes.c_int64),
        ("mean", ctypes.c_bool),
    )


class SequenceSums(NamedTuple):
    """The kernel on the host, with the arguments of the operator."""

    library: ctypes.CDLL

    def __call__(
        self,
        logp: Tensor,
        token_weights: Tensor | None,
        mask: Tensor | None,
        order: Tensor | None,
        boundaries: Tensor | None,
        mean: bool,
        backwards: bool = False,
    ) -> tuple[Tensor, Tensor]:
        packed = boundaries is not None
        # As the operator requires; the kernel sees no dtype and no stride but that of rows.
        for one in (logp, token_weights, mask):
            assert one is None or (one.shape == logp.shape and one.stride(-1) == 1)
        assert token_weights is None or token_weights.dtype == logp.dtype
        assert mask is None or mask.dtype == torch.bool
        for one in (order, boundaries):
            assert one is None or (one.dtype == torch.int64 and one.is_contiguous())
        sequences = logp.shape[0] if boundaries is None else len(boundaries) - 1
        sums = torch.full((sequences,), torch.nan, dtype=statistics_dtype(logp.dtype))
        counts = torch.full((sequences,), -7)
        call = SequenceSumsStruct(
            logp.data_ptr(),
            pointer(token_weights),
            pointer(mask),
            pointer(order),
            pointer(boundaries),
            sums.data_ptr(),
            counts.data_ptr(),
            logp.shape[-1],
            *(0 if packed or one is None else one.stride(0) for one in (logp, token_weights, mask)),
            mean,
        )
        self.library.sequence_sums(
            ELEMENTS.index(logp.dtype),
            ctypes.byref(call),
            ctypes.c_int64(sequences),
            ctypes.c_bool(backwards),
        )
        return sums, counts


def compile_sequence_sums(directory: Path) -> SequenceSums:
    return SequenceSums(compile_library(directory, "sequence_sums"))
