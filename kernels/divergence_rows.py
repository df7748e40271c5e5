# SPDX-License-Identifier: Apache-2.0
"""Divergences between a student's and a teacher's row of products, and their gradients in place.

With s, t the logits, q = softmax(s), p = softmax(t), m = (1 - beta) q + beta p:

    forward_kl     D = sum p log(p/q)                                   dD/ds = q - p
    reverse_kl     D = sum q log(q/p)                                   dD/ds = q (log(q/p) - D)
    jsd            D = beta sum p log(p/m) + (1 - beta) sum q log(q/m)
                   dD/ds = (1 - beta) q (log(q/m) - sum q log(q/m))
    tv             D = sum |q - p| / 2                 dD/ds = q (c - sum q c), c = sign(q - p) / 2
    bhattacharyya  D = -log sum sqrt(p q)              dD/ds = (q - r) / 2, r = sqrt(p q) exp(D)

All follow from

    d = log(q/p) = (s - t) - (lse_s - lse_t),   x = -|d|,   greater = max(p, q),
    lesser = greater exp(x),

and sum terms that are not negative, as csrc/cpu/divergence_rows.inl explains. One program takes one
row, in three sweeps: both normalisers, the sums, the gradient. Arithmetic is in float32, that of a
row's few numbers in float64. Bytes: both tiles are read three times, mostly from cache, and the
student's written once.
"""

import triton
import triton.language as tl

from .logit_map import exp_difference, load_logits, map_of_row, store_gradient

COLS, WARPS = 1024, 8  # of one step, of one program
REGISTERS = 128  # of a thread at most; see tiles.py
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
TV = tl.constexpr(3)
BHATTACHARYYA = tl.constexpr(4)
INF = tl.constexpr(float("inf"))


@triton.jit
def decay(x):
    """Of x <= 0: exp(x), exp(x) - 1, and without cancellation exp(x) - 1 - x and
    1 - exp(x) + x exp(x)."""
    e = tl.exp(x)
    near = x > -0.35
    r = tl.where(near, x, 0.0)
    series = 1.0 / 120 + r * (1.0 / 720 + r * (1.0 / 5040 + r * (1.0 / 40320)))
    excess = r * r * (0.5 + r * (1.0 / 6 + r * (1.0 / 24 + r * series)))
    expm1 = tl.where(near, x + excess, e - 1.0)
    # x exp(x) would be NaN at -inf.
    product = tl.where(e == 0.0, 0.0, x * e)
    from_greater = tl.where(near, excess, expm1 - x)
    from_lesser = tl.where(near, r * expm1 - excess, product - expm1)
    return e, expm1, from_greater, from_lesser


@triton.jit
def logarithm(y, total):
    """log(1 + y) of y in [-1, 0], ``total`` = 1 + y; and (1 + y) log(1 + y) - y without
    cancellation, where ``near``."""
    near = y > -0.3
    u = tl.where(near, y, 0.0)
    z = u / (2.0 + u)
    square = z * z
    p = 1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9)))
    # Where both is 0, the product with it counts, not the logarithm.
    far = tl.log(tl.where(total == 0.0, 1.0, total))
    return (
        tl.where(near, 2.0 * z * (1.0 + square * p), far),
        u * z * (1.0 + z * (1.0 + z) * p),
        near,
    )


@triton.jit
def lost_in_sum(a, b):
    """Knuth's two-sum."""
    total = a + b
    back = total - a
    return (a - (total - back)) + (b - back)


@triton.jit
def exp_mean(s, t, anchor):
    """exp((s + t - anchor) / 2)"""
    e = tl.exp((s + t - anchor) / 2)
    # At -inf what was lost is NaN.
    lost = (lost_in_sum(s, t) + lost_in_sum(s + t, -anchor)) / 2
    return tl.where(e > 0, e + e * lost, e)


@triton.jit
def split(value):
    """A float64 number as the sum of two of float32."""
    high = value.to(tl.float32)
    low = (value - high.to(tl.float64)).to(tl.float32)
    return high, tl.where(tl.abs(high) < INF, low, 0.0)


@triton.jit
def subtract(s, t, high, low):
    """s - t - (high + low), with what s - t lost; any number where both are -inf."""
    lost = lost_in_sum(s, -t)
    return (tl.where(s == t, 0.0, s - t) - high) + (tl.where(lost == lost, lost, 0.0) - low)


@triton.jit
def raise_anchor(anchor, parts, best, share):
    """``parts`` of exp(share (t - anchor)) about the larger of two anchors, of which either may be
    -inf."""
    raised = tl.maximum(anchor, best)
    return raised, parts * tl.where(anchor == raised, 1.0, tl.exp(share * (anchor - raised)))


@triton.jit
def normalise(s, anchor, parts, EXACT: tl.constexpr):
    anchor, parts = raise_anchor(anchor, parts, tl.max(s), 1.0)
    return anchor, parts + tl.where(s == -INF, 0.0, exp_difference(s, anchor, EXACT))


@triton.jit
def compare(s, t, a, b, p_scale, q_scale, high, low, EXACT: tl.constexpr):
    """d, x and the greater probability; ``a``, ``b`` the anchors of s and t."""
    d = subtract(s, t, high, low)
    rises = d > 0
    e = exp_difference(tl.where(rises, s, t), tl.where(rises, a, b), EXACT)
    return d, tl.where(rises, -d, d), e * tl.where(rises, q_scale, p_scale)


@triton.jit
def log_shares(d, e, expm1, student_weight, teacher_weight):
    """log(q/m), any number where q is 0; m / greater, its logarithm and its excess over it."""
    of_lesser = tl.where(d > 0, teacher_weight, student_weight)
    total = tl.where(d > 0, student_weight, teacher_weight) + of_lesser * e
    log, excess, near = logarithm(of_lesser * expm1, total)
    share = tl.where(d > 0, -log, tl.where(e == 0.0, 0.0, d - log))
    return share, total, log, excess, near


@triton.jit
def terms(s, t, d, x, greater, shift, student_weight, teacher_weight, KIND: tl.constexpr):
    """Each column's part of D (bhattacharyya: of 1 - sum sqrt(p q)), q - p, the probability that D
    weights with, and what else the gradient takes the mean of.

    Where q is all but 1 somewhere, the gradient there is what remains of that column beside the
    mean: of the last two the sums are in float64, and the products exact."""
    if KIND == BHATTACHARYYA:
        _, root, _, _ = decay(x / 2)
        difference = greater * root * (2.0 + root)
        value = greater * root * root / 2
        weight, part = greater, greater
    else:
        e, expm1, from_greater, from_lesser = decay(x)
        difference = greater * expm1
        weight = greater * tl.where(d > 0, 1.0, e)
        part = weight
        if KIND == FORWARD_KL or KIND == REVERSE_KL:
            if KIND == FORWARD_KL:
                weight = greater * tl.where(d > 0, e, 1.0)
                term = tl.where(d > 0, from_lesser, from_greater)
            else:
                term = tl.where(d > 0, from_greater, from_lesser)
            # Infinite only where the other has no probability at all.
            value = tl.where(term == INF, term, greater * term)
            if KIND == REVERSE_KL:
                exact = (s.to(tl.float64) - t.to(tl.float64)) - shift
                weight = weight.to(tl.float64)
                part = tl.where(weight == 0.0, 0.0, weight * exact)
        elif KIND == JSD:
            share, total, log, excess, near = log_shares(
                d, e, expm1, student_weight, teacher_weight
            )
            weight = weight.to(tl.float64)
            part = weight * share.to(tl.float64)
            of_lesser = tl.where(d > 0, teacher_weight, student_weight)
            far = of_lesser * tl.where(e == 0.0, 0.0, x * e) - total * log
            value = greater * tl.where(near, of_lesser * from_lesser - excess, far)
        else:
            value = difference * -0.5
            # Of the result nothing changes; without it the compiler spills for sm_100.
            weight = weight.to(tl.float64)
            part = weight * tl.where(d > 0, 1.0, tl.where(d < 0, 0.0, 0.5))
    return value, tl.where(d > 0, -difference, difference), weight, part


@triton.jit
def gradients(
    d,
    x,
    greater,
    centred,
    centre,
    centre_low,
    below,
    student_weight,
    teacher_weight,
    KIND: tl.constexpr,
):
    """dD/ds; ``centred`` is log(q/p) - D; ``centre`` + ``centre_low`` the mean of log(q/m); or
    ``centre`` how much of q lies above p, and ``below`` below it."""
    e, expm1, _, _ = decay(x)
    q = greater * tl.where(d > 0, 1.0, e)
    if KIND == FORWARD_KL:
        result = tl.where(d > 0, -greater, greater) * expm1
    elif KIND == REVERSE_KL:
        # Beside an infinite D, that column's own part of it remains.
        result = tl.where(q == 0.0, 0.0, q * tl.where(d == INF, d, centred))
    elif KIND == JSD:
        share, _, _, _, _ = log_shares(d, e, expm1, student_weight, teacher_weight)
        result = student_weight * q * ((share - centre) - centre_low)
    else:
        result = q * tl.where(d > 0, below, tl.where(d < 0, -centre, (below - centre) / 2))
    return result


@triton.jit
def divergence_rows_kernel(
    student,  # (N, V), becomes the gradient with WRITE
    teacher,  # (N, V)
    student_bias,  # (V,) float32, or None
    teacher_bias,  # (V,) float32, or None
    values,  # (N,) float32
    columns,
    student_stride,
    teacher_stride,
    scale,  # a number or with BY_ROW (N,) float32, and so the next two
    inner,
    cap,
    student_weight,  # 1 - beta
    teacher_weight,  # beta
    KIND: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    CAPPED: tl.constexpr,
    BY_ROW: tl.constexpr,
    EXACT: tl.constexpr,
):
    # Else whether there are any is looked at before each loop, by a predicate that is spilled.
    tl.assume(columns > 0)
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    scale, inner, cap = map_of_row(scale, inner, cap, row, BY_ROW)
    lanes = tl.arange(0, BLOCK_COLS)
    a = -INF
    b = -INF
    c = -INF  # anchor of s + t
    student_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    teacher_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    mean_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    for first in range(0, columns, BLOCK_COLS):
        s, _ = load_logits(
            student, student_bias, first + lanes, columns, scale, inner, cap, CAPPED, -INF
        )
        t, _ = load_logits(
            teacher, teacher_bias, first + lanes, columns, scale, inner, cap, CAPPED, -INF
        )
        a, student_parts = normalise(s, a, student_parts, EXACT)
        b, teacher_parts = normalise(t, b, teacher_parts, EXACT)
        if KIND == BHATTACHARYYA:
            c, mean_parts = raise_anchor(c, mean_parts, tl.max(s + t), 0.5)
            mean_parts += tl.where(s + t == -INF, 0.0, exp_mean(s, t, c))
    student_sum = tl.sum(student_parts).to(tl.float64)
    teacher_sum = tl.sum(teacher_parts).to(tl.float64)
    q_scale = 1.0 / student_sum.to(tl.float32)
    p_scale = 1.0 / teacher_sum.to(tl.float32)
    shift = a.to(tl.float64) - b.to(tl.float64) + (tl.log(student_sum) - tl.log(teacher_sum))
    high, low = split(shift)
    if KIND == BHATTACHARYYA:
        mean_sum = tl.sum(mean_parts).to(tl.float64)
        shared = mean_sum > 0.0
        safe = tl.where(shared, mean_sum, 1.0)
        apart = (a.to(tl.float64) - c.to(tl.float64) + b.to(tl.float64)) * 0.5
        apart += tl.log(student_sum * teacher_sum) * 0.5 - tl.log(safe)

    value_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    excess_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    CENTRED: tl.constexpr = KIND == REVERSE_KL or KIND == JSD or KIND == TV
    weight_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float64 if CENTRED else tl.float32)
    other_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float64)
    for first in range(0, columns, BLOCK_COLS):
        s, _ = load_logits(
            student, student_bias, first + lanes, columns, scale, inner, cap, CAPPED, -INF
        )
        t, _ = load_logits(
            teacher, teacher_bias, first + lanes, columns, scale, inner, cap, CAPPED, -INF
        )
        d, x, greater = compare(s, t, a, b, p_scale, q_scale, high, low, EXACT)
        value, excess, weight, other = terms(
            s, t, d, x, greater, shift, student_weight, teacher_weight, KIND
        )
        value_parts += value
        excess_parts += excess
        weight_parts += weight
        if CENTRED:
            other_parts += other
    total = tl.sum(value_parts).to(tl.float64)
    excess = tl.sum(excess_parts).to(tl.float64)
    weight = tl.sum(weight_parts).to(tl.float64)
    # 1 / weight, but for the square of its distance from 1.
    inverse_weight = 2.0 - weight
    mean = tl.sum(other_parts) * inverse_weight
    value = total
    middle = shift + excess
    r_scale = 0.0
    if KIND == FORWARD_KL or KIND == REVERSE_KL:
        value = total * inverse_weight
        if KIND == REVERSE_KL:
            middle = shift + mean
        # The sums of jsd and tv belong to the shift that they were formed with.
        high, low = split(shift + excess)
    if KIND == TV:
        value = total - excess * (mean - 0.5)
    if KIND == BHATTACHARYYA:
        missing = tl.minimum(tl.sum(value_parts), 0.5)
        log, _excess, _near = logarithm(-missing, 1.0 - missing)
        value = tl.where(total < 0.5, -log.to(tl.float64), apart)
        # Rows that share no column are left q / 2.
        middle += tl.where(shared, 2.0 * value, 0.0)
        r_scale = tl.where(shared, 1.0 / safe.to(tl.float32), 0.0)
        c = tl.where(shared, c, 0.0)
    tl.store(values + row, value.to(tl.float32))
    if WRITE:
        middle_high, middle_low = split(middle)
        centre, centre_low = split(mean)
        below = (1.0 - mean).to(tl.float32)
        for first in range(0, columns, BLOCK_COLS):
            s, slope = load_logits(
                student, student_bias, first + lanes, columns, scale, inner, cap, CAPPED, -INF
            )
            t, _ = load_logits(
                teacher, teacher_bias, first + lanes, columns, scale, inner, cap, CAPPED, -INF
            )
            centred = subtract(s, t, middle_high, middle_low)
            if KIND == BHATTACHARYYA:
                # q - r as forward_kl's q - p.
                d = centred / 2
                q = exp_difference(s, a, EXACT) * q_scale
                greater = tl.where(d > 0, -q, exp_mean(s, t, c) * r_scale)
                _, expm1, _, _ = decay(tl.where(d > 0, -d, d))
                gradient = greater * expm1 / 2
            else:
                d, x, greater = compare(s, t, a, b, p_scale, q_scale, high, low, EXACT)
                gradient = gradients(
                    d,
                    x,
                    greater,
                    centred,
                    centre,
                    centre_low,
                    below,
                    student_weight,
                    teacher_weight,
                    KIND,
                )
            store_gradient(student, first + lanes, columns, gradient, slope, scale, CAPPED)
