# SPDX-License-Identifier: Apache-2.0
"""linear_logprob as a citizen of autograd: several backward passes, several graphs at a time, grad
modes, checkpointing, in-place changes, and gradcheck."""

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring import workspace
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import BACKENDS, DTYPES, make_case

V = 1030
PLANS = {
    "keep": {"schedule": "keep"},
    "kept in part": {"schedule": "keep", "memory_budget": 100 * V * 4},
    "least tile": {"memory_budget": 1},
    "direct": {"schedule": "direct"},
}
backends = pytest.mark.parametrize("backend", BACKENDS)
plans = pytest.mark.parametrize("plan", PLANS)


def leaves_of(plan, seed=0, dtype=torch.float32):
    case = make_case(rows=140, vocab=V, dtype=dtype, bias=True, seed=seed, ignored=0.2)
    trained = plan != "direct"
    return {
        "hidden": case.hidden.clone().requires_grad_(),
        "weight": case.weight.clone().requires_grad_(trained),
        "bias": case.bias.clone().requires_grad_(trained),
        "target": case.target.clone(),
    }


def logp_of(leaves, plan, backend, **kwargs):
    options = ScoringOptions(backend=backend, **PLANS[plan])
    return linear_logprob(**leaves, options=options, **kwargs).logp


def differentiated(leaves):
    return [leaf for leaf in leaves.values() if leaf.requires_grad]


@backends
@plans
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_twice(backend, plan, dtype):
    """Bit for bit the same gradients, whatever other gradients ran in between."""
    leaves = leaves_of(plan, dtype=dtype)
    before = [leaf.detach().clone() for leaf in leaves.values()]
    logp = logp_of(leaves, plan, backend)
    gradient, other = torch.randn_like(logp), torch.zeros_like(logp)
    other[::2] = 1e3
    inputs = differentiated(leaves)
    first = torch.autograd.grad(logp, inputs, gradient, retain_graph=True)
    torch.autograd.grad(logp, inputs, other, retain_graph=True)
    second = torch.autograd.grad(logp, inputs, gradient)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, leaves.values()))


@backends
def test_backward_of_outputs_one_after_the_other(backend):
    leaves = leaves_of("keep")
    options = ScoringOptions(backend=backend)
    scores = linear_logprob(**leaves, outputs=OUTPUTS, options=options)
    inputs = differentiated(leaves)
    names = ("logp", "entropy", "lse")
    gradients = {name: torch.randn_like(scores.logp) for name in names}
    together = torch.autograd.grad(
        sum((getattr(scores, name) * gradients[name]).sum() for name in names),
        inputs,
        retain_graph=True,
    )
    alone = [
        torch.autograd.grad(getattr(scores, name), inputs, gradients[name], retain_graph=True)
        for name in names
    ]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-4, atol=1e-4)


@backends
@plans
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_several_graphs_at_a_time(backend, plan, order):
    """No forward pass may take the buffer of a graph that is still to be differentiated."""
    alone = []
    for seed in range(3):
        leaves = leaves_of(plan, seed)
        alone.append(
            torch.autograd.grad(logp_of(leaves, plan, backend).sum(), differentiated(leaves))
        )
    together = [leaves_of(plan, seed) for seed in range(3)]
    logps = [logp_of(leaves, plan, backend) for leaves in together]
    for seed in order:
        gradients = torch.autograd.grad(logps[seed].sum(), differentiated(together[seed]))
        assert all(map(torch.equal, gradients, alone[seed]))


@backends
def test_scoring_inside_a_backward_pass(backend):
    """A hook that scores while another graph is being differentiated."""
    leaves, inner = leaves_of("keep"), leaves_of("keep", seed=1)
    expected = torch.autograd.grad(logp_of(leaves, "keep", backend).sum(), differentiated(leaves))
    logp = logp_of(leaves, "keep", backend)
    ran = []

    def hook(gradient):
        with torch.enable_grad():
            ran.append(
                torch.autograd.grad(logp_of(inner, "keep", backend).sum(), differentiated(inner))
            )

    logp.register_hook(hook)
    assert all(map(torch.equal, torch.autograd.grad(logp.sum(), differentiated(leaves)), expected))
    assert len(ran) == 1


@backends
def test_one_graph_after_the_other_through_the_hidden_state(backend):
    """Two scorings of the same hidden state, as policy and reference of a frozen pair of heads."""
    a, b = leaves_of("direct"), leaves_of("direct", seed=1)
    hidden = a["hidden"]
    total = logp_of(a, "direct", backend) - logp_of({**b, "hidden": hidden}, "direct", backend)
    total.sum().backward()
    parts = []
    for leaves in (a, b):
        fresh = hidden.detach().clone().requires_grad_()
        logp_of({**leaves, "hidden": fresh}, "direct", backend).sum().backward()
        parts.append(fresh.grad)
    torch.testing.assert_close(hidden.grad, parts[0] - parts[1], rtol=1e-5, atol=1e-5)


def emptied_pool():
    gc.collect()
    workspace.release_workspace()


def idle_bytes():
    gc.collect()
    return max((buffer.nbytes for buffer in workspace._idle()), default=0)


@backends
def test_a_dropped_graph_returns_its_buffer(backend):
    emptied_pool()
    logp = logp_of(leaves_of("keep"), "keep", backend)
    kept = int((logp != 0).sum()) * V * 4
    assert idle_bytes() < kept
    del logp
    assert idle_bytes() >= kept


@backends
def test_a_differentiated_graph_returns_its_buffer(backend):
    """As torch frees saved tensors: the loss of one step usually lives on through the next."""
    emptied_pool()
    logp = logp_of(leaves_of("keep"), "keep", backend)
    kept = int((logp != 0).sum()) * V * 4
    logp.sum().backward()
    assert idle_bytes() >= kept


@backends
@plans
@pytest.mark.parametrize("upstream_requires_grad", [False, True])
def test_a_second_derivative_raises(backend, plan, upstream_requires_grad):
    """Also in a sum with a term that can be differentiated: the penalty must not be taken for a
    constant."""
    leaves = leaves_of(plan)
    logp = logp_of(leaves, plan, backend)
    factor = torch.ones((), requires_grad=upstream_requires_grad)
    loss = (logp * factor).sum()
    (gradient,) = torch.autograd.grad(loss, [leaves["hidden"]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|second derivative"):
        (loss + gradient.square().sum()).backward()


@backends
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes(backend, mode):
    leaves = leaves_of("keep")
    expected = logp_of(leaves, "keep", backend)
    emptied_pool()
    with mode():
        logp = logp_of(leaves, "keep", backend)
    assert not logp.requires_grad
    torch.testing.assert_close(logp, expected.detach())
    # A buffer that was made there serves a call that is differentiated.
    again = logp_of(leaves, "keep", backend)
    again.sum().backward()
    assert torch.isfinite(leaves["weight"].grad).all()


@backends
def test_no_input_requires_grad(backend):
    leaves = {name: leaf.detach() for name, leaf in leaves_of("keep").items()}
    assert not logp_of(leaves, "keep", backend).requires_grad


@backends
@plans
def test_gradients_accumulate(backend, plan):
    leaves = leaves_of(plan)
    inputs = differentiated(leaves)
    single = torch.autograd.grad(logp_of(leaves, plan, backend).sum(), inputs)
    for _ in range(2):
        logp_of(leaves, plan, backend).sum().backward()
    for leaf, gradient in zip(inputs, single, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient)


@backends
@plans
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend, plan, reentrant):
    leaves = leaves_of(plan)
    inputs = differentiated(leaves)
    expected = torch.autograd.grad(logp_of(leaves, plan, backend).sum(), inputs)

    def score(*tensors):
        return logp_of(dict(zip(leaves, tensors, strict=True)), plan, backend)

    checkpoint(score, *leaves.values(), use_reentrant=reentrant).sum().backward()
    assert all(map(torch.equal, (leaf.grad for leaf in inputs), expected))


@backends
@plans
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "target"])
def test_changes_between_forward_and_backward(backend, plan, name):
    """A changed input raises, as everywhere in torch, or does not matter."""
    case = make_case(rows=140, vocab=V, dtype=torch.float32, bias=True)
    leaves = {
        "hidden": case.hidden.clone().requires_grad_(),
        "weight": case.weight.clone().requires_grad_(plan != "direct"),
        "bias": case.bias.clone(),
        "target": case.target.clone(),
    }
    expected = torch.autograd.grad(logp_of(leaves, plan, backend).sum(), differentiated(leaves))
    logp = logp_of(leaves, plan, backend)
    with torch.no_grad():
        leaves[name].zero_()
    try:
        gradients = torch.autograd.grad(logp.sum(), differentiated(leaves))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert name == "target"
        assert all(map(torch.equal, gradients, expected))


@backends
def test_changed_outputs_do_not_matter(backend):
    leaves = leaves_of("keep")
    inputs = differentiated(leaves)
    expected = torch.autograd.grad(logp_of(leaves, "keep", backend).sum(), inputs)
    logp = logp_of(leaves, "keep", backend)
    total = logp.sum()
    with torch.no_grad():
        logp.zero_()
    assert all(map(torch.equal, torch.autograd.grad(total, inputs), expected))


@backends
@pytest.mark.parametrize("plan", ["keep", "least tile"])
def test_gradcheck(backend, plan):
    torch.manual_seed(1)
    n, h, v = 3, 2, 1030
    hidden = torch.randn(n, h, dtype=torch.float64, requires_grad=True)
    small = torch.randn(5, h, dtype=torch.float64, requires_grad=True)
    offsets = torch.randn(5, dtype=torch.float64, requires_grad=True)
    rest = torch.randn(v - 5, h, dtype=torch.float64) / 2
    rest_bias = torch.randn(v - 5, dtype=torch.float64)
    target = torch.tensor([1, 1029, 4])

    def scores(hidden, small, offsets):
        values = linear_logprob(
            hidden,
            torch.cat([small, rest]),
            target,
            bias=torch.cat([offsets, rest_bias]),
            temperature=0.7,
            logit_scale=1.2,
            softcap=2.5,
            outputs=("logp", "entropy", "mean_logits", "lse"),
            options=ScoringOptions(backend=backend, **PLANS[plan]),
        )
        return values.logp, values.entropy, values.mean_logits, values.lse

    torch.autograd.gradcheck(scores, (hidden, small, offsets), atol=1e-7, rtol=1e-6)
    frozen = small.detach(), offsets.detach()
    torch.autograd.gradcheck(lambda x: scores(x, *frozen), (hidden,), atol=1e-7, rtol=1e-6)


@backends
def test_gradcheck_direct(backend):
    case = make_case(rows=4, hidden=3, vocab=30, bias=True)
    hidden = case.hidden.clone().requires_grad_()

    def logp(hidden):
        return linear_logprob(
            hidden,
            case.weight,
            case.target,
            bias=case.bias,
            softcap=2.5,
            temperature=0.7,
            options=ScoringOptions(backend=backend, schedule="direct"),
        ).logp

    torch.autograd.gradcheck(logp, (hidden,), atol=1e-7, rtol=1e-6)
