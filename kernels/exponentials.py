# SPDX-License-Identifier: Apache-2.0
"""Device functions: exponentials of differences from an anchor, as cheap as their inputs allow."""

import os

import triton
import triton.language as tl

from .logit_map import exp_difference, map_logits

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def exp2(x):
    """2^x, of which what lies below 2^-126 is 0: one instruction, where tl.exp2 takes four."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def anchored(z, other, anchor, scale, inner, cap, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    """Of raw products z: the difference x of their logits t from the anchor, exp of it, t and the
    map's slope; x is -inf where not ``other``. With EXACT x is in nats and what rounding lost in it
    is recovered; else it is in units of log 2, from one multiplication and addition."""
    t, slope = map_logits(z, scale, inner, cap, CAPPED)
    if EXACT:
        shown = tl.where(other, t, -INF)
        x = shown - anchor
        e = exp_difference(shown, anchor, True)
    else:
        if CAPPED:
            x = tl.fma(t, LOG2E, -anchor * LOG2E)
        else:
            x = tl.fma(z, scale * LOG2E, -anchor * LOG2E)
        x = tl.where(other, x, -INF)
        e = exp2(x)
    return x, e, t, slope
