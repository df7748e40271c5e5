# SPDX-License-Identifier: Apache-2.0
"""What becomes of a head's outputs, from known ones: scales, caps and slices are found to
rounding, anything else is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpref.integrations.causal_lm.transform import LogitTransform, fit, known_outputs

V = 45
CPU = torch.device("cpu")


def measured(transform: Callable[[Tensor], Tensor], columns: int = V) -> LogitTransform | str:
    outputs = known_outputs(4, columns, CPU)
    return fit(outputs, transform(outputs))


def test_every_column_meets_every_row_differently() -> None:
    outputs = known_outputs(4, 1000, CPU)[0]
    assert outputs.shape == (4, 1000)
    assert all(row.unique().numel() > 30 for row in outputs)
    assert not any((outputs[i] == outputs[j]).any() for i in range(4) for j in range(i))


@pytest.mark.parametrize("cast", [torch.float64, torch.float32, torch.bfloat16])
def test_identity_is_exact_in_any_dtype(cast: torch.dtype) -> None:
    assert measured(lambda x: x.to(cast)) == LogitTransform(1.0, None, V)


@pytest.mark.parametrize("scale", [1 / 16, 0.3, 12.8, 1.0])
@pytest.mark.parametrize("softcap", [None, 2.0, 14.3, 50.0])
@pytest.mark.parametrize("cast", [torch.float64, torch.float32])
def test_scale_and_cap(scale: float, softcap: float | None, cast: torch.dtype) -> None:
    def transform(x: Tensor) -> Tensor:
        x = x.to(cast) * scale
        return x if softcap is None else torch.tanh(x / softcap) * softcap

    found = measured(transform)
    assert isinstance(found, LogitTransform)
    assert found.scale == pytest.approx(scale, rel=2e-7)
    assert found.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-7))


def test_slice() -> None:
    assert measured(lambda x: (x * 0.5)[..., :37]) == LogitTransform(0.5, None, 37)


def test_a_vocabulary_wider_than_the_measure() -> None:
    assert measured(lambda x: x, columns=3000) == LogitTransform(1.0, None, 3000)


def test_it_transforms() -> None:
    x = torch.tensor([0.5, -3.0, 7.0], device="cpu", dtype=torch.float64)
    expected = 2 * torch.tanh(0.3 * x[:2] / 2)
    torch.testing.assert_close(LogitTransform(0.3, 2.0, 2)(x), expected)


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "a bias": lambda x: x + torch.linspace(0, 1, V, dtype=x.dtype),
    "a small bias": lambda x: x + 1e-3,
    "a scale of one column": lambda x: x * torch.where(torch.arange(V) == 7, 1.01, 1.0),
    "another cap of one column": lambda x: (
        torch.tanh(x / 30) * torch.where(torch.arange(V) == 7, 29.0, 30.0)
    ),
    "a cut": lambda x: x.clamp(-30, 30),
    "another shape of cap": lambda x: 30 * (x / 30) / (1 + (x / 30).abs()),
    "a cap on one side": lambda x: torch.where(x > 0, 30 * torch.tanh(x / 30), x),
    "other columns": lambda x: x.roll(1, -1),
    "the last columns": lambda x: x[..., 5:],
    "softmax": lambda x: x.log_softmax(-1),
    "a sign": lambda x: -x,
    "zeros": lambda x: x * 0,
    "NaN": lambda x: x * float("nan"),
    "excluded ids": lambda x: x.masked_fill(torch.arange(V) == 3, -torch.inf),
    "more entries": lambda x: torch.cat([x, x], -1),
    "other rows": lambda x: x[:, :2],
    "rows exchanged": lambda x: x.roll(1, 1),
    "a scale in few digits": lambda x: (x * 0.3).bfloat16(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_anything_else_is_refused(name: str) -> None:
    found = measured(UNKNOWN[name])
    assert isinstance(found, str), found


def test_a_vocabulary_too_small_to_measure() -> None:
    assert "too small" in str(measured(lambda x: x, columns=1))
