# SPDX-License-Identifier: Apache-2.0
"""torch.func, batches of upstream gradients, fake tensors and make_fx: every public function
against plain torch in float64, and words of its own where there is no derivative."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fastpref import (
    ScoringOptions,
    explain,
    linear_divergence,
    linear_logits,
    linear_logprob,
    preference_loss,
    sequence_logp,
    sparse_divergence,
)
from fastpref.scoring import batches

B, T, H, V = 4, 3, 5, 23
GENERATOR = torch.Generator().manual_seed(3)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


HIDDEN, WEIGHT, TEACHER = draw(B, T, H), draw(V, H), draw(V, H)
TARGET = torch.randint(V, (B, T), generator=GENERATOR)
TARGET[0, 1], TARGET[2] = -100, -100
SCORED = TARGET != -100
KEPT = SCORED.any(1)[:, None].expand(B, T)
BOUNDARIES = torch.tensor([0, T, 2 * T, 2 * T, 3 * T])
WEIGHTS = draw(B, T).exp()
REF_LOGPS = -3 - draw(B).abs()
Function = Callable[[Tensor, Tensor], Tensor]


def options(schedule: str) -> ScoringOptions:
    budget = 2 * T * V * 8 if schedule == "batches" else None
    return ScoringOptions(schedule=schedule, memory_budget=budget)  # type: ignore[arg-type]


def token_logp(hidden: Tensor, weight: Tensor) -> Tensor:
    logp = (hidden @ weight.t()).log_softmax(-1)
    return torch.where(SCORED, logp.gather(-1, TARGET.clamp(min=0)[..., None])[..., 0], 0)


def dpo(hidden: Tensor, weight: Tensor) -> Tensor:
    ratios = token_logp(hidden, weight).sum(1) - REF_LOGPS
    chosen, rejected = ratios.chunk(2)
    return torch.nn.functional.softplus(-0.1 * (chosen - rejected)).mean()


def kl(hidden: Tensor, weight: Tensor) -> Tensor:
    logp = (hidden @ weight.t()).log_softmax(-1)
    teacher = (HIDDEN @ TEACHER.t()).log_softmax(-1)
    return torch.where(SCORED, (teacher.exp() * (teacher - logp)).sum(-1), 0)


def weighted_dpo(hidden: Tensor, weight: Tensor) -> Tensor:
    reference = torch.where(SCORED, REF_LOGPS[:, None] / T, 0)
    ratios = ((token_logp(hidden, weight) - reference) * WEIGHTS).sum(1)
    chosen, rejected = ratios.chunk(2)
    return torch.nn.functional.softplus(-0.1 * (chosen - rejected)).mean()


def entropy(hidden: Tensor, weight: Tensor) -> Tensor:
    logp = (hidden @ weight.t()).log_softmax(-1)
    return torch.where(SCORED, -(logp.exp() * logp).sum(-1), 0)


def preferring(schedule: str = "auto", **given: Any) -> Function:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        given_here = {"ref_logps": REF_LOGPS, "options": options(schedule)} | given
        return preference_loss(hidden, weight, TARGET, "dpo", **given_here).loss

    return loss


def preferring_packed(hidden: Tensor, weight: Tensor) -> Tensor:
    given = {"cu_seqlens": BOUNDARIES, "ref_logps": REF_LOGPS}
    return preference_loss(hidden[KEPT], weight, TARGET[KEPT], "dpo", **given).loss


def scoring(schedule: str, name: str = "logp") -> Function:
    def scores(hidden: Tensor, weight: Tensor) -> Tensor:
        given = {"outputs": ("logp", name), "options": options(schedule)}
        return getattr(linear_logprob(hidden, weight, TARGET, **given), name)

    return scores


CASES: dict[str, tuple[Function, Function]] = {
    "linear_logprob, keep": (scoring("keep"), token_logp),
    "linear_logprob, recompute": (scoring("recompute"), token_logp),
    "linear_logprob, entropy": (scoring("auto", "entropy"), entropy),
    "linear_divergence": (
        lambda h, w: linear_divergence(h, w, HIDDEN, TEACHER, SCORED),
        kl,
    ),
    "sequence_logp, padded": (
        lambda h, w: sequence_logp(h.sum(-1) * w.sum(), mask=SCORED, token_weights=WEIGHTS),
        lambda h, w: torch.where(SCORED, WEIGHTS * h.sum(-1) * w.sum(), 0).sum(1),
    ),
    "sequence_logp, packed": (
        lambda h, w: sequence_logp((h.sum(-1) * w.sum())[KEPT], cu_seqlens=BOUNDARIES),
        lambda h, w: torch.where(KEPT, h.sum(-1) * w.sum(), 0).sum(1),
    ),
    "preference_loss": (preferring(), dpo),
    "preference_loss, recompute": (preferring("recompute"), dpo),
    "preference_loss, batches": (preferring("batches"), dpo),
    "preference_loss, packed": (preferring_packed, dpo),
    "preference_loss, pairs by index": (
        preferring(layout=torch.tensor([[0, 2], [1, 3]])),
        dpo,
    ),
    "preference_loss, token weights": (
        preferring(token_weights=WEIGHTS, ref_logps=REF_LOGPS[:, None].expand(B, T) / T),
        weighted_dpo,
    ),
}


def squared(function: Function) -> Function:
    return lambda hidden, weight: function(hidden, weight).square().sum()


def grad(function: Function) -> Any:
    return func.grad(squared(function), (0, 1))(HIDDEN, WEIGHT)


def vjp(function: Function) -> Any:
    value, pullback = func.vjp(function, HIDDEN, WEIGHT)
    return value, pullback(torch.ones_like(value))


def jacrev(function: Function) -> Any:
    return func.jacrev(function, (0, 1))(HIDDEN, WEIGHT)


def upstream(value: Tensor) -> Tensor:
    return torch.linspace(-1, 2, 3 * value.numel(), dtype=torch.float64).view(3, *value.shape)


def vmap_of_vjp(function: Function) -> Any:
    value, pullback = func.vjp(function, HIDDEN, WEIGHT)
    return func.vmap(pullback)(upstream(value))


def recorded(function: Function) -> tuple[Tensor, list[Tensor]]:
    leaves = [one.clone().requires_grad_() for one in (HIDDEN, WEIGHT)]
    return function(*leaves), leaves


def is_grads_batched(function: Function) -> Any:
    value, leaves = recorded(function)
    return torch.autograd.grad(value, leaves, upstream(value), is_grads_batched=True)


def vmap_of_a_recorded_graph(function: Function) -> Any:
    value, leaves = recorded(function)
    return func.vmap(lambda one: torch.autograd.grad(value, leaves, one, retain_graph=True))(
        upstream(value)
    )


def vmap_of_grad(function: Function) -> Any:
    """Of several heads."""
    heads = torch.stack([WEIGHT, 0.5 * WEIGHT])
    return func.vmap(func.grad(squared(function), (0, 1)), (None, 0))(HIDDEN, heads)


def grad_of_vmap(function: Function) -> Any:
    heads = torch.stack([WEIGHT, 0.5 * WEIGHT])
    return func.grad(lambda h, w: func.vmap(squared(function), (None, 0))(h, w).sum(), (0, 1))(
        HIDDEN, heads
    )


WAYS = (
    grad,
    vjp,
    jacrev,
    vmap_of_vjp,
    is_grads_batched,
    vmap_of_a_recorded_graph,
    vmap_of_grad,
    grad_of_vmap,
)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", CASES)
def test_as_plain_torch(name: str, way: Callable[[Function], Any]) -> None:
    own, plain = CASES[name]
    torch.testing.assert_close(way(own), way(plain), rtol=1e-9, atol=1e-11)


IDS = torch.cat([TARGET.clamp(min=0)[..., None], torch.full((B, T, 1), 7)], -1)
STORED = torch.tensor([-1.5, -2.5]).expand(B, T, 2)
LORA = torch.full((2, H), 0.3), torch.full((V, 2), 0.2), 0.5
IN_SINGLE: dict[str, Function] = {
    **{name: own for name, (own, _) in CASES.items() if name != "linear_divergence"},
    "linear_logprob, an update": lambda h, w: linear_logprob(h, w.detach(), TARGET, lora=LORA).logp,
    "linear_logprob, restricted": lambda h, w: linear_logprob(h, w, TARGET, restrict_to=IDS).logp,
    "linear_divergence": lambda h, w: linear_divergence(h, w, HIDDEN.float(), TEACHER.float()),
    "linear_logits": lambda h, w: linear_logits(h, w, IDS),
    "sparse_divergence": lambda h, w: sparse_divergence(h, w, IDS, STORED, SCORED, tail="bucket"),
}


@pytest.mark.parametrize("name", IN_SINGLE)
def test_backward_alone_under_autocast_rounds_nothing(name: str) -> None:
    leaves = [one.float().requires_grad_() for one in (HIDDEN, WEIGHT)]
    value = IN_SINGLE[name](*leaves)
    given = {"grad_outputs": torch.ones_like(value), "allow_unused": True}
    expected = torch.autograd.grad(value, leaves, retain_graph=True, **given)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(value, leaves, **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_batches_did_run() -> None:
    """Where gradients come in a batch: torch.func goes through two passes."""
    weight = WEIGHT.clone().requires_grad_()
    given = {"ref_logps": REF_LOGPS, "options": options("batches")}
    plan = explain(HIDDEN, weight, TARGET, "dpo", **given)
    assert isinstance(plan.policy, batches.BatchedPlan) and len(plan.policy.plans) > 1


def test_one_sample_at_a_time() -> None:
    """Targets are mapped over too, of which some are not scored."""

    def own(hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, target).logp.square().sum()

    def plain(hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, target.clamp(min=0)[:, None])
        return torch.where(target != -100, logp[:, 0], 0).square().sum()

    got, want = (
        func.vmap(func.grad(one, (0, 2)), (0, 0, None))(HIDDEN, TARGET, WEIGHT)
        for one in (own, plain)
    )
    torch.testing.assert_close(got, want)


def test_batches_of_batches() -> None:
    """One vmap inside another."""
    given = draw(2, 3, B, T)

    def gradients(function: Function) -> Any:
        value, leaves = recorded(function)

        def gradient(one: Tensor) -> Any:
            return torch.autograd.grad(value, leaves, one, retain_graph=True)

        return func.vmap(func.vmap(gradient))(given)

    torch.testing.assert_close(gradients(scoring("keep")), gradients(token_logp))


FUSED = [name for name in CASES if not name.startswith("sequence_logp")]


@pytest.mark.parametrize("name", FUSED)
def test_what_has_no_derivative_says_so(name: str) -> None:
    own, _ = CASES[name]
    total = squared(own)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*use reverse mode"):
        func.jvp(own, (HIDDEN, WEIGHT), (HIDDEN, WEIGHT))
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*use reverse mode"):
        func.hessian(total)(HIDDEN, WEIGHT)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        own(forward_ad.make_dual(HIDDEN, HIDDEN), WEIGHT)
    with pytest.raises(RuntimeError, match=r"no second derivative.*plain torch"):
        func.grad(lambda h: func.grad(total)(h, WEIGHT).sum())(HIDDEN)
    value, leaves = recorded(own)
    (first,) = torch.autograd.grad(value.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*plain torch"):
        first.sum().backward()


@pytest.mark.parametrize("name", ["sequence_logp, padded", "sequence_logp, packed"])
def test_sums_over_sequences_have_every_derivative(name: str) -> None:
    own, plain = CASES[name]
    torch.testing.assert_close(
        *(func.hessian(squared(one))(HIDDEN, WEIGHT) for one in (own, plain))
    )


# Boundaries and pairs by index are looked at on the host, which make_fx refuses.
WRITTEN = [name for name in CASES if not name.endswith(("packed", "pairs by index"))]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_make_fx_writes_down(name: str) -> None:
    own, _ = CASES[name]

    def gradient(hidden: Tensor, weight: Tensor) -> Any:
        leaf = hidden.detach().requires_grad_()
        return torch.autograd.grad(own(leaf, weight).square().sum(), leaf)

    for function in (own, gradient):
        traced = make_fx(function)(HIDDEN.clone(), WEIGHT)
        given = 2 * HIDDEN, WEIGHT + 1
        torch.testing.assert_close(traced(*given), function(*given))


def test_a_weight_that_needs_no_gradient_costs_none() -> None:
    """In the outer of two transforms."""
    seen = func.grad(lambda h: func.vmap(lambda one: scoring("auto")(one, WEIGHT).sum())(h).sum())(
        torch.stack([HIDDEN, 2 * HIDDEN])
    )
    want = func.grad(lambda h: sum(token_logp(one, WEIGHT).sum() for one in h))(
        torch.stack([HIDDEN, 2 * HIDDEN])
    )
    torch.testing.assert_close(seen, want)


@pytest.mark.parametrize("max_scored", [None, B * T - 1])
def test_fake_tensors(max_scored: int | None) -> None:
    """Shapes and dtypes are those of data, forward and backward."""
    limit = ScoringOptions(max_scored=max_scored)
    calls: dict[str, Callable[..., Tensor]] = {
        "linear_logprob": lambda h, w, t, c: linear_logprob(h, w, t, options=limit).logp,
        "linear_divergence": lambda h, w, t, c: linear_divergence(
            h, w, h, w, t != -100, options=limit
        ),
        "preference_loss": lambda h, w, t, c: (
            preference_loss(h, w, t, "simpo", token_weights=h.detach()[..., 0], options=limit).loss
        ),
        "packed": lambda h, w, t, c: (
            preference_loss(
                h.flatten(0, 1), w, t.flatten(), "simpo", cu_seqlens=c, options=limit
            ).loss
        ),
        "sequence_logp": lambda h, w, t, c: sequence_logp(
            (h.sum(-1) + w.sum()).flatten(), cu_seqlens=c
        ),
        "explain": lambda h, w, t, c: (
            (h.sum() + w.sum()) * explain(h, w, t, "simpo", options=limit).units
        ),
    }
    found = []
    for mode in (FakeTensorMode(), None):
        given = (HIDDEN, WEIGHT, TARGET, torch.arange(0, B * T + 1, T))
        hidden, weight, *rest = given if mode is None else map(mode.from_tensor, given)
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        results: list[Tensor] = []
        with mode or nullcontext():
            for call in calls.values():
                value = call(*leaves, *rest)
                results += [value, *torch.autograd.grad(value.sum(), leaves)]
        found.append([(one.shape, one.dtype) for one in results])
    assert found[0] == found[1]
