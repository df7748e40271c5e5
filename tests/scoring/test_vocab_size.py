# SPDX-License-Identifier: Apache-2.0
"""``vocab_size`` of linear_divergence: the first ids of both heads take part."""

import pytest
import torch
import torch.distributed as dist

from fastpref import explain_divergence, linear_divergence
from tests.scoring.cases import BACKENDS
from tests.scoring.divergences import DIVERGENCES

H, V, PADDED, TEACHER = 5, 20, 24, 32


def heads():
    torch.manual_seed(0)
    shapes = (6, H), (PADDED, H), (6, H), (TEACHER, H)
    found = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    found[1][V:], found[3][V:] = torch.nan, torch.nan
    return found


def compare(found, wanted, student, weight) -> None:
    torch.testing.assert_close(found, wanted)
    gradients = (torch.autograd.grad(one.sum(), (student, weight)) for one in (found, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_as_heads_of_that_size(kind):
    student, weight, teacher, other = heads()
    student.requires_grad_(), weight.requires_grad_()
    found = linear_divergence(student, weight, teacher, other, divergence=kind, vocab_size=V)
    wanted = linear_divergence(student, weight[:V], teacher, other[:V], divergence=kind)
    compare(found, wanted, student, weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_as_a_bias_that_excludes_the_others(kind, backend):
    student, weight, teacher, other = heads()
    weight[V:], other[V:] = 1, 2
    other = other[:PADDED]
    bias = torch.zeros(PADDED, dtype=torch.float64)
    bias[V:] = -torch.inf
    student.requires_grad_(), weight.requires_grad_()
    given = {"divergence": kind, "student_bias": bias, "teacher_bias": bias}
    found = linear_divergence(student, weight, teacher, other, **given)
    wanted = linear_divergence(student, weight, teacher, other, divergence=kind, vocab_size=V)
    compare(found, wanted, student, weight)


def test_the_plan_knows_it():
    student, weight, teacher, other = heads()
    assert explain_divergence(student, weight, teacher, other, vocab_size=V).vocab_size == V
    cut = explain_divergence(
        student, weight, teacher, other, vocab_size=V, vocab_range=(10, PADDED)
    )
    assert cut.vocab_size == V - 10


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"vocab_size": 0}, ValueError, r"vocab_size must be in \[1, 24\]"),
        ({"vocab_size": PADDED + 1}, ValueError, r"vocab_size must be in \[1, 24\]"),
        ({"vocab_size": 20.0}, TypeError, "vocab_size must be an int, got float"),
        ({"vocab_size": True}, TypeError, "vocab_size must be an int, got bool"),
        ({"vocab_size": 10, "vocab_range": (10, 20)}, ValueError, r"vocab_size must be in \[11"),
        ({"vocab_size": 10, "vocab_range": 3}, TypeError, "vocab_range must be a pair"),
    ],
)
def test_what_it_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        linear_divergence(*heads(), **changes)


def on_a_rank(rank: int, vocab_size: int, ranged: bool) -> torch.Tensor:
    student, weight, teacher, other = heads()
    rows = slice(rank * 16, rank * 16 + 16)
    both = [torch.nn.functional.pad(one[:PADDED], (0, 0, 0, 8)) for one in (weight, other)]
    range_ = (rows.start, rows.stop) if ranged else None
    return linear_divergence(
        student,
        both[0][rows],
        teacher,
        both[1][rows],
        vocab_size=vocab_size,
        vocab_range=range_,
        tp_group=dist.group.WORLD,
    )


def refused_on_a_rank(rank: int) -> str:
    try:
        on_a_rank(rank, 16, False)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.heavy
@pytest.mark.parametrize("ranged", [False, True])
def test_sharded(two_ranks, ranged):
    wanted = linear_divergence(*heads(), vocab_size=V)
    for found in two_ranks(on_a_rank, V, ranged):
        torch.testing.assert_close(found, wanted)


@pytest.mark.heavy
def test_a_rank_without_ids_is_refused_on_all(two_ranks):
    for message in two_ranks(refused_on_a_rank):
        assert "each rank hold ids" in message
