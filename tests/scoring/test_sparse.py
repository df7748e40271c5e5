# SPDX-License-Identifier: Apache-2.0
"""``sparse_divergence`` against all logits in plain torch at float64."""

import inspect
import itertools

import pytest
import torch
import torch.distributed as dist

import fastpref
from fastpref import ScoringOptions, sparse_divergence
from tests.scoring.cases import BACKENDS, DTYPES
from tests.scoring.chosen_cases import MAP, Drawn, H, K, V, close

KINDS = ("forward_kl", "reverse_kl")
CASES = list(itertools.product(KINDS, ("ignore", "bucket")))
cases = pytest.mark.parametrize("divergence, tail", CASES)


def plain(drawn: Drawn, divergence, tail):
    """Negative ids left out."""
    given = drawn.ids >= 0
    log_q = drawn.logits().log_softmax(-1).gather(-1, drawn.ids.clamp(0, V - 1).long())
    log_p = torch.where(given, drawn.teacher_logps, -1.0)

    def terms(log_q, log_p):
        if divergence == "forward_kl":
            return log_p.exp() * (log_p - log_q)
        return log_q.exp() * (log_q - log_p)

    value = torch.where(given, terms(log_q, log_p), 0).sum(-1)
    if tail == "bucket":
        rest_q, rest_p = (
            (1 - torch.where(given, one, -torch.inf).exp().sum(-1)).log() for one in (log_q, log_p)
        )
        value = value + terms(rest_q, rest_p)
    return value


def diverge(drawn: Drawn, divergence="forward_kl", tail="ignore", mask=None, **arguments):
    given = {"bias": drawn.bias, "divergence": divergence, "tail": tail, **drawn.map}
    return sparse_divergence(
        drawn.hidden, drawn.weight, drawn.ids, drawn.teacher_logps, mask, **given | arguments
    )


def check(drawn: Drawn, divergence, tail, dtype=torch.float64, **arguments):
    leaves = drawn.leaves()
    got, want = diverge(drawn, divergence, tail, **arguments), plain(drawn, divergence, tail)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == exact and got.shape == drawn.hidden.shape[:-1]
    # Of 16-bit matrices a CPU rounds the products once.
    close([got], [want], dtype)
    upstream = drawn.upstream[..., 0]
    pairs = (torch.autograd.grad(one, leaves, upstream.to(one.dtype)) for one in (got, want))
    close(*pairs, dtype)


def test_signature():
    parameters = inspect.signature(sparse_divergence).parameters
    assert list(parameters)[:5] == ["hidden", "weight", "ids", "teacher_logps", "mask"]
    assert all(one.kind is one.KEYWORD_ONLY for one in list(parameters.values())[5:])
    assert (parameters["divergence"].default, parameters["tail"].default) == (
        "forward_kl",
        "ignore",
    )
    assert fastpref.sparse_divergence is sparse_divergence
    assert "sparse_divergence" in fastpref.__all__


@cases
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map", [{}, MAP], ids=["plain", "capped"])
def test_values_and_gradients(divergence, tail, dtype, map):
    check(Drawn(dtype, **map), divergence, tail, dtype)


@cases
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "keep"},
        {"schedule": "recompute"},
        {"memory_budget": 1},
        *({"backend": name} for name in BACKENDS),
    ],
    ids=str,
)
def test_schedules(divergence, tail, options):
    check(Drawn(**MAP), divergence, tail, options=ScoringOptions(**options))


@cases
def test_a_frozen_head(divergence, tail):
    """In the schedule that keeps (N, H) alone."""
    drawn = Drawn()
    hidden = drawn.hidden.requires_grad_()
    pairs = (diverge(drawn, divergence, tail), plain(drawn, divergence, tail))
    close(*([torch.autograd.grad(one.sum(), hidden)[0]] for one in pairs))


@cases
def test_ids_that_are_left_out(divergence, tail):
    drawn = Drawn(**MAP)
    drawn.ids[0, 0, 0], drawn.ids[1, 1, 2:] = -1, -5
    drawn.teacher_logps[drawn.ids < 0] = torch.nan
    check(drawn, divergence, tail)
    drawn.ids[2, 2] = -1
    got = diverge(drawn, divergence, tail)
    assert got[2, 2] == 0 and got[2, 1] != 0


@cases
def test_what_is_masked_is_not_read(divergence, tail):
    drawn, clean = Drawn(), Drawn()
    mask = torch.rand(3, 5) < 0.6
    mask[0, 0] = False
    drawn.hidden[~mask], drawn.teacher_logps[~mask] = torch.nan, torch.nan
    drawn.ids[~mask] = 10**15
    leaves, others = drawn.leaves(), clean.leaves()
    got = diverge(drawn, divergence, tail, mask)
    want = torch.where(mask, plain(clean, divergence, tail), 0)
    close([got], [want])
    assert not got[~mask].any()
    found = torch.autograd.grad(got.sum(), leaves)
    close(found, torch.autograd.grad(want.sum(), others))


def test_nothing_wanted():
    drawn = Drawn()
    leaves = drawn.leaves()
    got = diverge(drawn, mask=torch.zeros(3, 5, dtype=torch.bool))
    assert not got.any()
    assert not any(one.any() for one in torch.autograd.grad(got.sum(), leaves))


@cases
def test_an_id_outside_the_vocabulary_gives_nan_in_its_row_alone(divergence, tail):
    drawn = Drawn()
    drawn.ids[1, 3, 2] = V
    leaves = drawn.leaves()
    got = diverge(drawn, divergence, tail)
    assert got.isnan().nonzero().tolist() == [[1, 3]]
    found = torch.autograd.grad(got.nansum(), leaves)
    assert all(one.isfinite().all() for one in found) and not found[0][1, 3].any()


def test_ids_of_no_weight():
    """Of the student, excluded by the bias, and of the teacher."""
    drawn = Drawn()
    for row, start in ((0, 0), (1, 10), (2, 20)):
        drawn.ids[row, row] = torch.arange(start, start + K)
    drawn.bias[0], drawn.bias[10 : 10 + K] = -torch.inf, -torch.inf
    drawn.teacher_logps[2, 2, 1] = -torch.inf
    leaves = drawn.leaves()
    forward = diverge(drawn, "forward_kl", "bucket")
    assert forward[0, 0] == forward[1, 1] == torch.inf and forward[2, 2].isfinite()
    reverse = diverge(drawn, "reverse_kl", "bucket")
    assert reverse[2, 2] == torch.inf and reverse[0, 0].isfinite()
    # All that the student has is in its tail.
    rest = -(-drawn.teacher_logps[1, 1].exp().sum()).log1p()
    close([reverse[1, 1]], [rest])
    own = torch.zeros(3, 5, dtype=torch.float64)
    own[0, 0] = own[1, 1] = 1
    found = torch.autograd.grad((reverse * own).nan_to_num(posinf=0).sum(), leaves[:2])
    assert all(one.isfinite().all() for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", KINDS)
def test_tails_of_nothing(divergence, dtype):
    """All that either side has, to rounding, is in the stored ids."""
    drawn = Drawn(dtype)
    drawn.weight *= 0.01
    drawn.bias = torch.full((V,), -200.0, dtype=dtype)
    drawn.ids[:] = torch.arange(drawn.ids.shape[-1])
    drawn.bias[: drawn.ids.shape[-1]] = 0
    drawn.teacher_logps = torch.randn(drawn.ids.shape, dtype=dtype).log_softmax(-1)
    leaves = drawn.leaves()
    found = [diverge(drawn, divergence, tail) for tail in ("ignore", "bucket")]
    close([found[1]], [found[0]], dtype)
    for value in found:
        assert all(one.isfinite().all() for one in torch.autograd.grad(value.sum(), leaves))
    # As good as nothing on one side alone: large, and finite.
    drawn.teacher_logps = drawn.teacher_logps - 0.7
    value = diverge(drawn, divergence, "bucket")
    assert value.isfinite().all()
    assert all(one.isfinite().all() for one in torch.autograd.grad(value.sum(), leaves))


def test_a_small_tail_is_exact_in_float32():
    """1 - sum q would have lost it: here 1e-5, to four digits and more."""
    vocab = 1000
    weight = torch.zeros(vocab, 1)
    hidden, ids = torch.ones(1, 1), torch.tensor([[0, 1]])
    bias = torch.full((vocab,), -18.0)
    bias[0] = 0
    log_q = bias.double().log_softmax(0)
    log_p = torch.tensor([[0.5, 0.25]]).log()
    got = sparse_divergence(hidden, weight, ids, log_p, bias=bias, tail="bucket")
    rest = log_q[2:].logsumexp(0)
    p = torch.tensor([0.5, 0.25, 0.25]).double()
    want = (p * (p.log() - torch.stack([log_q[0], log_q[1], rest]))).sum()
    assert abs(got.item() - want.item()) < 2e-6


def test_a_student_that_is_the_teacher():
    """No divergence, and in 16 bits no gradient beyond the rounding of small numbers where both are
    sure of a token."""
    hidden = torch.randn(20, 64).bfloat16().requires_grad_()
    weight = (2 * torch.randn(50, 64)).bfloat16()
    logits = (hidden.detach().float() @ weight.float().t()).log_softmax(-1)
    log_p, ids = logits.topk(8)
    value = sparse_divergence(hidden, weight, ids, log_p, tail="bucket")
    (gradient,) = torch.autograd.grad(value.sum(), hidden)
    sure = log_p[:, 0] > -1e-4
    assert sure.sum() > 5
    assert gradient[sure].abs().max() < 1e-3 * weight.abs().max()


def test_an_update_of_the_head():
    drawn = Drawn()
    a, b = torch.randn(2, H).double().requires_grad_(), torch.randn(V, 2).double().requires_grad_()
    got = diverge(drawn, tail="bucket", lora=(a, b, 0.3))
    drawn.weight = drawn.weight + 0.3 * b @ a
    want = plain(drawn, "forward_kl", "bucket")
    close([got], [want])
    close(*(torch.autograd.grad(one.sum(), (a, b)) for one in (got, want)))


def test_the_teacher_gets_no_gradient():
    drawn = Drawn()
    drawn.leaves()
    drawn.teacher_logps.requires_grad_()
    diverge(drawn, tail="bucket").sum().backward()
    assert drawn.teacher_logps.grad is None and drawn.hidden.grad is not None


@pytest.mark.parametrize("needs, products", [((), 1), ((0,), 2), ((0, 1), 3)])
def test_one_product_and_one_for_each_gradient(needs, products):
    from torch.utils.flop_counter import FlopCounterMode

    rows, vocab, width = 40, 300, 16
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width)
    for at in needs:
        (hidden, weight)[at].requires_grad_()
    ids = torch.randint(vocab, (rows, 2))
    options = ScoringOptions(backend="torch")
    with FlopCounterMode(display=False) as counter:
        value = sparse_divergence(
            hidden, weight, ids, torch.full((rows, 2), -1.0), tail="bucket", options=options
        )
        if needs:
            value.sum().backward()
    counted = counter.get_total_flops() / (2 * rows * vocab * width)
    # Gathered rows cost a few hundredths.
    assert products <= counted < products + 0.1


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("divergence", "tail"),
    [
        ("forward_kl", "bucket"),
        pytest.param("reverse_kl", "bucket", marks=pytest.mark.slow),
        pytest.param("forward_kl", "ignore", marks=pytest.mark.slow),
        pytest.param("reverse_kl", "ignore", marks=pytest.mark.slow),
    ],
)
def test_compiled(divergence, tail):
    torch._dynamo.reset()

    def function(drawn):
        return diverge(drawn, divergence, tail, drawn.mask)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 2):
        drawn = Drawn(**MAP)
        drawn.mask = torch.rand(3, 5) < 0.7
        for name in ("hidden", "ids", "teacher_logps", "mask"):
            setattr(drawn, name, getattr(drawn, name)[:rows].contiguous())
        leaves = drawn.leaves()
        got, want = compiled(drawn), function(drawn)
        close([got], [want])
        close(*(torch.autograd.grad(one.square().sum(), leaves) for one in (got, want)))


def on_a_rank(rank, divergence, tail):
    drawn, cut = Drawn(**MAP), 20
    part = slice(cut) if rank == 0 else slice(cut, None)
    drawn.weight, drawn.bias = drawn.weight[part].clone(), drawn.bias[part].clone()
    drawn.ids[1, 1, 2:] = -1
    leaves = drawn.leaves()
    got = diverge(drawn, divergence, tail, tp_group=dist.group.WORLD)
    return [got.detach(), *torch.autograd.grad(got.square().sum(), leaves)]


@pytest.mark.heavy
@cases
def test_a_sharded_head(divergence, tail, two_ranks):
    first, second = two_ranks(on_a_rank, divergence, tail)
    drawn = Drawn(**MAP)
    drawn.ids[1, 1, 2:] = -1
    leaves = drawn.leaves()
    got = diverge(drawn, divergence, tail)
    d_hidden, d_weight, d_bias = torch.autograd.grad(got.square().sum(), leaves)
    for rank in (first, second):
        close(rank[:2], [got, d_hidden])
    close([torch.cat(both) for both in zip(first[2:], second[2:], strict=True)], [d_weight, d_bias])


ERRORS = {
    "kind": ({"divergence": "jsd"}, ValueError, "divergence must be one of forward_kl, reverse_kl"),
    "tail": ({"tail": "none"}, ValueError, "tail must be one of ignore, bucket; got 'none'"),
    "mask": ({"mask": torch.ones(3, 5)}, TypeError, "mask must be a bool tensor"),
    "teacher": ({"teacher_logps": [0.0]}, TypeError, "teacher_logps must be a floating-point"),
    "shapes": ({"teacher_logps": torch.zeros(3, 5, 2)}, ValueError, "one log-probability for each"),
    "ids": ({"ids": torch.zeros(3, 5)}, TypeError, "ids must be int64"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, kind, message = ERRORS[name]
    drawn = Drawn()
    given = {"ids": drawn.ids, "teacher_logps": drawn.teacher_logps} | changes
    with pytest.raises(kind, match=message):
        sparse_divergence(drawn.hidden, drawn.weight, **given)
