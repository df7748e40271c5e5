# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.guarded_launches FAMILY SET [DIRECTORY]``: launches of a family of kernels on
tensors beside guard pages (tests/guard.py), of the sample or of the sweep. The name of a launch is
printed before it begins, so that the last one printed is the one that ended the process.

A launcher of Triton kernels joins by a function here that yields its launches, in TRITON.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.scoring.backends import UpstreamGradient
from fastpref.scoring.slab import Products, Projection, Slab
from tests import operator_launches
from tests.cuda_on_host import launches as cuda_launches
from tests.cuda_on_host.kernels import ELEMENTS
from tests.guard import SIDES, guarded, guarded_allocations
from tests.row_launches import Launch, Place, between_products, over_tiles, placed
from tests.scoring.divergences import DIVERGENCES, Tiles, random_tiles, with_bias
from tests.scoring.settling import MAPS

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Extent(NamedTuple):
    """How much of a family is launched."""

    widths: tuple[int, ...]
    maps: tuple[str, ...]


# Fewer columns than a vector holds, a multiple of all vectors and blocks, ragged ones.
COMPILED = {
    "sample": Extent((13, 333), ("capped",)),
    "sweep": Extent((1, 8, 13, 31, 256, 333), tuple(MAPS)),
}
# The interpreter is slow; its blocks are 64 columns wide.
INTERPRETED = {
    "sample": Extent((130,), ("capped",)),
    "sweep": Extent((1, 13, 128, 333), ("plain", "capped")),
}


def of(kernels: Any, launches: Iterator[Launch]) -> Iterator[Launch]:
    """Launches of one family, whose kernels ``main`` need not know."""
    for launch in launches:
        yield Launch(launch.name, lambda _, place, run=launch.run: run(kernels, place))


def divergence_rows(
    operator: Callable[..., Tensor], dtype: torch.dtype, cols: int, kind: int
) -> Launch:
    def run(_: Any, place: Place) -> list[Tensor]:
        tiles = with_bias(random_tiles(2, cols)._replace(map=MAPS["capped"])).to(dtype)
        student, teacher = (
            place(torch.nn.functional.pad(one, (0, more))[:, :cols])
            for one, more in ((tiles.student, 3), (tiles.teacher, 2))
        )
        biases = (placed(place, tiles.student_bias), placed(place, tiles.teacher_bias))
        lying = Tiles(student, teacher, *biases, tiles.map)
        values = [operator(*lying.products, kind, 0.3, write) for write in (False, True)]
        return [student, *values]

    return Launch(f"divergence_rows-{DIVERGENCES[kind]}-{dtype}-{cols}", run)


def divergences(
    operator: Callable[..., Tensor], dtypes: tuple[torch.dtype, ...], extent: Extent
) -> Iterator[Launch]:
    for dtype, cols, kind in itertools.product(dtypes, extent.widths, range(len(DIVERGENCES))):
        yield divergence_rows(operator, dtype, cols, kind)


def compiled_divergence_rows(
    student: Products, teacher: Products, kind: int, beta: float, write: bool
) -> Tensor:
    value: Tensor = torch.ops.fastpref.divergence_rows_(
        student.tile, teacher.tile, student.bias, teacher.bias, *student.map, kind, beta, write
    )
    return value


def cpu(launches: str, directory: str) -> Iterator[Launch]:
    from fastpref.scoring.backends import cpp

    extent = COMPILED[launches]
    for dtype, map, cols in itertools.product(ELEMENTS, extent.maps, extent.widths):
        # make_rows wants some columns.
        yield from of(cpp, over_tiles(dtype, map, max(cols, 13)))
        yield from of(cpp, between_products(dtype, map, cols))
        yield from operator_launches.of_rows(dtype, map, cols)
    for cols in extent.widths:
        yield from operator_launches.of_vectors(cols)
        for dtype in ELEMENTS:
            yield from operator_launches.of_errors(dtype, cols)
            yield operator_launches.under_gradient(dtype, cols)
    yield from divergences(compiled_divergence_rows, ELEMENTS, extent)


def cuda(launches: str, directory: str) -> Iterator[Launch]:
    libraries = cuda_launches.Libraries(Path(directory))
    for cols in COMPILED[launches].widths:
        yield from of(libraries, cuda_launches.sample(max(cols, 13)))


def glue(launches: str, directory: str) -> Iterator[Launch]:
    from fastpref.scoring.backends import glue

    extent = INTERPRETED[launches]
    for dtype, map, cols in itertools.product(TRITON_DTYPES, extent.maps, extent.widths):
        yield from of(glue, between_products(dtype, map, cols))


def rows(launches: str, directory: str) -> Iterator[Launch]:
    from fastpref.scoring.backends import rows

    extent = INTERPRETED[launches]
    for dtype, map, cols in itertools.product(TRITON_DTYPES, extent.maps, extent.widths):
        yield from of(rows, over_tiles(dtype, map, cols))


def projection(dtype: torch.dtype, map: str, cols: int, write: bool, statistics: bool) -> Launch:
    from fastpref.scoring.backends import triton as triton_backend

    def run(_: Any, place: Place) -> list[Tensor]:
        # Rows of whole 16 bytes, at such distances: others take another way.
        hidden = place(torch.randn(37, 48).to(dtype)[:, :40])
        weight = place(torch.randn(cols, 48).to(dtype)[:, :40])
        tile = place(torch.zeros(37, cols + 3, dtype=dtype)[:, 1 : cols + 1])
        target, anchor = torch.randint(cols, (37,)), torch.zeros(37)
        # Rows that are projected again.
        anchor[::3] = -200
        target[-1] = cols - 1
        slab = Slab(weight, place(torch.randn(cols)), MAPS[map])
        given = Projection(hidden, slab, tile, place(target))
        sums = triton_backend.project(given, place(anchor), write, statistics)
        return [tile, sums.sum]

    kind = f"{'written' if write else 'read'}-{'statistics' if statistics else 'sums'}"
    return Launch(f"project-{dtype}-{map}-{cols}-{kind}", run)


def projected_gradient(dtype: torch.dtype, map: str, cols: int) -> Launch:
    from fastpref.scoring.backends import triton as triton_backend

    def run(_: Any, place: Place) -> list[Tensor]:
        # Rows of whole 16 bytes, at such distances: others take another way.
        hidden = place(torch.randn(37, 48).to(dtype)[:, :40])
        weight = place(torch.randn(cols, 48).to(dtype)[:, :40])
        tile = place(torch.zeros(37, cols + 3, dtype=dtype)[:, 1 : cols + 1])
        upstream = UpstreamGradient(*(place(one) for one in torch.rand(7, 37)))
        target = place(torch.randint(cols, (37,)))
        slab = Slab(weight, place(torch.randn(cols)), MAPS[map])
        triton_backend.project_gradient(Projection(hidden, slab, tile, target), upstream)
        return [tile]

    return Launch(f"project_gradient-{dtype}-{map}-{cols}", run)


def triton(launches: str, directory: str) -> Iterator[Launch]:
    extent = INTERPRETED[launches]
    for dtype, map, cols in itertools.product(TRITON_DTYPES, extent.maps, extent.widths):
        yield projection(dtype, map, cols, False, False)
        yield projection(dtype, map, cols, True, True)
        yield projected_gradient(dtype, map, cols)


def divergence_launch(launches: str, directory: str) -> Iterator[Launch]:
    from fastpref.scoring.backends import divergence_launch

    operator = divergence_launch.divergence_rows
    yield from divergences(operator, TRITON_DTYPES, INTERPRETED[launches])


def planted(launches: str, directory: str) -> Iterator[Launch]:
    """A kernel that reads ``launches`` elements beyond both ends."""
    from tests.kernels.planted import read_around

    for more in (0, int(launches)):
        yield Launch(
            f"{more} beyond",
            lambda _, place, more=more: [
                read_around(place(torch.randn(5, dtype=torch.float32)), more)
            ],
        )


TRITON = {
    "glue": glue,
    "rows": rows,
    "triton": triton,
    "divergence_launch": divergence_launch,
    "planted": planted,
}
FAMILIES = {"cpu": cpu, "cuda": cuda, **TRITON}


# Whose own allocations lie beside guard pages too.
ALLOCATING = ("fastpref.", "tests.cuda_on_host.")


def main(family: str, launches: str, directory: str = "") -> None:
    torch.set_num_threads(1)
    if family in TRITON:
        from triton.runtime.interpreter import InterpreterBuilder

        from tests.kernels.conftest import _dot

        InterpreterBuilder.create_dot = _dot
    for launch in FAMILIES[family](launches, directory):
        for side in SIDES:
            print(f"{launch.name}, {side}", flush=True)
            torch.manual_seed(0)
            with guarded_allocations(side, ALLOCATING):
                assert launch.run(None, functools.partial(guarded, side=side))


if __name__ == "__main__":
    main(*sys.argv[1:])
