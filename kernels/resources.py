# SPDX-License-Identifier: Apache-2.0
"""What the kernels take of a chip, read from machine code that is compiled for it without one.

Registers and stack come from the compiler's report, instructions from the disassembly, by the
cuobjdump that Triton brings; shared memory from Triton.
"""

import itertools
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
    instructions,
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
# In the disassembly, by compute capability. Float32 is multiplied on the ordinary units, exactly,
# unless TF32 is allowed.
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_ON_OFF = (False, True)


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched."""

    kernel: Any
    name: str
    constants: dict[str, Any]  # None: the argument is not given
    descriptors: dict[str, tuple[int, int]]  # blocks of the arguments that are descriptors
    element: str
    warps: int = 4
    stages: int = 3
    # Of the arguments by whose alignment the kernel is compiled anew, those that are no multiples
    # of 16: numbers, or addresses in bytes.
    unaligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """Registers and bytes of stack of a thread, shared memory, and what instructions.py counts."""

    name: str
    capability: int
    registers: int
    stack: int
    local_accesses: int  # with the stack: spills
    shared_memory: int
    matrix_instructions: int
    tensor_loads: int
    products_in_flight: int
    loads_beside_epilogue: bool
    epilogue: float  # arithmetic instructions to an element of a product's tile; 0: there is none


def variants(capability: int, element: str) -> Iterator[Variant]:
    """All kernels, in all the ways they are launched on that chip for inputs of that element type;
    those of whole tiles also with ``flatten``, which a process may turn on."""
    chip = tiles.CHIPS[capability]
    yield from products(chip, element)
    if tiles.flattenable(chip, ELEMENTS[element]):
        yield from products(tiles.flattened(chip), element)
    yield from _flagged(chip, element)
    for statistics in _ON_OFF:
        yield from _sums(statistics)
    if element == "fp16":
        yield probabilities_variant()
    yield from _glue(element)
    yield from _columns(element)
    yield from _divergences(element)


def products(chip: tiles.Chip, element: str) -> Iterator[Variant]:
    """linear_exp and linear_grad in the chip's ordinary tiles."""
    for capped, bias, ragged, precision in _ways(element):
        given = {"bias": bias, "ragged": ragged, "capped": capped}
        for statistics, store in itertools.product(_ON_OFF, _ON_OFF):
            shape = _tiles(chip, element, statistics or capped).ordinary
            yield Variant(
                linear_exp.linear_exp_kernel,
                _label("linear_exp", store=store, statistics=statistics, **given)
                + _suffix(precision, shape),
                _whole_tiles(chip, shape, capped, ragged, precision)
                | {"EXACT": element == "fp32"}
                | _absent(exps=store, best_index=statistics, bias=bias),
                _described(chip, shape, "exps" if store else None),
                element,
                shape.warps,
                shape.stages,
            )
        shape = _tiles(chip, element, True).ordinary
        for entropy, lse in itertools.product(_ON_OFF, _ON_OFF):
            yield Variant(
                linear_grad.linear_grad_kernel,
                _label("linear_grad", entropy=entropy, lse=lse, **given)
                + _suffix(precision, shape),
                _whole_tiles(chip, shape, capped, ragged, precision)
                | {"EXACT": element == "fp32"}
                | _absent(grad_entropy=entropy, entropy=entropy, grad_lse=lse, bias=bias),
                _described(chip, shape, "grads"),
                element,
                shape.warps,
                shape.stages,
            )


def _flagged(chip: tiles.Chip, element: str) -> Iterator[Variant]:
    """Of rows that are projected again, gathered through pointers."""
    for capped, bias, ragged, precision in _ways(element):
        given = {"bias": bias, "ragged": ragged, "capped": capped}
        for statistics, store in itertools.product(_ON_OFF, _ON_OFF):
            shape = _tiles(chip, element, statistics or capped).flagged
            yield Variant(
                reanchor.reanchor_kernel,
                _label("reanchor", store=store, statistics=statistics, **given)
                + _suffix(precision, shape),
                _blocks(shape, capped, precision)
                | {"SLICES": shape.slices, "RAGGED": ragged, "ALIGNED": True}
                | {"EXACT": element == "fp32"}
                | _absent(exps=store, best_index=statistics, bias=bias),
                {},
                element,
                shape.warps,
                shape.stages,
            )
    for capped, bias, heavy, precision in _ways(element):  # with a cap all are heavy
        shape = _tiles(chip, element, heavy).flagged
        yield Variant(
            reanchor.largest_logit_kernel,
            _label("largest_logit", heavy=heavy, bias=bias, capped=capped)
            + _suffix(precision, shape),
            _blocks(shape, capped, precision) | _absent(bias=bias),
            {},
            element,
            shape.warps,
            shape.stages,
        )


def _ways(element: str) -> Iterator[tuple[bool, bool, bool, str]]:
    """Whether there is a cap, a bias, a ragged slice (under a cap, any); and the precision."""
    for precision in ("ieee", "tf32") if element == "fp32" else ("ieee",):
        for capped, bias in itertools.product(_ON_OFF, _ON_OFF):
            for ragged in (True,) if capped else _ON_OFF:
                yield capped, bias, ragged, precision


def _label(name: str, **flags: bool) -> str:
    return " ".join([name, *(flag for flag, on in flags.items() if on)])


def _suffix(precision: str, shape: tiles.TileShape) -> str:
    return " tf32" * (precision == "tf32") + " flat" * shape.flatten


def _absent(**given: bool) -> dict[str, None]:
    return {name: None for name, here in given.items() if not here}


def _tiles(chip: tiles.Chip, element: str, heavy: bool) -> tiles.Tiles:
    return (chip.heavy if heavy else chip.plain)[ELEMENTS[element]]


def _blocks(shape: tiles.TileShape, capped: bool, precision: str) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": shape.rows,
        "BLOCK_COLS": shape.cols,
        "BLOCK_WIDTH": shape.width,
        "CAPPED": capped,
        "PRECISION": precision,
    }


def _whole_tiles(
    chip: tiles.Chip, shape: tiles.TileShape, capped: bool, ragged: bool, precision: str
) -> dict[str, Any]:
    return _blocks(shape, capped, precision) | {
        "GROUP_ROWS": shape.group_rows,
        "SLICES": shape.slices,
        "FLATTEN": shape.flatten,
        "DESCRIPTORS": chip.descriptors,
        "RAGGED": ragged,
        "ALIGNED": True,
    }


def _described(
    chip: tiles.Chip, shape: tiles.TileShape, out: str | None
) -> dict[str, tuple[int, int]]:
    if not chip.descriptors:
        return {}
    blocks = {"hidden": (shape.rows, shape.width), "weight": (shape.cols, shape.width)}
    return blocks if out is None else blocks | {out: (shape.rows, shape.slice_cols)}


def probabilities_variant() -> Variant:
    constants = {"BLOCK_COLS": probabilities.COLS, "ALIGNED": True}
    return Variant(probabilities.probabilities_kernel, "probabilities", constants, {}, "fp16")


def _glue(element: str) -> Iterator[Variant]:
    # Hidden states and heads of any width, at any address.
    lies: dict[str, tuple[str, ...]] = {"": ()}
    lies[" odd"] = ("width", "hidden_stride", "weight_stride")
    lies[" unaligned"] = (*lies[" odd"], "hidden", "weight")
    for (lie, unaligned), capped, bias in itertools.product(lies.items(), _ON_OFF, _ON_OFF):
        blocks = {"BLOCK_ROWS": target_logits.ROWS, "BLOCK_WIDTH": target_logits.WIDTH}
        yield Variant(
            target_logits.target_logits_kernel,
            _label("target_logits", bias=bias, capped=capped) + lie,
            blocks | {"CAPPED": capped} | _absent(bias=bias),
            {},
            element,
            unaligned=unaligned,
        )
    for statistics, store, capped in itertools.product(_ON_OFF, _ON_OFF, _ON_OFF):
        constants = {"BLOCK_ROWS": row_scores.ROWS, "CAPPED": capped}
        yield Variant(
            row_scores.row_scores_kernel,
            _label("row_scores", store=store, statistics=statistics, capped=capped),
            constants | _absent(best=statistics, exps=store),
            {},
            element,
        )
    lies = {"": (), " odd": ("width", "matrix_stride", "out_stride")}
    lies[" unaligned"] = (*lies[" odd"], "matrix", "out")
    for lie, unaligned in lies.items():
        yield Variant(
            scale_rows.scale_rows_kernel,
            "scale_rows" + lie,
            {"BLOCK_WIDTH": 1024},
            {},
            element,
            unaligned=unaligned,
        )


def _columns(element: str) -> Iterator[Variant]:
    blocks = {"BLOCK_ROWS": column_sums.ROWS, "BLOCK_COLS": column_sums.COLS}
    for weighted in _ON_OFF:
        yield Variant(
            column_sums.column_sums_kernel,
            _label("column_sums", weighted=weighted),
            blocks | _absent(weights=weighted),
            {},
            element,
            column_sums.WARPS,
        )


def _sums(statistics: bool) -> Iterator[Variant]:
    constants: dict[str, Any] = {"BLOCK_ROWS": row_sums.ROWS, "BLOCK_TILES": row_sums.TILES}
    constants |= _absent(best_index=statistics, out_index=statistics)
    for kernel, name in (
        (row_sums.row_sums_kernel, "row_sums"),
        (reanchor.settle_kernel, "settle"),
    ):
        label = _label(name, statistics=statistics)
        yield Variant(kernel, label, constants, {}, "fp32")
    if not statistics:
        yield Variant(reanchor.anchor_kernel, "anchor", {"BLOCK_ROWS": row_sums.ROWS}, {}, "fp32")
        yield Variant(reanchor.list_flagged_kernel, "list_flagged", {"BLOCK": 1024}, {}, "fp32")


def _divergences(element: str) -> Iterator[Variant]:
    """With the gradient and a bias: without them, it is a part of these."""
    names = ("forward_kl", "reverse_kl", "jsd", "tv", "bhattacharyya")
    for capped in _ON_OFF:
        blocks = {"BLOCK_COLS": divergence_rows.COLS, "CAPPED": capped, "WRITE": True}
        for kind, name in enumerate(names):
            yield Variant(
                divergence_rows.divergence_rows_kernel,
                _label(name, capped=capped),
                blocks | {"KIND": kind, "EXACT": element == "fp32"},
                {},
                element,
                divergence_rows.WARPS,
            )
        kernel = cosine_rows.cosine_rows_kernel
        label = _label("cosine", capped=capped)
        yield Variant(kernel, label, blocks, {}, element, divergence_rows.WARPS)


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
    *("bias", "anchor", "sums", "largest", "sum", "raw", "logit", "best", "factor", "norm", "logp"),
    *("entropy", "grad_logp", "grad_lse", "grad_entropy", "target_logit", "offset", "scores"),
    "weights",
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


def signature(variant: Variant) -> dict[str, tuple[str, bool]]:
    """Of each argument the type that the kernel is compiled for, and if as a multiple of 16."""
    said = {}
    for one in variant.kernel.params:
        type_ = _type(variant, one.name)
        anew = not (one.do_not_specialize or one.do_not_specialize_on_alignment)
        able = type_ == "i32" or type_.startswith("*")
        said[one.name] = type_, able and anew and one.name not in variant.unaligned
    return said


def build(variant: Variant, capability: int) -> Any:
    """The variant, compiled for the capability."""
    said = signature(variant)
    return triton.compile(
        ASTSource(
            variant.kernel,
            {name: type_ for name, (type_, _) in said.items()},
            variant.constants,
            {
                (at,): [["tt.divisibility", 16]]
                for at, (_, aligned) in enumerate(said.values())
                if aligned
            },
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )


def disassemble(compiled: Any) -> str:
    return _dump(compiled.asm["cubin"], "-sass")


def read(variant: Variant, capability: int) -> Resources:
    """What the machine code of the variant says, compiled for the capability."""
    compiled = build(variant, capability)
    usage = _dump(compiled.asm["cubin"], "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers:\n{usage}")
    code = disassemble(compiled)
    counts = instructions.count(code)
    elements = variant.constants.get("BLOCK_ROWS", 0) * variant.constants.get("BLOCK_COLS", 0)
    arithmetic = sum(counts.get(name, 0) for name in instructions.ARITHMETIC)
    return Resources(
        variant.name,
        capability,
        int(found[1]),
        int(found[2]),
        instructions.local_accesses(code),
        compiled.metadata.shared,
        counts.get(MATRIX_INSTRUCTION[capability], 0),
        counts.get("UTMALDG", 0),
        instructions.products_in_flight(code),
        instructions.loads_beside_epilogue(code),
        round(arithmetic * 32 * variant.warps / elements, 2) if elements else 0.0,
    )


def _dump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout
