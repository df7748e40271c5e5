# SPDX-License-Identifier: Apache-2.0
"""Every kernel as it is launched, compiled for each chip: it spills nothing, fits shared memory,
and multiplies on the matrix units."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastpref.kernels import probabilities, tiles

PRODUCTS = ("linear_exp", "linear_grad", "reanchor", "largest_logit")


# Compiles some of the variants, in two processes.
CODE = """
import json, re, sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fastpref.kernels import resources, variants

capability, element, pattern = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def read(at):
    variant = list(variants.variants(capability, element))[at]
    return asdict(resources.read(variant, capability)) | {"descriptors": len(variant.descriptors)}

if __name__ == "__main__":
    names = [one.name for one in variants.variants(capability, element)]
    wanted = [at for at, name in enumerate(names) if re.fullmatch(pattern, name)]
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(read, wanted))))
"""
# What most calls launch, and the forms that take most registers.
SAMPLE = (
    "linear_exp|linear_exp store( flat)?|linear_exp store statistics bias ragged( capped)?"
    "|linear_grad|linear_grad entropy lse bias ragged( capped)?|reanchor store"
    "|reanchor store statistics bias ragged|largest_logit|target_logits|row_sums statistics"
    "|sum_flagged statistics|row_scores store statistics|anchor|list_flagged|scale_rows"
    "|squared_errors( masked)?|error_gradient masked( short)?|join_parts"
)


def compile_some(capability: int, element: str, pattern: str, tmp_path: Path) -> list[dict]:
    # A file, which the processes of the pool can import.
    file = tmp_path / "compile_some.py"
    file.write_text(CODE)
    command = [sys.executable, str(file), str(capability), element, pattern]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "capability, element, pattern",
    [
        pytest.param(90, "bf16", SAMPLE, marks=pytest.mark.slow),
        (120, "fp32", "linear_exp store( statistics)?( tf32)?|reanchor store"),
        *(
            pytest.param(capability, element, ".*", marks=pytest.mark.slow)
            for capability in tiles.CHIPS
            for element in ("bf16", "fp16", "fp32")
        ),
    ],
)
def test_machine_code(capability: int, element: str, pattern: str, tmp_path: Path) -> None:
    chip = tiles.CHIPS[capability]
    rows = compile_some(capability, element, pattern, tmp_path)
    assert len(rows) >= 5
    for row in rows:
        what = f"sm_{capability} {row['name']}: {row}"
        assert 0 < row["registers"] <= 255 and row["stack"] == row["local_accesses"] == 0, what
        assert row["shared_memory"] <= chip.shared_memory, what
        product = row["name"].split()[0] in PRODUCTS
        # Float32 is multiplied exactly, on the ordinary units, unless TF32 is allowed.
        on_matrix_units = product and (element != "fp32" or "tf32" in row["name"])
        assert (row["matrix_instructions"] > 0) == on_matrix_units, what
        assert (row["tensor_loads"] > 0) == (row["descriptors"] > 0), what
        if capability == 90 and on_matrix_units and row["descriptors"]:
            # One product is under way while the next is issued; to be rounded to TF32, inputs pass
            # through registers, for which it is waited.
            assert row["products_in_flight"] == (element != "fp32"), what
        if row["descriptors"] and chip.flattenable and on_matrix_units:
            assert row["loads_beside_epilogue"] == row["name"].endswith("flat"), what


# Arithmetic instructions to an element, all of the kernel: what was measured, and one tenth. Of
# them one multiplies and adds, one is the exponential, two are the target's mask, one adds up.
@pytest.mark.heavy
@pytest.mark.parametrize(
    "name, most", [("linear_exp", 7.7), ("linear_exp store", 8.5), ("linear_grad", 13.3)]
)
def test_the_epilogue_is_lean(name: str, most: float, tmp_path: Path) -> None:
    (row,) = compile_some(90, "bf16", name, tmp_path)
    assert 5 < row["epilogue"] <= most


@pytest.mark.heavy
def test_halves_are_read_and_written_16_bytes_at_a_time() -> None:
    """Whatever the number of columns, and with rows that start at odd multiples of 16 bytes."""
    code = (
        "from fastpref.kernels import resources, variants\n"
        "for capability in (80, 90, 100, 120):\n"
        "    variant = variants.probabilities_variant()\n"
        "    print(resources.build(variant, capability).asm['ptx'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wide = probabilities.COLS // (4 * 32 * 8)  # pieces of eight, of a thread
    for access in ("ld", "st"):
        assert done.stdout.count(f"{access}.global.v4.b32") == 4 * wide
        # Seven columns at most are left over, and looked at once.
        assert done.stdout.count(f"{access}.global.b16") == 4


@pytest.mark.heavy
def test_a_target_is_read_before_it_is_overwritten() -> None:
    """By all threads of a program: each loads its product, and one of them stores in its place."""
    code = (
        "from fastpref.kernels import resources, variants\n"
        "for element in ('bf16', 'fp32'):\n"
        "    for variant in variants.rows_in_place(element):\n"
        "        if variant.name == 'exp_rows write statistics':\n"
        "            print(resources.build(variant, 90).asm['ttgir'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    programs = done.stdout.split("tt.func public")[1:]
    assert len(programs) == 2
    for program in programs:
        before = program[: program.index("tt.store")].splitlines()
        loads = [at for at, line in enumerate(before) if "tt.load" in line and ": !tt.ptr" in line]
        assert len(loads) == 3  # target, anchor, product
        assert any("barrier" in line for line in before[loads[-1] :])


@pytest.mark.heavy
def test_tiles_of_flagged_rows_lie_as_those_of_all() -> None:
    for chip in (*tiles.CHIPS.values(), tiles.INTERPRETED):
        for pair in (*chip.plain.values(), *chip.heavy.values()):
            assert pair.ordinary.cols == pair.flagged.cols
            assert pair.ordinary.slices in (1, 2, 4) and pair.flagged.slices in (1, 2, 4)


@pytest.mark.parametrize(
    "capability, known",
    [
        *(((8, minor), 80) for minor in (0, 6, 7, 9)),
        *(((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((11, 0), 100)),
        *(((12, 0), 120), ((12, 1), 120), ((13, 0), None), ((7, 5), None)),
    ],
)
def test_chips(capability: tuple[int, int], known: int | None) -> None:
    expected = None if known is None else tiles.CHIPS[known]
    assert tiles.chip_of(capability) is expected


def test_chips_without_tensor_memory_have_tiles_for_99_kib() -> None:
    assert tiles.CHIPS[120].shared_memory == tiles.CHIPS[80].shared_memory == 99 << 10
    assert not tiles.CHIPS[120].descriptors


def test_flattened() -> None:
    chip = tiles.flattened(tiles.CHIPS[90])
    assert chip.plain[2].ordinary == replace(tiles.CHIPS[90].plain[2].ordinary, flatten=True)
    assert chip.heavy[2].ordinary.flatten and not chip.heavy[2].flagged.flatten
    assert chip.plain[4] == tiles.CHIPS[90].plain[4]
    for other in (80, 100, 120):
        assert tiles.flattened(tiles.CHIPS[other]) == tiles.CHIPS[other]


@pytest.mark.slow
@pytest.mark.heavy
def test_a_tile_too_large_is_said_to_spill() -> None:
    """The reader sees what the limits are for."""
    code = (
        "from dataclasses import replace\n"
        "from fastpref.kernels import resources, tiles, variants\n"
        "shape = replace(tiles.CHIPS[80].plain[2].ordinary, rows=256, cols=256, slices=1)\n"
        "plain = {2: replace(tiles.CHIPS[80].plain[2], ordinary=shape)}\n"
        "chip = replace(tiles.CHIPS[80], plain=plain)\n"
        "variants = variants.products(chip, 'bf16')\n"
        "variant = next(one for one in variants if one.name == 'linear_exp store')\n"
        "print(resources.read(variant, 80).stack)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
