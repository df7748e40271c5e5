# SPDX-License-Identifier: Apache-2.0
"""``linear_logits`` against a gather from all logits, in plain torch at float64."""

import inspect
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode

import fastpref
from fastpref import ScoringOptions, linear_logits
from fastpref.scoring.chosen import rows as chosen_rows
from tests.scoring.cases import DTYPES
from tests.scoring.chosen_cases import MAP, Drawn, H, K, V, close


def expected(drawn: Drawn, ids=None):
    """Logits, NaN for an id outside the vocabulary."""
    ids = drawn.ids if ids is None else ids
    there = (ids >= 0) & (ids < V)
    return torch.where(there, drawn.logits().gather(-1, ids.clamp(0, V - 1).long()), torch.nan)


def gradients(value, leaves, upstream):
    return torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def check(drawn: Drawn, dtype=torch.float64, ids=None, **arguments):
    ids = drawn.ids if ids is None else ids
    leaves = drawn.leaves()
    got = linear_logits(drawn.hidden, drawn.weight, ids, bias=drawn.bias, **drawn.map, **arguments)
    want = expected(drawn, ids)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == exact and got.shape == ids.shape
    # Rows are rounded to their dtype before, and nothing is until after.
    close([got], [want.detach()], exact)
    upstream = drawn.upstream.masked_fill(want.isnan(), 0)
    close(
        gradients(got, leaves, drawn.upstream),
        gradients(want.nan_to_num(), leaves, upstream),
        dtype,
    )


def test_signature():
    parameters = inspect.signature(linear_logits).parameters
    assert list(parameters)[:3] == ["hidden", "weight", "ids"]
    assert all(one.kind is one.KEYWORD_ONLY for one in list(parameters.values())[3:])
    assert fastpref.linear_logits is linear_logits and "linear_logits" in fastpref.__all__


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map", [{}, MAP], ids=["plain", "capped"])
def test_values_and_gradients(dtype, map):
    check(Drawn(dtype, **map), dtype)


# Of gathered rows: one and part of one, a few, a row of ids, several rows.
@pytest.mark.parametrize("budget", [1, 3 * H * 8, K * H * 8, 40 * H * 8])
def test_tiles(budget):
    check(Drawn(**MAP), options=ScoringOptions(memory_budget=budget))


def test_an_id_that_all_tokens_have_adds_up_over_tiles():
    drawn = Drawn()
    drawn.ids[..., 2] = 17
    drawn.ids[..., 3:] = 18
    check(drawn, options=ScoringOptions(memory_budget=4 * H * 8))


def test_ids_outside_the_vocabulary_give_nan_and_no_gradient():
    drawn = Drawn(**MAP)
    drawn.ids[0, 0, 1], drawn.ids[1, 2, 0], drawn.ids[2] = -1, V, 10**12
    check(drawn)


def test_int32_and_one_dimension():
    drawn = Drawn()
    check(drawn, ids=drawn.ids.int())
    got = linear_logits(drawn.hidden[0, 0], drawn.weight, drawn.ids[0, 0])
    close([got], [drawn.weight[drawn.ids[0, 0]] @ drawn.hidden[0, 0]])


def test_an_id_that_the_bias_excludes_is_minus_infinity():
    drawn = Drawn()
    drawn.bias[drawn.ids[0, 0, 0]] = -torch.inf
    got = linear_logits(drawn.hidden, drawn.weight, drawn.ids, bias=drawn.bias)
    assert got[0, 0, 0] == -torch.inf
    assert (got == -torch.inf).sum() == (drawn.ids == drawn.ids[0, 0, 0]).sum()


def test_a_row_without_upstream_gradient_reaches_nothing():
    drawn = Drawn()
    drawn.hidden[1, 1], drawn.upstream[1, 1] = torch.nan, 0
    leaves = drawn.leaves()
    got = linear_logits(drawn.hidden, drawn.weight, drawn.ids, bias=drawn.bias)
    assert all(one.isfinite().all() for one in gradients(got, leaves, drawn.upstream))
    a, b = torch.randn(2, H).double().requires_grad_(), torch.randn(V, 2).double().requires_grad_()
    got = linear_logits(drawn.hidden, drawn.weight.detach(), drawn.ids, lora=(a, b, 1.0))
    assert all(one.isfinite().all() for one in gradients(got, (a, b), drawn.upstream))


def test_no_tokens():
    weight = torch.randn(V, H, requires_grad=True)
    hidden = torch.zeros(0, 4, H, requires_grad=True)
    got = linear_logits(hidden, weight, torch.zeros(0, 4, K, dtype=torch.int64))
    assert got.shape == (0, 4, K)
    d_hidden, d_weight = torch.autograd.grad(got.sum(), (hidden, weight))
    assert d_hidden.shape == hidden.shape and not d_weight.any()


def test_a_low_rank_update():
    drawn, rank, scale = Drawn(**MAP), 2, 1.7
    drawn.leaves()
    drawn.weight = drawn.weight.detach()
    a, b = torch.randn(rank, H).double(), torch.randn(V, rank).double()
    leaves = [drawn.hidden, drawn.bias, a.requires_grad_(), b.requires_grad_()]
    got = linear_logits(
        drawn.hidden, drawn.weight, drawn.ids, bias=drawn.bias, lora=(a, b, scale), **MAP
    )
    drawn.weight = drawn.weight + scale * b @ a
    want = expected(drawn)
    close([got], [want])
    close(gradients(got, leaves, drawn.upstream), gradients(want, leaves, drawn.upstream))


def test_padded_rows_of_the_weight_take_no_part():
    drawn, start = Drawn(), 100
    padded = torch.cat([drawn.weight, torch.full((4, H), torch.nan).double()]).requires_grad_()
    ids = torch.cat([drawn.ids + start, torch.full((3, 5, 1), start - 1)], -1)
    got = linear_logits(drawn.hidden, padded, ids, vocab_range=(start, start + V))
    close([got[..., :-1]], [(drawn.hidden @ drawn.weight.t()).gather(-1, drawn.ids)])
    assert got[..., -1].isnan().all()
    (gradient,) = torch.autograd.grad(got.sum(), padded)
    assert gradient.isfinite().all() and not gradient[V:].any()


def test_dtypes_are_promoted_and_rounded_as_under_autocast():
    drawn = Drawn(torch.float32)
    mixed = linear_logits(drawn.hidden.bfloat16(), drawn.weight, drawn.ids)
    wide = linear_logits(drawn.hidden.bfloat16().float(), drawn.weight, drawn.ids)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, wide)
    leaves = drawn.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logits(drawn.hidden, drawn.weight, drawn.ids)
        found = gradients(got, leaves[:2], drawn.upstream)
    low = linear_logits(drawn.hidden.bfloat16(), drawn.weight.bfloat16(), drawn.ids)
    assert torch.equal(got, low) and not torch.equal(got, wide)
    assert [one.dtype for one in found] == [torch.float32] * 2


def test_only_what_needs_a_gradient_gets_one():
    drawn = Drawn()
    weight = drawn.weight.requires_grad_()
    linear_logits(drawn.hidden, weight, drawn.ids).sum().backward()
    assert weight.grad is not None and drawn.hidden.grad is None
    assert not linear_logits(drawn.hidden, weight.detach(), drawn.ids).requires_grad


def test_ids_may_be_overwritten_before_backward():
    drawn = Drawn()
    leaves, ids = drawn.leaves(), drawn.ids.clone()
    got = linear_logits(drawn.hidden, drawn.weight, ids, bias=drawn.bias)
    ids.zero_()
    want = gradients(expected(drawn), leaves, drawn.upstream)
    close(gradients(got, leaves, drawn.upstream), want)


def test_the_weight_is_opened_around_each_use():
    drawn = Drawn()
    whole, part = drawn.weight, torch.zeros(1, 1).double()

    @contextmanager
    def gathered(weight, bias):
        weight.data = whole
        yield
        weight.data = torch.zeros(1, 1).double()

    hidden = drawn.hidden.requires_grad_()
    got = linear_logits(hidden, part, drawn.ids, weight_context=gathered)
    assert part.shape == (1, 1)
    got.sum().backward()
    close([hidden.grad], [whole[drawn.ids].sum(-2)])


def test_gathered_rows_stay_within_the_budget(monkeypatch):
    """So many rows that they pass through in many tiles, in both passes."""
    largest = []
    gathered = chosen_rows.Chosen.gathered

    def measured(self, matrix, rows, columns):
        found = gathered(self, matrix, rows, columns)
        largest.append(found.numel() * (found.itemsize + matrix.itemsize))
        return found

    monkeypatch.setattr(chosen_rows.Chosen, "gathered", measured)
    hidden = torch.randn(400, H, dtype=torch.bfloat16, requires_grad=True)
    weight, ids = torch.randn(V, H, dtype=torch.bfloat16), torch.randint(V, (400, 30))
    budget = 1 << 14
    options = ScoringOptions(memory_budget=budget)
    linear_logits(hidden, weight, ids, options=options).sum().backward()
    assert budget / 2 < max(largest) <= budget and len(largest) > 50


def test_no_rows_are_gathered_for_ids_that_are_left_out(monkeypatch):
    seen = []
    gathered = chosen_rows.Chosen.gathered

    def counted(self, matrix, rows, columns):
        found = gathered(self, matrix, rows, columns)
        seen.append(found.shape[1])
        return found

    monkeypatch.setattr(chosen_rows.Chosen, "gathered", counted)
    drawn = Drawn()
    drawn.ids[..., 2:] = -1
    linear_logits(drawn.hidden, drawn.weight, drawn.ids)
    assert seen and max(seen) == 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_bits_again(deterministic):
    drawn = Drawn(torch.float32)
    drawn.ids[:] = drawn.ids[0, 0]
    leaves = drawn.leaves()

    def found():
        got = linear_logits(drawn.hidden, drawn.weight, drawn.ids, bias=drawn.bias)
        return gradients(got, leaves, drawn.upstream)

    torch.use_deterministic_algorithms(deterministic)
    try:
        assert all(map(torch.equal, found(), found()))
    finally:
        torch.use_deterministic_algorithms(False)


def test_function_transforms():
    drawn = Drawn(**MAP)
    hidden, weight, ids = drawn.hidden, drawn.weight, drawn.ids
    leaves = drawn.leaves()

    def function(hidden, weight):
        return linear_logits(hidden, weight, ids, **MAP)

    got = torch.func.grad(lambda *both: function(*both).square().sum(), argnums=(0, 1))
    want = torch.autograd.grad(function(*leaves[:2]).square().sum(), leaves[:2])
    close(list(got(hidden, weight)), list(want))
    jacobian = torch.func.jacrev(function, argnums=1)(hidden, weight)
    rows = [torch.autograd.grad(function(*leaves[:2])[0, 0, k], leaves[1])[0] for k in range(K)]
    close([jacobian[0, 0]], [torch.stack(rows)])
    upstream = torch.randn(2, 3, 5, K).double()
    batched = torch.autograd.grad(
        function(*leaves[:2]), leaves[:2], upstream, is_grads_batched=True
    )
    single = [torch.autograd.grad(function(*leaves[:2]), leaves[:2], one) for one in upstream]
    close(list(batched), [torch.stack(one) for one in zip(*single, strict=True)])
    mapped = torch.func.vmap(lambda one: linear_logits(one, weight, ids[0], **MAP))(hidden)
    close([mapped], [linear_logits(hidden, weight, ids[0].expand(3, -1, -1), **MAP)])


def test_shapes_without_data():
    with FakeTensorMode():
        hidden, weight = torch.empty(3, 5, H, requires_grad=True), torch.empty(V, H)
        weight.requires_grad_()
        ids = torch.empty(3, 5, K, dtype=torch.int64)
        got = linear_logits(hidden, weight, ids, **MAP)
        assert got.shape == ids.shape and got.dtype == torch.float32
        got.sum().backward()
        assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_a_second_derivative_says_so():
    drawn = Drawn()
    leaves = drawn.leaves()
    value = linear_logits(drawn.hidden, drawn.weight, drawn.ids).square().sum()
    (gradient,) = torch.autograd.grad(value, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.heavy
@pytest.mark.parametrize("map", [{}, MAP], ids=["plain", "capped"])
def test_compiled(map):
    torch._dynamo.reset()

    def function(drawn):
        lora = (drawn.a, drawn.b, 0.7)
        return linear_logits(
            1.5 * drawn.hidden, drawn.weight, drawn.ids, bias=drawn.bias, lora=lora, **map
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 2):
        drawn = Drawn(**map)
        drawn.hidden, drawn.ids = drawn.hidden[:rows], drawn.ids[:rows]
        hidden, _, bias = drawn.leaves()
        drawn.weight = drawn.weight.detach()
        drawn.a, drawn.b = torch.randn(2, H).double(), torch.randn(V, 2).double()
        leaves = [hidden, bias, drawn.a.requires_grad_(), drawn.b.requires_grad_()]
        got, want, upstream = compiled(drawn), function(drawn), drawn.upstream[:rows]
        close([got], [want])
        close(gradients(got, leaves, upstream), gradients(want, leaves, upstream))


def on_a_rank(rank, map):
    drawn, group = Drawn(**map), dist.group.WORLD
    cut = 20
    part = slice(cut) if rank == 0 else slice(cut, None)
    drawn.ids[0, 0, 0] = V
    leaves = [drawn.hidden, drawn.weight[part].clone(), drawn.bias[part].clone()]
    for one in leaves:
        one.requires_grad_()
    got = linear_logits(*leaves[:2], drawn.ids, bias=leaves[2], tp_group=group, **map)
    return [got.detach(), *gradients(got, leaves, drawn.upstream)]


@pytest.mark.heavy
@pytest.mark.parametrize("map", [{}, MAP], ids=["plain", "capped"])
def test_a_sharded_head(map, two_ranks):
    first, second = two_ranks(on_a_rank, map)
    drawn = Drawn(**map)
    drawn.ids[0, 0, 0] = V
    leaves = drawn.leaves()
    got = linear_logits(drawn.hidden, drawn.weight, drawn.ids, bias=drawn.bias, **map)
    d_hidden, d_weight, d_bias = gradients(got, leaves, drawn.upstream)
    for rank in (first, second):
        close(rank[:2], [got, d_hidden])
    close([torch.cat(both) for both in zip(first[2:], second[2:], strict=True)], [d_weight, d_bias])


ERRORS = {
    "a list": ([[1]], TypeError, "ids must be a torch.Tensor, got list"),
    "floats": (torch.zeros(3, 5, 2), TypeError, r"ids must be int64 .* use ids.long"),
    "no dimension of ids": (
        torch.zeros(3, 5).long(),
        ValueError,
        r"\(\.\.\., K\).*ids\[\.\.\., None\]",
    ),
    "no ids": (torch.zeros(3, 5, 0).long(), ValueError, "at least one id"),
    "other rows": (torch.zeros(3, 4, 2).long(), ValueError, r"ids \(3, 4, 2\) and hidden"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    ids, kind, message = ERRORS[name]
    drawn = Drawn()
    with pytest.raises(kind, match=message):
        linear_logits(drawn.hidden, drawn.weight, ids)


def test_the_head_is_checked_as_elsewhere():
    drawn = Drawn()
    with pytest.raises(ValueError, match="weight must have shape"):
        linear_logits(drawn.hidden, drawn.weight[0], drawn.ids)
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        linear_logits(drawn.hidden, drawn.weight, drawn.ids, temperature=0.0)
