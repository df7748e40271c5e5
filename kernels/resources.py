# SPDX-License-Identifier: Apache-2.0
"""What the kernels take of a chip, read from machine code that is compiled for it without one.

Registers and stack come from the compiler's report, instructions from the disassembly, by the
cuobjdump that Triton brings; shared memory from Triton.
"""

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import column_sums, exp_rows, instructions, join_shares, squared_errors
from .variants import Variant

# In the disassembly, by compute capability. Float32 is multiplied on the ordinary units, exactly,
# unless TF32 is allowed.
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


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
    row_loop: float  # instructions to an element of a row; 0: no pass over rows
    seconds: float  # of its compilation; next to nothing where Triton has it in its cache


_POINTERS = {
    "target": "*i64",
    "column": "*i64",
    "out_index": "*i64",
    "flag": "*i8",
    "flagged": "*i32",
    "count": "*i32",
    "mask": "*u8",
}
_FLOATS = (
    *("bias", "anchor", "sums", "largest", "sum", "raw", "logit", "best", "factor", "norm", "logp"),
    *("entropy", "grad_logp", "grad_lse", "grad_entropy", "target_logit", "offset", "scores"),
    "weights",
    *("student_bias", "teacher_bias", "values"),
)
_ERRORS = (squared_errors.squared_errors_kernel, squared_errors.error_gradient_kernel)
_MATRICES = ("hidden", "weight", "exps", "grads", "matrix", "student", "teacher", "tile", "model")
_PREDICTIONS = ("reference", "target")
_ROWS = (exp_rows.exp_rows_kernel, join_shares.join_shares_kernel)
# Their results are sums in float32.
_SUMS = (*_ROWS, squared_errors.join_parts_kernel)
_MAP = ("scale", "inner", "cap")
_NUMBERS = (*_MAP, "student_weight", "teacher_weight")


def _type(variant: Variant, argument: str) -> str:
    if argument in variant.constants:
        return "constexpr"
    if argument in variant.descriptors:
        rows, cols = variant.descriptors[argument]
        return f"tensordesc<{variant.element}[{rows}, {cols}]>"
    if argument in _PREDICTIONS and variant.kernel in _ERRORS:
        return f"*{variant.element}"
    if argument in _POINTERS:
        return _POINTERS[argument]
    if argument == "best_index":
        return "*i64" if variant.kernel in _ROWS else "*i32"
    if argument in _FLOATS:
        return "*fp32"
    if argument in _MATRICES:
        return f"*{variant.element}"
    if argument == "out" and variant.kernel is column_sums.column_sums_kernel:
        return "*fp64"
    if argument == "out":  # of sums in float32, or a matrix
        return "*fp32" if variant.kernel in _SUMS else f"*{variant.element}"
    if argument in _MAP and variant.constants.get("BY_ROW"):
        return "*fp32"
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
        options={
            "num_warps": variant.warps,
            "num_stages": variant.stages,
            "maxnreg": variant.registers,
        },
    )


def disassemble(compiled: Any) -> str:
    return _dump(compiled.asm["cubin"], "-sass")


def read(variant: Variant, capability: int) -> Resources:
    """What the machine code of the variant says, compiled for the capability."""
    begun = time.perf_counter()
    compiled = build(variant, capability)
    seconds = time.perf_counter() - begun
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
        round(instructions.of_row_loop(code), 2),
        round(seconds, 2),
    )


def _dump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout
