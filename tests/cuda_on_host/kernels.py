# SPDX-License-Identifier: Apache-2.0
"""The CUDA row kernels on CPU tensors: compiled by g++ against the stand-in beside this file, and
called with the arguments of a backend."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.scoring.backends import UpstreamGradient
from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.rows import TargetLogits
from fastpref.scoring.slab import Products, Slab
from fastpref.scoring.statistics import SUMS, RowScores, RowSums, summed
from fastpref.scoring.types import LogitMap, statistics_dtype

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
# In the order of csrc/cpu/row_kernels.h.
ELEMENTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason() -> str | None:
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "needs g++ on Linux"
    return None if CSRC.exists() else "not run from a checkout"


def compile_library(
    directory: Path, name: str, csrc: Path = CSRC, flags: tuple[str, ...] = ()
) -> ctypes.CDLL:
    """The functions of ``name``.cpp beside this file."""
    return ctypes.CDLL(str(build_library(directory, name, csrc, flags)))


def build_library(
    directory: Path, name: str, csrc: Path = CSRC, flags: tuple[str, ...] = ()
) -> Path:
    library = directory / f"{name}.so"
    command = ["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC", "-pthread"]
    # What is shared in a block is thread-local here, and needs no initialisation. No library shares
    # it with another.
    command += ["-fno-extern-tls-init", "-fno-gnu-unique", f"-I{HERE}", f"-I{csrc}", *flags]
    command += [str(HERE / f"{name}.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return library


class Change(NamedTuple):
    """To a file of csrc/cuda, where ``before`` occurs once."""

    file: str
    before: str
    after: str


def changed_sources(directory: Path, changes: Iterable[Change]) -> Path:
    """A copy of csrc with the changes, for compile_library."""
    csrc = directory / "csrc"
    shutil.copytree(CSRC, csrc)
    for file, before, after in changes:
        path = csrc / "cuda" / file
        text = path.read_text(encoding="utf-8")
        if text.count(before) != 1:
            raise ValueError(f"{file} has {before!r} {text.count(before)} times, expected once")
        path.write_text(text.replace(before, after), encoding="utf-8")
    return csrc


def compile_kernels(directory: Path) -> "Kernels":
    return Kernels(compile_library(directory, "row_kernels"))


class TileStruct(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("target", ctypes.c_void_p),
    )


class MapStruct(ctypes.Structure):
    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        ("cap", ctypes.c_double),
        ("factor", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, bias: Tensor | None, map: LogitMap) -> "MapStruct":
        return cls(pointer(bias), map.scale, map.cap, pointer(map.factor))


class ExpRowsStruct(ctypes.Structure):
    _fields_ = (
        ("tile", TileStruct),
        ("map", MapStruct),
        ("anchor", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("best_index", ctypes.c_void_p),
        ("write", ctypes.c_bool),
    )


class LogitGradStruct(ctypes.Structure):
    _fields_ = (
        ("tile", TileStruct),
        ("map", MapStruct),
        *((name, ctypes.c_void_p) for name in UpstreamGradient._fields),
    )


class TargetLogitsStruct(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("weight_stride", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("map", MapStruct),
        ("target", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in TargetLogits._fields),
    )


class SettleRowsStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("anchor", "sum", "offset", "best")),
        *((name, ctypes.c_void_p) for name in TargetLogits._fields),
        ("map", MapStruct),
        ("exps", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("exps_stride", ctypes.c_int64),
        ("scores", ctypes.c_void_p),
    )


class ScaleRowsStruct(ctypes.Structure):
    _fields_ = (
        ("input", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("in_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("factor", ctypes.c_void_p),
    )


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def pointers(tensors: Iterable[Tensor | None]) -> list[int | None]:
    return [pointer(one) for one in tensors]


class Kernels(NamedTuple):
    """The kernels on the host, with the arguments of a backend."""

    library: ctypes.CDLL

    def exp_rows(
        self,
        products: Products,
        target: Tensor,
        anchor: Tensor,
        write: bool,
        statistics: bool,
        backwards: bool = False,
        blocks: int = 1,
    ) -> RowSums:
        """``blocks`` share a row as a cluster."""
        tile, bias, map = products
        rows = tile.shape[0]
        kinds = len(SUMS) + len(summed(statistics, map.cap != 0))
        sums = torch.full((kinds, rows), torch.nan, dtype=anchor.dtype)
        best_index = torch.full((rows,), -7) if statistics else None
        call = ExpRowsStruct(
            TileStruct(tile.data_ptr(), *tile.shape, tile.stride(0), target.data_ptr()),
            MapStruct.of(bias, map),
            anchor.data_ptr(),
            sums.data_ptr(),
            pointer(best_index),
            write,
        )
        element = ELEMENTS.index(tile.dtype)
        if blocks == 1:
            self.library.exp_rows(element, ctypes.byref(call), ctypes.c_bool(backwards))
        else:
            self.library.exp_rows_cluster(
                element, ctypes.byref(call), blocks, ctypes.c_bool(backwards)
            )
        return RowSums.of(sums, best_index)

    def logit_grad(
        self,
        products: Products,
        target: Tensor,
        upstream: UpstreamGradient,
        backwards: bool = False,
    ) -> None:
        tile, bias, map = products
        call = LogitGradStruct(
            TileStruct(tile.data_ptr(), *tile.shape, tile.stride(0), target.data_ptr()),
            MapStruct.of(bias, map),
            *pointers(upstream),
        )
        self.library.logit_grad(
            ELEMENTS.index(tile.dtype), ctypes.byref(call), ctypes.c_bool(backwards)
        )

    def target_logits(
        self, hidden: Tensor, slab: Slab, target: Tensor, backwards: bool = False
    ) -> TargetLogits:
        weight, bias, map = slab
        rows, width = hidden.shape
        raw = torch.full((rows,), 7.0, dtype=statistics_dtype(hidden.dtype))
        found = TargetLogits(torch.full((rows,), -7), raw, raw.clone())
        call = TargetLogitsStruct(
            hidden.data_ptr(),
            weight.data_ptr(),
            hidden.stride(0),
            weight.stride(0),
            width,
            weight.shape[0],
            MapStruct.of(bias, map),
            target.data_ptr(),
            *pointers(found),
        )
        self.library.target_logits(
            ELEMENTS.index(hidden.dtype),
            ctypes.byref(call),
            ctypes.c_int64(rows),
            ctypes.c_bool(backwards),
        )
        return found

    def settle(
        self,
        sums: RowSums,
        own: TargetLogits,
        exps: Tensor | None,
        map: LogitMap,
        backwards: bool = False,
    ) -> tuple[RowScores, Tensor]:
        rows = sums.sum.shape[0]
        scores = torch.full((5, rows), torch.nan, dtype=sums.sum.dtype)
        call = SettleRowsStruct(
            *pointers((sums.anchor, sums.sum, sums.offset, sums.best)),
            *pointers(own),
            MapStruct.of(None, map),
            pointer(exps),
            rows,
            0 if exps is None else exps.stride(0),
            scores.data_ptr(),
        )
        dtype = sums.sum.dtype if exps is None else exps.dtype
        self.library.settle_rows(
            ELEMENTS.index(dtype), ctypes.byref(call), ctypes.c_bool(backwards)
        )
        *found, scale = scores
        return RowScores(*found), scale

    def scale_rows(self, rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        call = ScaleRowsStruct(
            rows.data_ptr(),
            out.data_ptr(),
            rows.stride(0),
            out.stride(0),
            rows.shape[1],
            factor.data_ptr(),
        )
        self.library.scale_rows(
            ELEMENTS.index(rows.dtype),
            ctypes.byref(call),
            ctypes.c_int64(rows.shape[0]),
            ctypes.c_bool(False),
        )
        return out

    temporary_bytes = staticmethod(torch_backend.temporary_bytes)
    gradient_factors = staticmethod(torch_backend.gradient_factors)
