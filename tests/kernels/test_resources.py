# SPDX-License-Identifier: Apache-2.0
"""Every kernel as it is launched, compiled for each chip: it spills nothing, fits shared memory,
and multiplies on the matrix units."""

import json
import subprocess
import sys

import pytest

from fastpref.kernels import probabilities, tiles

PRODUCTS = ("linear_exp", "linear_grad", "reanchor", "largest_logit")


def compile_all(element: str) -> list[dict]:
    command = [sys.executable, "-m", "fastpref", "kernels", "--json", "--element", element]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "element",
    [
        "bf16",
        pytest.param("fp16", marks=pytest.mark.slow),
        pytest.param("fp32", marks=pytest.mark.slow),
    ],
)
def test_machine_code(element: str) -> None:
    rows = compile_all(element)
    assert {row["capability"] for row in rows} == set(tiles.CHIPS)
    for row in rows:
        what = f"sm_{row['capability']} {row['name']}: {row}"
        assert row["problems"] == [], what
        assert 0 < row["registers"] <= 255 and row["stack"] == 0, what
        assert row["shared_memory"] <= tiles.CHIPS[row["capability"]].shared_memory, what
        product = row["name"].split()[0] in PRODUCTS
        # Float32 is multiplied exactly, on the ordinary units.
        assert (row["matrix_instructions"] > 0) == (product and element != "fp32"), what
        described = row["capability"] >= 90 and row["name"].startswith(
            ("linear_exp", "linear_grad")
        )
        assert (row["tensor_loads"] > 0) == described, what


def test_halves_are_read_and_written_16_bytes_at_a_time() -> None:
    """Whatever the number of columns, and with rows that start at odd multiples of 16 bytes."""
    code = (
        "from fastpref.kernels import resources\n"
        "for capability in (80, 90, 100):\n"
        "    variant = resources.probabilities_variant()\n"
        "    print(resources.build(variant, capability).asm['ptx'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wide = probabilities.COLS // (4 * 32 * 8)  # pieces of eight, of a thread
    for access in ("ld", "st"):
        assert done.stdout.count(f"{access}.global.v4.b32") == 3 * wide
        # Seven columns at most are left over, and looked at once.
        assert done.stdout.count(f"{access}.global.b16") == 3


def test_slices_of_flagged_rows_lie_as_those_of_all() -> None:
    for chip in (*tiles.CHIPS.values(), tiles.INTERPRETED):
        for pair in (*chip.plain.values(), *chip.heavy.values()):
            assert pair.ordinary.slice_cols == pair.flagged.slice_cols
            least = 16 if chip is tiles.INTERPRETED else tiles.LEAST_SLICE
            assert pair.ordinary.slice_cols >= least
            assert pair.ordinary.slices in (1, 2, 4) and pair.flagged.slices in (1, 2, 4)


@pytest.mark.parametrize(
    "capability, known", [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((12, 0), 100)]
)
def test_newer_chips_take_the_newest_known_tiles(capability: tuple[int, int], known: int) -> None:
    assert tiles.chip_of(capability) is tiles.CHIPS[known]


def test_a_tile_too_large_is_said_to_spill() -> None:
    """The reader sees what the limits are for."""
    code = (
        "from dataclasses import replace\n"
        "from fastpref.kernels import resources, tiles\n"
        "shape = replace(tiles.CHIPS[80].plain[2].ordinary, rows=256, cols=256, slices=1)\n"
        "variant = resources._exps(tiles.CHIPS[80], shape, 'bf16', True, False, False)\n"
        "print(resources.read(variant, 80).stack)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
