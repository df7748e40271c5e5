# SPDX-License-Identifier: Apache-2.0
"""Exact derivatives of float64 numpy formulas by complex step, and functions that survive it.

A formula is evaluated at x + i h with h = 1e-30: the real part is its value and imag / h its
derivative, to float64 rounding, since no difference is taken. That asks of every step that it is
analytic, or that it branches on the real part only. The arithmetic of numpy, `np.exp`, `np.log`,
`np.expm1`, `np.where`, `np.sum` and `np.mean` do; `abs`, `max`, comparisons and `np.log1p` do not:
use the functions here, which take real input (and give real output) or complex input.
"""

from collections.abc import Callable, Sequence

import numpy as np

STEP = 1e-30


def gradient(
    function: Callable[..., np.ndarray], arrays: Sequence[np.ndarray], weights: np.ndarray | float
) -> list[np.ndarray]:
    """d sum(weights * function(*arrays)) / d array, for every array.

    `function` returns the losses, or a tuple that begins with them.
    """
    arrays = [np.asarray(array, dtype=np.float64) for array in arrays]
    gradients = []
    for position, array in enumerate(arrays):
        slopes = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            moved = array.astype(np.complex128)
            moved[index] += 1j * STEP
            result = function(*arrays[:position], moved, *arrays[position + 1 :])
            losses = result[0] if isinstance(result, tuple) else result
            slopes[index] = np.sum(weights * np.imag(losses)) / STEP
        gradients.append(slopes)
    return gradients


def frozen(x):
    """Stop-gradient: the real part only."""
    return np.real(x)


def _carry(x, value, slope):
    """`value`, with the imaginary part of x times `slope` where x is complex."""
    return value + 1j * (slope * np.imag(x)) if np.iscomplexobj(x) else value


def _sigmoid(x):
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def sigmoid(x):
    real = np.real(x)
    return _carry(x, _sigmoid(real), _sigmoid(real) * _sigmoid(-real))


def softplus(x):
    """log(1 + e^x)."""
    real = np.real(x)
    return _carry(x, np.maximum(real, 0.0) + np.log1p(np.exp(-np.abs(real))), _sigmoid(real))


def log_sigmoid(x):
    return -softplus(-x)


def log1mexp(x):
    """log(1 - e^x) for x < 0."""
    real = np.real(x)
    near, far = np.maximum(real, -np.log(2.0)), np.minimum(real, -np.log(2.0))
    with np.errstate(divide="ignore"):  # x = 0 gives -inf, with a slope of -inf.
        value = np.where(real > -np.log(2.0), np.log(-np.expm1(near)), np.log1p(-np.exp(far)))
        return _carry(x, value, np.exp(real) / np.expm1(real))


def arctan(x):
    real = np.real(x)
    return _carry(x, np.arctan(real), 1.0 / (1.0 + real**2))


def logsumexp(x, axis=-1, keepdims=False):
    """log sum e^x along an axis; -inf stands for an absent entry, nothing but -inf gives -inf."""
    real = np.real(x)
    top = np.max(real, axis=axis, keepdims=True)
    shifted = np.exp(real - np.where(np.isfinite(top), top, 0.0))
    total = np.sum(shifted, axis=axis, keepdims=True)
    with np.errstate(divide="ignore"):
        value = top + np.log(total)
    if np.iscomplexobj(x):
        softmax = shifted / np.where(total > 0, total, 1.0)
        value = value + 1j * np.sum(softmax * np.imag(x), axis=axis, keepdims=True)
    return value if keepdims else np.squeeze(value, axis=axis)


def log_softmax(x, axis=-1):
    return x - logsumexp(x, axis=axis, keepdims=True)


def softmax(x, axis=-1):
    return np.exp(log_softmax(x, axis=axis))


def relu(x):
    """max(x, 0), with slope 0 at 0."""
    return np.where(np.real(x) > 0, x, 0.0)


def minimum(x, y):
    """The smaller; x where equal."""
    return np.where(np.real(x) <= np.real(y), x, y)


def maximum(x, y):
    """The larger; x where equal."""
    return np.where(np.real(x) >= np.real(y), x, y)


def clip(x, low, high):
    """x limited to [low, high], with slope 1 at the limits; None is no limit."""
    if low is not None:
        x = maximum(x, low)
    if high is not None:
        x = minimum(x, high)
    return x


def absolute(x):
    return np.where(np.real(x) < 0, -x, x)


def sort(x):
    """Ascending by real part, along the last axis; ties keep input order."""
    return np.take_along_axis(x, np.argsort(np.real(x), axis=-1, kind="stable"), axis=-1)


def mean_per_token(total, lengths):
    """total / lengths, and 0 where the length is 0."""
    return np.where(lengths > 0, total, 0.0) / np.maximum(lengths, 1)
