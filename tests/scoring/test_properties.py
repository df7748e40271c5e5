# SPDX-License-Identifier: Apache-2.0
"""Properties that hold for every input, on inputs of hypothesis' choosing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import ScoringOptions
from tests.scoring.cases import BACKENDS, Case, run

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
few = settings(max_examples=15, deadline=None)
PLANS = [{"schedule": "keep"}, {"schedule": "recompute", "chunk_rows": 3}, {"memory_budget": 1}]


@st.composite
def cases(draw):
    rows, hidden = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    vocab = draw(st.sampled_from([1, 2, 7, 40, 1030]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 1.0, 10.0, 100.0]))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Case(
        hidden=spread * normal(rows, hidden),
        weight=normal(vocab, hidden),
        target=torch.randint(0, vocab, (rows,), generator=generator),
        bias=normal(vocab),
        map={"temperature": draw(st.sampled_from([0.5, 1.0, 3.0]))},
    )


plans = st.sampled_from(PLANS).map(lambda plan: {"options": plan})
OUTPUTS = ("logp", "entropy", "lse")


def close(a, b, scale=1.0):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * max(1.0, float(scale)))


def scores(backend, case, plan, upstream=None):
    options = ScoringOptions(backend=backend, **plan["options"])
    return run(case, options=options, outputs=OUTPUTS, upstream=upstream)


def gradients(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(case.target.shape, generator=generator, dtype=torch.float64)
        for name in OUTPUTS
    }


def changed(case, **changes):
    return Case(**{**{f: getattr(case, f) for f in Case.__dataclass_fields__}, **changes})


@few
@given(case=cases(), plan=plans, shift=st.floats(-50, 50))
def test_a_constant_in_the_bias_moves_only_lse(backend, case, plan, shift):
    one = scores(backend, case, plan)
    other = scores(backend, changed(case, bias=case.bias + shift), plan)
    size = 1 + one["lse"].abs().max() + abs(shift)
    close(other["logp"], one["logp"], size)
    close(other["entropy"], one["entropy"], size)
    close(other["lse"], one["lse"] + shift / case.map["temperature"], size)


@few
@given(case=cases(), plan=plans, seed=st.integers(0, 1000))
def test_the_order_of_the_vocabulary_does_not_matter(backend, case, plan, seed):
    order = torch.randperm(case.weight.shape[0], generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0])
    other = changed(
        case, weight=case.weight[order], bias=case.bias[order], target=place[case.target]
    )
    upstream = gradients(case)
    one, two = scores(backend, case, plan, upstream), scores(backend, other, plan, upstream)
    size = case.hidden.abs().max() * 10
    for name in ("logp", "entropy", "lse", "d hidden"):
        close(two[name], one[name], size)
    close(two["d weight"], one["d weight"][order], size)
    close(two["d bias"], one["d bias"][order], size)


@few
@given(case=cases(), plan=plans, seed=st.integers(0, 1000))
def test_the_order_of_the_rows_does_not_matter(backend, case, plan, seed):
    order = torch.randperm(case.target.shape[0], generator=torch.Generator().manual_seed(seed))
    upstream = gradients(case)
    one = scores(backend, case, plan, upstream)
    two = scores(
        backend,
        changed(case, hidden=case.hidden[order], target=case.target[order]),
        plan,
        {name: gradient[order] for name, gradient in upstream.items()},
    )
    size = case.hidden.abs().max() * 10
    for name in ("logp", "entropy", "lse", "d hidden"):
        close(two[name], one[name][order], size)
    close(two["d weight"], one["d weight"], size)


@few
@given(case=cases(), plan=plans)
def test_gradients_of_logp_sum_to_zero_over_the_vocabulary(backend, case, plan):
    """Rows of onehot - softmax do."""
    upstream = {"logp": gradients(case)["logp"]}
    result = scores(backend, case, plan, upstream)
    size = case.hidden.abs().max() * case.weight.shape[0]
    close(result["d weight"].sum(0), torch.zeros_like(result["d weight"][0]), size)
    close(result["d bias"].sum(0), torch.zeros((), dtype=torch.float64), size)


@few
@given(case=cases(), plan=plans, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_gradients_are_linear_in_the_upstream_gradient(backend, case, plan, a, b):
    one, other = gradients(case, 1), gradients(case, 2)
    both = {name: a * one[name] + b * other[name] for name in OUTPUTS}
    parts = [scores(backend, case, plan, upstream) for upstream in (one, other, both)]
    size = case.hidden.abs().max() * 100
    for name in ("d hidden", "d weight", "d bias"):
        close(parts[2][name], a * parts[0][name] + b * parts[1][name], size)


@few
@given(case=cases(), plan=plans)
def test_bounds(backend, case, plan):
    result = scores(backend, case, plan)
    vocab = torch.tensor(float(case.weight.shape[0]), dtype=torch.float64)
    assert (result["logp"] <= 0).all()
    assert (result["entropy"] >= -1e-12 * (1 + result["lse"].abs())).all()
    assert (result["entropy"] <= vocab.log() + 1e-12).all()
