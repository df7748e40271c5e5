# SPDX-License-Identifier: Apache-2.0
"""Device functions on a tile of raw products: the logit map, and exponentials about an anchor.

    t = scale z                                without a cap
    t = cap tanh(scale z / cap),   slope = 1 - tanh^2      with one

z is the product plus the bias, ``inner`` is scale / cap.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tanh_and_slope(x):
    """tanh x and 1 - tanh^2 x, both without cancellation."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    # 1 - e would cancel near 0: the Taylor series there, 2e-9 off at 1/4.
    square = x * x
    series = 1.0 + square * (
        -1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))
    )
    inverse = 1.0 / (1.0 + e)
    far = (1.0 - e) * inverse
    tanh = tl.where(magnitude < 0.25, x * series, tl.where(x < 0, -far, far))
    return tanh, 4.0 * e * inverse * inverse


@triton.jit
def map_of_row(scale, inner, cap, row, BY_ROW: tl.constexpr):
    """Numbers, or where each row has its own, those of ``row``."""
    if BY_ROW:
        scale, inner, cap = tl.load(scale + row), tl.load(inner + row), tl.load(cap + row)
    return scale, inner, cap


@triton.jit
def map_logits(z, scale, inner, cap, CAPPED: tl.constexpr):
    """Logits and slopes of raw products ``z``."""
    if CAPPED:
        tanh, slope = tanh_and_slope(z * inner)
        return cap * tanh, slope
    return z * scale, z


@triton.jit
def exp_difference(t, anchor, EXACT: tl.constexpr):
    """exp(t - anchor). With ``EXACT``, what rounding lost in the difference is recovered (Knuth's
    two-sum): twenty nats apart it would cost a float32 result its last four bits."""
    x = t - anchor
    e = tl.exp(x)
    if EXACT:
        back = x - t
        lost = (t - (x - back)) - (anchor + back)
        e = tl.where(e > 0, e + e * lost, e)
    return e


@triton.jit
def exp2_flushed(x):
    """2^x in one instruction, where a denormal counts as 0. So does tl.exp2, but around it the
    compiler then takes more registers (linear_exp store on sm_90: 249 instead of 187)."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def binary_exponents(z, t, anchor, scale, CAPPED: tl.constexpr):
    """(t - anchor) / log 2 of logits (ROWS, COLS) and anchors (ROWS,): without a cap one fused
    operation on the raw product."""
    below = (anchor * -LOG2E)[:, None]
    if CAPPED:
        return t * LOG2E + below
    return z * (scale * LOG2E) + below


@triton.jit
def logits_above(
    z,  # (ROWS, COLS) raw products
    anchor,  # (ROWS,)
    scale,
    inner,
    cap,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Of raw products: logits t, slopes, t - anchor, and exp of that; without ``EXACT`` as exact as
    the products of 16-bit inputs."""
    t, slope = map_logits(z, scale, inner, cap, CAPPED)
    if EXACT:
        x = t - anchor[:, None]
        return t, slope, x, exp_difference(t, anchor[:, None], True)
    power = binary_exponents(z, t, anchor, scale, CAPPED)
    return t, slope, power * LN2, exp2_flushed(power)


@triton.jit
def load_logits(
    row, bias, cols, columns, scale, inner, cap, CAPPED: tl.constexpr, OUTSIDE: tl.constexpr
):
    """Logits and slopes of columns ``cols``; ``OUTSIDE`` beyond the row."""
    inside = cols < columns
    z = tl.load(row + cols, inside, 0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + cols, inside, 0.0)
    t, slope = map_logits(z, scale, inner, cap, CAPPED)
    return tl.where(inside, t, OUTSIDE), slope


@triton.jit
def store_gradient(row, cols, columns, gradient, slope, scale, CAPPED: tl.constexpr):
    value = gradient * scale
    if CAPPED:
        value *= slope
    tl.store(row + cols, value.to(row.dtype.element_ty), cols < columns)
