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
ELEMENTS = ("bf16", "fp16", "fp32")
# Of these one form is compiled, which the others are parts of.
REPRESENTED = ("divergence_rows_kernel", "cosine_rows_kernel")
capabilities = pytest.mark.parametrize(
    "capability",
    [
        90,
        pytest.param(120, marks=pytest.mark.slow),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (80, 100)),
    ],
)


@functools.cache
def record(capability: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.kernels.launches", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@capabilities
def test_a_kernel_has_few_forms_whatever_the_number_of_rows(capability: int) -> None:
    """1 to 64 rows: some are multiples of 16, some not, and one is 1."""
    for element in ELEMENTS:
        cases = record(capability)[element]["forms"]
        assert len(cases) >= 14
        for case, kernels in cases.items():
            for kernel, forms in kernels.items():
                # Two where slabs of the vocabulary end as tiles do, but for the last one.
                most = 2 if case == "small budget" else 1
                assert len(forms) <= most, (element, case, kernel, forms)


@capabilities
def test_what_is_launched_is_compiled(capability: int) -> None:
    for element in ELEMENTS:
        recorded = record(capability)[element]
        assert recorded["launched"] > 80
        missing = [one for one in recorded["not compiled"] if one[0] not in REPRESENTED]
        assert not missing, missing[:3]


def test_a_call_launches_what_it_should() -> None:
    """So that the above is about something."""
    cases = record(90)["bf16"]["forms"]
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
    halves = record(90)["fp16"]["forms"]
    assert set(halves["keep"]) == set(cases["keep"]) | {"probabilities_kernel"}
