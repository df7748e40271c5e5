# SPDX-License-Identifier: Apache-2.0
"""Launches of all CUDA kernels on the host: ``python -m tests.cuda_on_host.launches DIRECTORY OUT
SET [PREFIX]`` loads the libraries in DIRECTORY, makes the launches of a set whose names begin with
PREFIX, and saves what they wrote to OUT. The name of a launch is printed before it begins."""

import ctypes
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda_on_host.kernels import ELEMENTS, Kernels
from tests.cuda_on_host.pair_head import PairHeadKernel
from tests.cuda_on_host.sequence_sums import SequenceSums
from tests.row_launches import Launch, Place, between_products, exp_rows, logit_grad
from tests.scoring.settling import MAPS

LIBRARIES = ("row_kernels", "sequence_sums", "pair_head")


class Libraries:
    """The libraries in a directory, each loaded when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @functools.cached_property
    def row_kernels(self) -> Kernels:
        return Kernels(self._load("row_kernels"))

    @functools.cached_property
    def sequence_sums(self) -> SequenceSums:
        return SequenceSums(self._load("sequence_sums"))

    @functools.cached_property
    def pair_head(self) -> PairHeadKernel:
        return PairHeadKernel(self._load("pair_head"))

    def _load(self, name: str) -> ctypes.CDLL:
        return ctypes.CDLL(str(self.directory / f"{name}.so"))


def on_rows(launch: Launch) -> Launch:
    return Launch(launch.name, lambda libraries, place: launch.run(libraries.row_kernels, place))


def in_cluster(dtype: torch.dtype, map: str, statistics: bool, cols: int, blocks: int) -> Launch:
    # Two of these rows move their anchor, one has none.
    return exp_rows(dtype, map, statistics, cols, slice(3, 9), blocks=blocks)


def sequence_sums(dtype: torch.dtype, packed: bool) -> Launch:
    def run(libraries: Libraries, place: Place) -> list[Tensor]:
        shape = (1003,) if packed else (3, 335)
        logp, weights = (place(-torch.rand(shape).to(dtype)) for _ in range(2))
        mask = place(torch.rand(shape) < 0.7)
        order = boundaries = None
        if packed:
            order = place(torch.randperm(1003))
            # The last sequence is said to end beyond the tokens.
            boundaries = place(torch.tensor([-5, 0, 3, 3, 700, 1010]))
        return list(libraries.sequence_sums(logp, weights, mask, order, boundaries, True))

    return Launch(f"sequence_sums-{dtype}-{'packed' if packed else 'padded'}", run)


def pair_head(dtype: torch.dtype, pairs: int) -> Launch:
    def run(libraries: Libraries, place: Place) -> list[Tensor]:
        logps = [place(-9 * torch.rand(pairs, dtype=dtype)) for _ in range(4)]
        lengths = [place(torch.randint(3, (pairs,))) for _ in range(2)]
        return list(libraries.pair_head(*logps, *lengths, 0, 0.1, 0.5, 0.1, 0.1, True))

    return Launch(f"pair_head-{dtype}-{pairs}", run)


def of_sequences() -> Iterator[Launch]:
    """Those of kernels with operators' arguments."""
    for dtype in ELEMENTS:
        yield sequence_sums(dtype, packed=False)
        yield sequence_sums(dtype, packed=True)
    yield pair_head(torch.float64, 131)
    yield pair_head(torch.float32, 131)


def sample(cols: int = 1001) -> Iterator[Launch]:
    """Every kernel in every dtype, several pieces a thread of 64."""
    for dtype in ELEMENTS:
        rows = [
            exp_rows(dtype, "plain", False, cols),
            exp_rows(dtype, "capped", True, cols),
            in_cluster(dtype, "capped", True, cols, blocks=4),
            logit_grad(dtype, "capped", cols),
            *between_products(dtype, "capped", 301),
        ]
        yield from map(on_rows, rows)
    # Some of the blocks have no columns.
    yield on_rows(in_cluster(torch.float16, "plain", False, 13, blocks=8))
    yield from of_sequences()


def sweep(cols: int = 2051) -> Iterator[Launch]:
    for dtype, logit_map in itertools.product(ELEMENTS, MAPS):
        for statistics in (False, True):
            yield on_rows(exp_rows(dtype, logit_map, statistics, cols, backwards=True))
            yield on_rows(in_cluster(dtype, logit_map, statistics, cols, blocks=3))
        yield on_rows(logit_grad(dtype, logit_map, cols))
        yield from map(on_rows, between_products(dtype, logit_map, cols))


SETS = {"sample": sample, "sweep": sweep}


def main(directory: str, out: str, launches: str, prefix: str = "") -> None:
    torch.set_num_threads(1)
    libraries = Libraries(Path(directory))
    results = {}
    for launch in SETS[launches]():
        if launch.name.startswith(prefix):
            print(launch.name, flush=True)
            torch.manual_seed(0)
            results[launch.name] = launch.run(libraries, lambda tensor: tensor)
    if not results:
        raise SystemExit(f"no launch of {launches} begins with {prefix}")
    torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
