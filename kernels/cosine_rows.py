# SPDX-License-Identifier: Apache-2.0
"""The cosine distance between a student's and a teacher's row of logits s and t, and its gradient
in place of the student's products:

    D = 1 - <u, w> = sum (u - w)^2 / 2,   u = s / |s|,   w = t / |t|,   dD/ds = (u - w - D u) / |s|

At a row of zeros D is 1 and the gradient 0; a column that both biases exclude with -inf counts as
0. One program takes one row, in three sweeps: lengths, D, gradient. Arithmetic is in float32, that
of a row's few numbers in float64. Bytes: both tiles are read three times, mostly from cache, and
the student's written once.
"""

import triton
import triton.language as tl

from .logit_map import load_logits, store_gradient

INF = tl.constexpr(float("inf"))


@triton.jit
def subtract_units(s, t, student_stretch, teacher_stretch, inverse):
    """u - w = ((s - t) + student_stretch s - teacher_stretch t) inverse, of which the longer's
    stretch is 0: u and w are not rounded alone."""
    return ((s - t) + (student_stretch * s - teacher_stretch * t)) * inverse


@triton.jit
def load_both(
    student,
    teacher,
    student_bias,
    teacher_bias,
    cols,
    columns,
    scale,
    inner,
    cap,
    CAPPED: tl.constexpr,
):
    """Logits of both, and the student's slopes; 0 beyond the row and where both exclude a column,
    which under a cap is an ordinary logit."""
    s, slope = load_logits(student, student_bias, cols, columns, scale, inner, cap, CAPPED, 0.0)
    t, _ = load_logits(teacher, teacher_bias, cols, columns, scale, inner, cap, CAPPED, 0.0)
    if student_bias is not None and teacher_bias is not None:
        if not CAPPED:
            inside = cols < columns
            own = tl.load(student_bias + cols, inside, 0.0)
            other = tl.load(teacher_bias + cols, inside, 0.0)
            excluded = (own == -INF) & (other == -INF)
            s = tl.where(excluded, 0.0, s)
            t = tl.where(excluded, 0.0, t)
    return s, t, slope


@triton.jit
def cosine_rows_kernel(
    student,  # (N, V), becomes the gradient with WRITE
    teacher,  # (N, V)
    student_bias,  # (V,) float32, or None
    teacher_bias,  # (V,) float32, or None
    values,  # (N,) float32
    columns,
    student_stride,
    teacher_stride,
    scale,
    inner,
    cap,
    WRITE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    # Else whether there are any is looked at before each loop, by a predicate that is spilled.
    tl.assume(columns > 0)
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK_COLS)
    student_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    teacher_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    difference_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    for first in range(0, columns, BLOCK_COLS):
        s, t, _ = load_both(
            student, teacher, student_bias, teacher_bias, first + lanes, columns, scale, inner,
            cap, CAPPED,
        )  # fmt: skip
        student_parts += s * s
        teacher_parts += t * t
        difference_parts += (s - t) * (s + t)
    student_length = tl.sqrt(tl.sum(student_parts).to(tl.float64))
    teacher_length = tl.sqrt(tl.sum(teacher_parts).to(tl.float64))
    zero = (student_length == 0.0) | (teacher_length == 0.0)
    student_length = tl.where(zero, 1.0, student_length)
    teacher_length = tl.where(zero, 1.0, teacher_length)
    stretch = tl.sum(difference_parts).to(tl.float64) / (student_length + teacher_length)
    student_stretch = tl.where(stretch < 0, -stretch / student_length, 0.0).to(tl.float32)
    teacher_stretch = tl.where(stretch > 0, stretch / teacher_length, 0.0).to(tl.float32)
    inverse = (1.0 / tl.maximum(student_length, teacher_length)).to(tl.float32)
    distance_parts = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    for first in range(0, columns, BLOCK_COLS):
        s, t, _ = load_both(
            student, teacher, student_bias, teacher_bias, first + lanes, columns, scale, inner,
            cap, CAPPED,
        )  # fmt: skip
        difference = subtract_units(s, t, student_stretch, teacher_stretch, inverse)
        distance_parts += difference * difference
    value = tl.where(zero, 1.0, tl.sum(distance_parts) / 2)
    tl.store(values + row, value)
    if WRITE:
        inverse_length = tl.where(zero, 0.0, 1.0 / student_length).to(tl.float32)
        for first in range(0, columns, BLOCK_COLS):
            s, t, slope = load_both(
                student, teacher, student_bias, teacher_bias, first + lanes, columns, scale, inner,
                cap, CAPPED,
            )  # fmt: skip
            difference = subtract_units(s, t, student_stretch, teacher_stretch, inverse)
            gradient = inverse_length * (difference - value * (s * inverse_length))
            store_gradient(student, first + lanes, columns, gradient, slope, scale, CAPPED)
