# SPDX-License-Identifier: Apache-2.0
"""Device functions: exponentials of differences from an anchor, as cheap as their inputs allow."""

import triton
import triton.language as tl

from .logit_map import LOG2E, exp2_flushed, exp_difference, map_logits

INF = tl.constexpr(float("inf"))


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
        e = exp2_flushed(x)
    return x, e, t, slope
