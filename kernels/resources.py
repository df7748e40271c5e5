# SPDX-License-Identifier: Apache-2.0
"""What the kernels take of a chip, read from machine code that is compiled for it without one.

Registers and stack come from the compiler's report, matrix instructions and copies from the
disassembly, by the cuobjdump that Triton brings; shared memory from Triton.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    column_sums,
    cosine_rows,
    divergence_rows,
    linear_exp,
    linear_grad,
    probabilities,
    reanchor,
    row_scores,
    row_sums,
    scale_rows,
    target_logits,
    tiles,
)

ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
# In the disassembly, by compute capability: float32 is multiplied on the ordinary units, exactly.
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
_WIDE = (
    "hidden_stride",
    "weight_stride",
    "exps_stride",
    "grads_stride",
    "matrix_stride",
    "width",
)


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched."""

    kernel: Any
    name: str
    constants: dict[str, Any]
    descriptors: dict[str, tuple[int, int]]  # blocks of the arguments that are descriptors
    element: str
    warps: int
    stages: int


@dataclass(frozen=True)
class Resources:
    """Per thread registers, bytes of stack (spills) and of shared memory; matrix instructions and
    bulk tensor loads in the machine code."""

    name: str
    capability: int
    registers: int
    stack: int
    shared_memory: int
    matrix_instructions: int
    tensor_loads: int


def variants(capability: int, element: str) -> Iterator[Variant]:
    """All kernels, in all the ways they are launched for inputs of that element type."""
    chip = tiles.CHIPS[capability]
    size = ELEMENTS[element]
    for capped in (False, True):
        for statistics in (False, True):
            heavy = statistics or capped
            pair = (chip.heavy if heavy else chip.plain)[size]
            for store in (False, True):
                yield _exps(chip, pair.ordinary, element, store, statistics, capped)
                yield _flagged(pair.flagged, element, store, statistics, capped)
            yield _largest(pair.flagged, element, capped, heavy)
        for entropy in (False, True):
            yield _gradient(chip, chip.heavy[size].ordinary, element, entropy, capped)
    for statistics in (False, True):
        yield from _sums(statistics)
    if element == "fp16":
        yield probabilities_variant()
    for capped in (False, True):
        yield from _glue(element, capped)
    blocks = {"BLOCK_WIDTH": 1024}
    yield Variant(scale_rows.scale_rows_kernel, "scale_rows", blocks, {}, element, 4, 3)
    yield from _columns(element)
    for capped in (False, True):
        yield from _divergences(element, capped)


def _blocks(shape: tiles.TileShape, element: str, capped: bool) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": shape.rows,
        "BLOCK_COLS": shape.cols,
        "BLOCK_WIDTH": shape.width,
        "CAPPED": capped,
        "PRECISION": "ieee",
        "hidden_step": 1,
        "weight_step": 1,
    }


def _label(name: str, capped: bool, **flags: bool) -> str:
    said = [flag for flag, on in {**flags, "capped": capped}.items() if on]
    return " ".join([name, *said])


def _described(chip: tiles.Chip, shape: tiles.TileShape, out: str) -> dict[str, tuple[int, int]]:
    if not chip.descriptors:
        return {}
    return {
        "hidden": (shape.rows, shape.width),
        "weight": (shape.cols, shape.width),
        out: (shape.rows, shape.slice_cols),
    }


def _exps(
    chip: tiles.Chip,
    shape: tiles.TileShape,
    element: str,
    store: bool,
    statistics: bool,
    capped: bool,
) -> Variant:
    constants = _blocks(shape, element, capped) | {
        "GROUP_ROWS": shape.group_rows,
        "SLICES": shape.slices,
        "DESCRIPTORS": chip.descriptors,
        "EXACT": element == "fp32",
        **({} if store else {"exps": None}),
        **({} if statistics else {"best_index": None}),
    }
    name = _label("linear_exp", capped, store=store, statistics=statistics)
    described = _described(chip, shape, "exps")
    kernel = linear_exp.linear_exp_kernel
    return Variant(kernel, name, constants, described, element, shape.warps, shape.stages)


def _flagged(
    shape: tiles.TileShape, element: str, store: bool, statistics: bool, capped: bool
) -> Variant:
    constants = _blocks(shape, element, capped) | {
        "SLICES": shape.slices,
        "EXACT": element == "fp32",
        **({} if store else {"exps": None}),
        **({} if statistics else {"best_index": None}),
    }
    name = _label("reanchor", capped, store=store, statistics=statistics)
    kernel = reanchor.reanchor_kernel
    return Variant(kernel, name, constants, {}, element, shape.warps, shape.stages)


def _largest(shape: tiles.TileShape, element: str, capped: bool, heavy: bool) -> Variant:
    constants = _blocks(shape, element, capped)
    name = _label("largest_logit", capped, heavy=heavy)
    kernel = reanchor.largest_logit_kernel
    return Variant(kernel, name, constants, {}, element, shape.warps, shape.stages)


def _gradient(
    chip: tiles.Chip, shape: tiles.TileShape, element: str, entropy: bool, capped: bool
) -> Variant:
    constants = _blocks(shape, element, capped) | {
        "GROUP_ROWS": shape.group_rows,
        "SLICES": shape.slices,
        "DESCRIPTORS": chip.descriptors,
        "EXACT": element == "fp32",
        **({} if entropy else {"grad_entropy": None, "entropy": None, "grad_lse": None}),
    }
    name = _label("linear_grad", capped, entropy=entropy)
    described = _described(chip, shape, "grads")
    kernel = linear_grad.linear_grad_kernel
    return Variant(kernel, name, constants, described, element, shape.warps, shape.stages)


def probabilities_variant() -> Variant:
    constants = {"BLOCK_COLS": probabilities.COLS, "ALIGNED": True}
    kernel = probabilities.probabilities_kernel
    return Variant(kernel, "probabilities", constants, {}, "fp16", 4, 3)


def _glue(element: str, capped: bool) -> Iterator[Variant]:
    blocks = {
        "BLOCK_ROWS": target_logits.ROWS,
        "BLOCK_WIDTH": target_logits.WIDTH,
        "CAPPED": capped,
    }
    name = _label("target_logits", capped)
    yield Variant(target_logits.target_logits_kernel, name, blocks, {}, element, 4, 3)
    for statistics in (False, True):
        constants: dict[str, Any] = {"BLOCK_ROWS": row_scores.ROWS, "CAPPED": capped}
        if not statistics:
            constants |= {"best": None}
        name = _label("row_scores", capped, statistics=statistics)
        yield Variant(row_scores.row_scores_kernel, name, constants, {}, element, 4, 3)


def _columns(element: str) -> Iterator[Variant]:
    for weighted in (False, True):
        constants: dict[str, Any] = {
            "BLOCK_ROWS": column_sums.ROWS,
            "BLOCK_COLS": column_sums.COLS,
            **({} if weighted else {"weights": None}),
        }
        name = _label("column_sums", False, weighted=weighted)
        kernel, warps = column_sums.column_sums_kernel, column_sums.WARPS
        yield Variant(kernel, name, constants, {}, element, warps, 3)


def _sums(statistics: bool) -> Iterator[Variant]:
    constants: dict[str, Any] = {"BLOCK_ROWS": row_sums.ROWS, "BLOCK_TILES": row_sums.TILES}
    if not statistics:
        constants |= {"best_index": None, "out_index": None}
    for kernel, name in (
        (row_sums.row_sums_kernel, "row_sums"),
        (reanchor.settle_kernel, "settle"),
    ):
        label = _label(name, False, statistics=statistics)
        yield Variant(kernel, label, constants, {}, "fp32", 4, 3)
    if not statistics:
        blocks = {"BLOCK_ROWS": row_sums.ROWS}
        yield Variant(reanchor.anchor_kernel, "anchor", blocks, {}, "fp32", 4, 3)
        blocks = {"BLOCK": 1024}
        yield Variant(reanchor.list_flagged_kernel, "list_flagged", blocks, {}, "fp32", 4, 3)


def _divergences(element: str, capped: bool) -> Iterator[Variant]:
    """With the gradient: without it, it is a part of these."""
    blocks = {"BLOCK_COLS": divergence_rows.COLS, "CAPPED": capped, "WRITE": True}
    warps = divergence_rows.WARPS
    names = ("forward_kl", "reverse_kl", "jsd", "tv", "bhattacharyya")
    for kind, name in enumerate(names):
        constants = blocks | {"KIND": kind, "EXACT": element == "fp32"}
        kernel = divergence_rows.divergence_rows_kernel
        yield Variant(kernel, _label(name, capped), constants, {}, element, warps, 3)
    kernel = cosine_rows.cosine_rows_kernel
    yield Variant(kernel, _label("cosine", capped), blocks, {}, element, warps, 3)


_POINTERS = {
    "target": "*i64",
    "column": "*i64",
    "best_index": "*i32",
    "out_index": "*i64",
    "flag": "*i8",
    "flagged": "*i32",
    "count": "*i32",
}
_FLOATS = (
    *(
        "bias",
        "anchor",
        "sums",
        "largest",
        "sum",
        "raw",
        "logit",
        "best",
        "factor",
        "norm",
        "weights",
        "logp",
        "entropy",
    ),
    *("grad_logp", "grad_lse", "grad_entropy", "target_logit", "offset", "scores"),
    *("student_bias", "teacher_bias", "values"),
)
_MATRICES = ("hidden", "weight", "exps", "grads", "matrix", "student", "teacher")
_NUMBERS = ("scale", "inner", "cap", "student_weight", "teacher_weight")


def _type(variant: Variant, argument: str) -> str:
    if argument in variant.constants:
        return "constexpr"
    if argument in variant.descriptors:
        rows, cols = variant.descriptors[argument]
        return f"tensordesc<{variant.element}[{rows}, {cols}]>"
    if argument in _POINTERS:
        return _POINTERS[argument]
    if argument in _FLOATS:
        return "*fp32"
    if argument in _MATRICES:
        return f"*{variant.element}"
    if argument == "out" and variant.kernel is column_sums.column_sums_kernel:
        return "*fp64"
    if argument == "out":  # of sums in float32, or a matrix
        return f"*{variant.element}"
    return "fp32" if argument in _NUMBERS else "i32"


def build(variant: Variant, capability: int) -> Any:
    """The variant, compiled for the capability."""
    names = variant.kernel.arg_names
    types = {name: _type(variant, name) for name in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if types[name].startswith("*") or (name in _WIDE and types[name] == "i32")
    }
    return triton.compile(
        ASTSource(variant.kernel, types, variant.constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )


def read(variant: Variant, capability: int) -> Resources:
    """What the machine code of the variant says, compiled for the capability."""
    compiled = build(variant, capability)
    usage, code = (_dump(compiled.asm["cubin"], flag) for flag in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers:\n{usage}")
    matrix = MATRIX_INSTRUCTION[capability]
    return Resources(
        variant.name,
        capability,
        int(found[1]),
        int(found[2]),
        compiled.metadata.shared,
        len(re.findall(rf"\s{matrix}\b", code)),
        len(re.findall(r"\sUTMALDG\b", code)),
    )


def _dump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout
