# SPDX-License-Identifier: Apache-2.0
"""The passes over rows in machine code: 16 bytes an access, nothing spilled, few instructions."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.heavy

CODE = """
import json, sys
from dataclasses import asdict
from fastpref.kernels import resources, variants

capability, element, wanted = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
found = {}
for variant in variants.rows_in_place(element):
    if variant.name in wanted or wanted == ["all"]:
        found[variant.name] = asdict(resources.read(variant, capability))
print(json.dumps(found))
"""
# Instructions to an element: what was measured for sm_90, and one tenth. One widens, one multiplies
# and adds, two are the target's, one looks for the largest, one is the exponential, one adds up.
MOST = {
    "exp_rows": 10.8,
    "exp_rows write": 13.4,
    "exp_rows statistics": 19.5,
    "exp_rows write statistics": 22.0,
    "logit_grad_rows": 9.9,
    "logit_grad_rows entropy": 14.3,
    # A map of its own is read once a row.
    "exp_rows write by_row": 13.4,
    "logit_grad_rows by_row": 9.9,
}


def read(capability: int, element: str, names: str) -> dict[str, dict]:
    command = [sys.executable, "-c", CODE, str(capability), element, names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_few_instructions_and_wide_accesses() -> None:
    found = read(90, "bf16", ",".join(MOST))
    assert set(found) == set(MOST)
    for name, most in MOST.items():
        # Of a loop that reads less than 16 bytes at a time it would be 0.
        assert 0 < found[name]["row_loop"] <= most, name
        assert found[name]["stack"] == found[name]["local_accesses"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("element", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_nothing_spills(capability: int, element: str) -> None:
    found = read(capability, element, "all")
    assert len(found) == (80 if element == "fp16" else 96)
    for name, row in found.items():
        assert row["stack"] == row["local_accesses"] == 0, name
        if name.startswith(("exp_rows", "logit_grad_rows")):
            assert row["row_loop"] > 0, name
