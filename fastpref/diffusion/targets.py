# SPDX-License-Identifier: Apache-2.0
"""What a network predicts of a noised sample, and one prediction as another.

On a path x_t = alpha x0 + sigma eps a prediction target is u = a x0 + b eps. With
D = alpha b - sigma a it says all of the sample:

    x0 = (b x_t - sigma u) / D,   eps = (alpha u - a x_t) / D

and so is any other target u' = a' x0 + b' eps:

    u' = ((a' b - a b') x_t + (alpha b' - sigma a') u) / D

of which the last factor, squared, is the squared error in u' to that in u.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..objectives.checks import as_python, is_number
from ..objectives.reading import readable
from .backends import exact_dtype
from .checks import check_predictions

Number: TypeAlias = float | Tensor
Path: TypeAlias = tuple[Number, Number]


def _exact(name: str, value: Any) -> Number:
    """``value`` in Python's own float, or of float32 at least, checked."""
    if is_number(value):
        number = float(as_python(value))
        if number - number != 0:
            raise ValueError(f"{name} must be finite, got {number}")
        return number
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number or a tensor of one a sample, got {type(value).__name__}"
        )
    if value.dim() > 1 or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(
            f"{name} must be a real number or have shape (B,), one a sample, got "
            f"{tuple(value.shape)} of {value.dtype}"
        )
    return value if value.dtype == torch.float64 else value.float()


@dataclass(frozen=True, eq=False)
class PredictionTarget:
    """u = a x0 + b eps, of data x0 and noise eps.

    Attributes:
        a: a number, or a tensor of one or of (B,), which may train.
        b: the same of the noise.
    """

    a: Number
    b: Number

    def __post_init__(self) -> None:
        _exact("a", self.a)
        _exact("b", self.b)


NOISE = PredictionTarget(0, 1)
DATA = PredictionTarget(1, 0)
FLOW = PredictionTarget(-1, 1)  # the velocity of a straight path


def velocity(alpha: Number, sigma: Number) -> PredictionTarget:
    """v = alpha eps - sigma x0 (Salimans and Ho 2022, arXiv:2202.00512) at that point of a path;
    numbers or (B,)."""
    return PredictionTarget(-_exact("sigma", sigma), _exact("alpha", alpha))


def k_prediction(k: Number) -> PredictionTarget:
    """u = k x0 - (1 - k) eps (k-Diff, arXiv:2601.21419): data at k = 1, the negative velocity of a
    straight path, halved, at 1/2, negative noise at 0. ``k`` is a number or a tensor that trains.
    """
    return PredictionTarget(_exact("k", k), k - 1)


def convert(
    prediction: Tensor,
    noisy: Tensor,
    *,
    path: Path,
    source: PredictionTarget,
    target: PredictionTarget,
) -> Tensor:
    """A prediction of ``source`` as the prediction of ``target`` that says the same.

    Args:
        prediction: (B, ...), float16, bfloat16, float32 or float64.
        noisy: like it, x_t, what was predicted from.
        path: (alpha, sigma), numbers or (B,) each: x_t = alpha x0 + sigma eps.
        source, target: what is predicted, and what is wanted.

    Returns:
        Like ``prediction``, float64 where it or ``noisy`` is and float32 otherwise. Differentiable
        with respect to every tensor.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; where ``source`` says nothing of
            the sample, D = 0, if that can be seen without waiting for a device.
    """
    check_predictions(prediction=prediction, noisy=noisy)
    exact = exact_dtype(prediction, noisy)
    given = _parts(path, source, target)
    for name, one in given.named():
        if isinstance(one, Tensor) and one.dim() and one.shape[0] not in (1, prediction.shape[0]):
            raise ValueError(
                f"{name} must be a number or have shape ({prediction.shape[0]},), one a sample, "
                f"got shape {tuple(one.shape)}"
            )
    determinant = given.determinant()

    def times(coefficient: Number, values: Tensor) -> Tensor:
        if isinstance(coefficient, Tensor):
            coefficient = coefficient.to(exact)
            if coefficient.dim():
                coefficient = coefficient.view(-1, *[1] * (values.dim() - 1))
        return coefficient * values.to(exact)

    of_noisy = (given.a_out * given.b - given.a * given.b_out) / determinant
    return times(of_noisy, noisy) + times(given.factor() / determinant, prediction)


def error_weight(path: Path, source: PredictionTarget, target: PredictionTarget) -> Number:
    """How many times its squared error in ``source`` a prediction's squared error in ``target`` is:
    ((alpha b' - sigma a') / D)^2.

    Args:
        path: (alpha, sigma), numbers or (B,) each.
        source, target: what is predicted, and in what errors are wanted.

    Returns:
        A number where all are, else a tensor of one or of (B,), differentiable: given as ``weight``
        to ``log_ratio`` it brings a k that trains its gradient.

    Raises:
        TypeError, ValueError: as ``convert``.
    """
    given = _parts(path, source, target)
    ratio = given.factor() / given.determinant()
    return ratio * ratio


@dataclass(frozen=True)
class _Parts:
    """Of a path, and of two targets on it."""

    alpha: Number
    sigma: Number
    a: Number
    b: Number
    a_out: Number
    b_out: Number

    def named(self) -> list[tuple[str, Number]]:
        names = ("path's alpha", "path's sigma", "source's a", "source's b")
        values = (self.alpha, self.sigma, self.a, self.b, self.a_out, self.b_out)
        return list(zip((*names, "target's a", "target's b"), values, strict=True))

    def determinant(self) -> Number:
        """D of the source, checked."""
        found = self.alpha * self.b - self.sigma * self.a
        zero = found == 0
        if isinstance(zero, Tensor):
            zero = readable(zero) and bool(zero.any())
        if zero:
            raise ValueError(
                "source and path must determine the sample: D = alpha b - sigma a must not be 0, "
                f"got alpha {_said(self.alpha)}, sigma {_said(self.sigma)}, a {_said(self.a)}, b "
                f"{_said(self.b)}; leave out that end of the path, or predict something else there"
            )
        return found

    def factor(self) -> Number:
        return self.alpha * self.b_out - self.sigma * self.a_out


def _parts(path: Any, source: Any, target: Any) -> _Parts:
    if not isinstance(path, tuple | list) or len(path) != 2:
        raise TypeError(f"path must be the pair (alpha, sigma), got {path!r}")
    for name, one in (("source", source), ("target", target)):
        if not isinstance(one, PredictionTarget):
            raise TypeError(
                f"{name} must be a PredictionTarget, got {type(one).__name__}; NOISE, DATA, FLOW, "
                "velocity() and k_prediction() are some"
            )
    alpha, sigma = _exact("path's alpha", path[0]), _exact("path's sigma", path[1])
    numbers = (_exact("", one) for one in (source.a, source.b, target.a, target.b))
    parts = _Parts(alpha, sigma, *numbers)
    lengths = {one.shape[0] for _, one in parts.named() if isinstance(one, Tensor) and one.dim()}
    if len(lengths - {1}) > 1:
        said = ", ".join(f"{name} {_said(one)}" for name, one in parts.named())
        raise ValueError(f"path, source and target must be of one number of samples, got {said}")
    return parts


def _said(value: Number) -> str:
    if not isinstance(value, Tensor):
        return f"{value:g}"
    return f"of shape {tuple(value.shape)}" if value.dim() else "a tensor"
