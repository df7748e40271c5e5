# SPDX-License-Identifier: Apache-2.0
"""What the modules say of arguments that do not fit."""

import pytest
import torch

from fastpref.nn import checks

HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(9, 4)
TARGET = torch.zeros(2, 3, dtype=torch.long)
CASES = {
    "swapped": (
        ValueError,
        r"_input must be \(B, T, H\) and target \(B, T\), got \(9, 4\) and \(2, 3\); mind the "
        r"order of the arguments: lin_weight is \(2, 3, 4\)",
        lambda: checks.check_head(WEIGHT, HIDDEN, TARGET),
    ),
    "other targets": (
        ValueError,
        r"got \(2, 3, 4\) and \(2, 2\)",
        lambda: checks.check_head(HIDDEN, WEIGHT, TARGET[:, 1:]),
    ),
    "transposed weight": (
        ValueError,
        r"lin_weight must be \(V, H\) with H = 4 of _input, got \(4, 9\); pass the weight as",
        lambda: checks.check_head(HIDDEN, WEIGHT.t(), TARGET),
    ),
    "no weight": (
        TypeError,
        "lin_weight must be a torch.Tensor, got NoneType",
        lambda: checks.check_head(HIDDEN, None, TARGET),
    ),
    "labels of other tokens": (
        ValueError,
        r"teacher_input must be \(..., H\) and true_labels \(...\), got \(2, 3, 4\) and \(2, 2\)",
        lambda: checks.check_tokens("teacher", HIDDEN, WEIGHT, TARGET[:, 1:]),
    ),
    "weight of a student": (
        ValueError,
        r"student_weight must be \(V, H\) with H = 4 of student_input, got \(9, 3\)",
        lambda: checks.check_tokens("student", HIDDEN, WEIGHT[:, 1:], TARGET),
    ),
    "no reference": (
        ValueError,
        "use_ref_model=True compares with a reference: pass ref_input, got None",
        lambda: checks.check_reference(None, WEIGHT, TARGET),
    ),
    "reference of other rows": (
        ValueError,
        r"ref_input must be \(B, T, H\) and target \(B, T\), got \(1, 3, 4\) and \(2, 3\)",
        lambda: checks.check_reference(HIDDEN[:1], WEIGHT, TARGET),
    ),
    "rows": (
        ValueError,
        r"advantages must be \(2,\) or \(2, 3\), got \(3,\)",
        lambda: checks.check_rows("advantages", torch.zeros(3), (2,), (2, 3)),
    ),
    "no tensor": (
        TypeError,
        "advantages must be a torch.Tensor, got list",
        lambda: checks.check_rows("advantages", [0.0], (1,)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    error, message, call = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_what_fits_passes():
    checks.check_head(HIDDEN, WEIGHT, TARGET)
    checks.check_tokens("student", HIDDEN, WEIGHT, TARGET)
    checks.check_reference(HIDDEN, None, TARGET)
    checks.check_rows("advantages", torch.zeros(2), (2,), (2, 3))
