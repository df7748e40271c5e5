# SPDX-License-Identifier: Apache-2.0
"""The CUDA pair head on CPU tensors, called with the arguments of its operator."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cuda_on_host.kernels import ELEMENTS, compile_library, pointer

MEANS = 7


class ColumnStruct(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))


class PairHeadStruct(ctypes.Structure):
    _fields_ = (
        ("policy", ColumnStruct * 2),
        ("ref", ColumnStruct * 2),
        ("lengths", ctypes.c_void_p * 2),
        ("link", ctypes.c_int),
        ("scale", ctypes.c_double),
        ("shift", ctypes.c_double),
        ("flipped", ctypes.c_double),
        ("reward_scale", ctypes.c_double),
        ("rewards_per_token", ctypes.c_bool),
        ("pairs", ctypes.c_int64),
        ("losses", ctypes.c_void_p),
        ("rewards", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("means", ctypes.c_void_p),
    )


def column(tensor: Tensor | None) -> ColumnStruct:
    return ColumnStruct(pointer(tensor), 0 if tensor is None else tensor.stride(0))


class PairHeadKernel(NamedTuple):
    """The kernel on the host, with the arguments of the operator."""

    library: ctypes.CDLL

    def __call__(
        self,
        policy_chosen: Tensor,
        policy_rejected: Tensor,
        ref_chosen: Tensor | None,
        ref_rejected: Tensor | None,
        chosen_lengths: Tensor | None,
        rejected_lengths: Tensor | None,
        link: int,
        scale: float,
        shift: float,
        flipped: float,
        reward_scale: float,
        rewards_per_token: bool,
        backwards: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pairs, dtype = len(policy_chosen), policy_chosen.dtype
        # As the operator requires; the kernel sees no dtype.
        for one in (policy_rejected, ref_chosen, ref_rejected):
            assert one is None or (one.dtype == dtype and one.shape == (pairs,))
        for one in (chosen_lengths, rejected_lengths):
            assert one is None or (one.dtype == torch.int64 and one.is_contiguous())
        losses, rewards, slopes, means = (
            torch.full(shape, torch.nan, dtype=dtype)
            for shape in ((pairs,), (2, pairs), (2, pairs), (MEANS,))
        )
        call = PairHeadStruct(
            (ColumnStruct * 2)(column(policy_chosen), column(policy_rejected)),
            (ColumnStruct * 2)(column(ref_chosen), column(ref_rejected)),
            (ctypes.c_void_p * 2)(pointer(chosen_lengths), pointer(rejected_lengths)),
            link,
            scale,
            shift,
            flipped,
            reward_scale,
            rewards_per_token,
            pairs,
            *(one.data_ptr() for one in (losses, rewards, slopes, means)),
        )
        self.library.pair_head(ELEMENTS.index(dtype), ctypes.byref(call), ctypes.c_bool(backwards))
        return losses, rewards, slopes, means


def compile_pair_head(directory: Path) -> PairHeadKernel:
    return PairHeadKernel(compile_library(directory, "pair_head"))
