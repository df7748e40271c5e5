# SPDX-License-Identifier: Apache-2.0
"""What calls launch on a chip: compiled beforehand by tests/kernels/test_resources.py, and not anew
for other numbers of rows. tests/kernels/launches.py records it."""

import functools
import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.heavy

pytest.importorskip("triton")
# Of these one form is compiled, which the others are parts of.
REPRESENTED = ("divergence_rows_kernel", "cosine_rows_kernel")
chips = pytest.mark.parametrize(
    ("capability", "element"),
    [
        pytest.param(capability, element, marks=[] if usual else pytest.mark.slow)
        for capability in (80, 90, 100, 120)
        for element in ("bf16", "fp16", "fp32")
        for usual in [(capability, element) == (90, "bf16")]
    ],
)


@functools.cache
def record(capability: int, element: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.kernels.launches", str(capability), element]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@chips
def test_a_kernel_has_few_forms_whatever_the_number_of_rows(capability: int, element: str) -> None:
    """Some are multiples of 16, some not, and one is 1."""
    cases = record(capability, element)["forms"]
    assert len(cases) >= 14
    for case, kernels in cases.items():
        for kernel, forms in kernels.items():
            # Two where slabs of the vocabulary end as tiles do, but for the last one.
            most = 2 if case == "small budget" else 1
            assert len(forms) <= most, (case, kernel, forms)


@chips
def test_what_is_launched_is_compiled(capability: int, element: str) -> None:
    recorded = record(capability, element)
    assert recorded["launched"] > 80
    missing = [one for one in recorded["not compiled"] if one[0] not in REPRESENTED]
    assert not missing, missing[:3]


def test_a_call_launches_what_it_should() -> None:
    """So that the above is about something."""
    cases = record(90, "bf16")["forms"]
    every = {"target_logits_kernel", "linear_exp_kernel", "row_sums_kernel", "list_flagged_kernel"}
    every |= {"largest_logit_kernel", "anchor_kernel", "reanchor_kernel", "sum_flagged_kernel"}
    every |= {"row_scores_kernel"}
    assert set(cases["no gradient"]) == every
    assert set(cases["keep"]) == every | {"scale_rows_kernel"}
    assert set(cases["recompute"]) == every | {"linear_grad_kernel"}
    rows = {"target_logits_kernel", "exp_rows_kernel", "row_scores_kernel"}
    assert set(cases["rows: no gradient"]) == rows
    # Of a row of 20,000 columns there are several steps, and few rows are split.
    assert set(cases["rows: long"]) == rows | {"join_shares_kernel", "scale_rows_kernel"}
    assert set(cases["rows: recompute"]) == rows | {"logit_grad_rows_kernel"}
    assert set(cases["triton: temperatures"]) == set(cases["rows: keep"])
    assert set(cases["odd width"]) == rows | {"scale_rows_kernel"}
    assert set(cases["divergence"]) >= {"divergence_rows_kernel"}
    assert set(cases["cosine"]) >= {"cosine_rows_kernel"}
    errors = {"squared_errors_kernel", "error_gradient_kernel"}
    assert set(cases["denoising"]) == set(cases["denoising, masked"]) == errors
    assert set(cases["denoising, large"]) == errors | {"join_parts_kernel"}


@pytest.mark.slow
def test_halves_are_made_of_exponentials_in_a_pass_of_their_own() -> None:
    cases, halves = (record(90, element)["forms"]["keep"] for element in ("bf16", "fp16"))
    assert set(halves) == set(cases) | {"probabilities_kernel"}
