# SPDX-License-Identifier: Apache-2.0
"""torch.compile without graph breaks, over changing shapes: the numbers of eager mode; and the
operators that make it possible."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastpref import (
    PreferenceOutput,
    ScoringOptions,
    linear_divergence,
    linear_logprob,
    nn,
    objectives,
    preference_loss,
)
from fastpref.objectives import registry
from fastpref.scoring.api import ask
from fastpref.scoring.operators import DIVERGENCE, SCORES, WITH_MIXTURE
from fastpref.scoring.request import make_request
from fastpref.scoring.rules.compared import WithMixture
from fastpref.scoring.rules.divergence import Divergence
from fastpref.scoring.rules.scores import Scores
from tests.preference.cases import B, configured, extras_of

pytestmark = pytest.mark.heavy

H, V, TEACHER = 8, 30, 5
SHAPES = ((B, 6), (B, 9), (B, 7))
operators = torch.ops.fastpref


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def draw(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


class Batch:
    def __init__(self, rows: int, length: int, needs=("hidden", "weight", "bias")) -> None:
        self.hidden, self.weight, self.bias = draw(rows, length, H), draw(V, H), draw(V)
        self.target = torch.randint(V, (rows, length))
        self.target[:, :2] = -100
        self.ref_hidden, self.ref_weight = draw(rows, length, TEACHER), draw(V, TEACHER)
        self.leaves = [getattr(self, name).requires_grad_() for name in needs]


def compare(function, batches, backend="aot_eager", dynamic=True) -> None:
    """Of a 0-dim result and its gradients."""
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch in batches:
        want, got = function(batch), compiled(batch)
        torch.testing.assert_close(got, want)
        pairs = zip(*(torch.autograd.grad(one, batch.leaves) for one in (got, want)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)


def score(batch: Batch, **options) -> Tensor:
    scores = linear_logprob(
        1.5 * batch.hidden,
        batch.weight,
        batch.target,
        bias=batch.bias,
        softcap=3.0,
        outputs=("logp", "entropy", "mean_logits", "is_top1"),
        options=ScoringOptions(**options),
    )
    others = 0.3 * scores.entropy.sum() + scores.mean_logits.square().sum()
    return scores.logp.square().sum() + others + scores.is_top1.sum()


def average(batch: Batch) -> Tensor:
    """Mean logits without a cap, whose gradient is no rule's."""
    scores = linear_logprob(
        1.5 * batch.hidden,
        batch.weight,
        batch.target,
        bias=batch.bias,
        outputs=("logp", "mean_logits"),
    )
    return (scores.logp * scores.mean_logits).sum()


def diverge(batch: Batch) -> Tensor:
    value = linear_divergence(
        1.5 * batch.hidden,
        batch.weight,
        batch.ref_hidden,
        batch.ref_weight,
        batch.target != -100,
        student_bias=batch.bias,
        divergence="jsd",
    )
    return value.square().sum()


def prefer(batch: Batch, objective="dpo", **changes) -> Tensor:
    output = preference_loss(
        1.5 * batch.hidden,
        batch.weight,
        batch.target,
        objective,
        **{
            "bias": batch.bias,
            "ref_hidden": batch.ref_hidden,
            "ref_weight": batch.ref_weight,
            "outputs": ("entropy", "mean_logits", "accuracy"),
        }
        | changes,
    )
    return output.loss + 0.1 * output.logps.sum() + output.metrics["entropy"]


FUNCTIONS = {
    "linear_logprob": score,
    "mean logits": average,
    "linear_divergence": diverge,
    "preference_loss": prefer,
}


def but(ordinary: str, names: Iterable[str]) -> list[Any]:
    """All others are a sweep's."""
    return [one if one == ordinary else pytest.param(one, marks=pytest.mark.slow) for one in names]


@pytest.mark.parametrize(
    "name",
    [
        name
        if name.startswith(("linear_logprob", "pref"))
        else pytest.param(name, marks=pytest.mark.slow)
        for name in FUNCTIONS
    ],
)
@pytest.mark.parametrize(
    "needs",
    [
        ("hidden", "weight", "bias"),
        *(pytest.param((one,), marks=pytest.mark.slow) for one in ("hidden", "weight")),
    ],
)
def test_as_eager(name: str, needs) -> None:
    compare(FUNCTIONS[name], [Batch(*shape, needs) for shape in SHAPES])


@pytest.mark.parametrize("name", but("preference_loss", FUNCTIONS))
def test_with_the_default_backend(name: str) -> None:
    compare(FUNCTIONS[name], [Batch(*shape) for shape in SHAPES[:2]], backend="inductor")


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_schedules(schedule: str) -> None:
    batches = [Batch(*shape) for shape in SHAPES[:2]]
    compare(lambda batch: score(batch, schedule=schedule, memory_budget=10 * V * 8), batches)


def test_one_graph_serves_all_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prefer, fullgraph=True, dynamic=True, backend=counter)
    compiled(Batch(*SHAPES[0]))
    first = counter.frame_count
    for shape in SHAPES[1:]:
        compiled(Batch(*shape))
    assert counter.frame_count == first


def test_nothing_scored() -> None:
    batch = Batch(*SHAPES[0])
    empty = Batch(*SHAPES[1])
    empty.target.fill_(-100)
    compare(score, [batch, empty])


@pytest.mark.parametrize(
    "layout",
    [pytest.param("interleaved", marks=pytest.mark.slow), torch.tensor([[0, 1], [2, 3]])],
)
def test_the_output_knows_its_layout(layout) -> None:
    """Inside what is traced and outside, also where a field was replaced."""

    def function(batch: Batch):
        output = preference_loss(batch.hidden, batch.weight, batch.target, "simpo", layout=layout)
        doubled = output._replace(loss=2 * output.loss)
        return doubled, doubled.chosen_logps - doubled.rejected_logps

    batch = Batch(*SHAPES[0])
    want, gaps = function(batch)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    output, traced = compiled(batch)
    assert isinstance(output, PreferenceOutput)
    torch.testing.assert_close([*output[:4], traced], [*want[:4], gaps])
    torch.testing.assert_close(output.rejected_logps, want.rejected_logps)


@pytest.mark.slow
def test_an_update_of_the_head() -> None:
    def function(batch: Batch) -> Tensor:
        return prefer(batch, lora=(batch.a, batch.b, 0.7))

    batches = [Batch(*shape, needs=("hidden", "bias")) for shape in SHAPES[:2]]
    for batch in batches:
        batch.a, batch.b = draw(2, H).requires_grad_(), draw(V, 2).requires_grad_()
        batch.leaves += [batch.a, batch.b]
    compare(function, batches)


def pairwise(policy_chosen: Tensor, policy_rejected: Tensor) -> Tensor:
    return (policy_rejected - policy_chosen).exp()


def single(policy: Tensor, *, factor: float = 2.0) -> Tensor:
    return (factor * policy).exp()


def listwise(policy: Tensor, *, mask: Tensor | None = None) -> Tensor:
    return policy.logsumexp(1)


USER_FUNCTIONS = {
    "callable": (pairwise, {}),
    "pair": (objectives.Objective(pairwise, unit="pair", scope="pair"), {}),
    "unit": (objectives.Objective(single, unit="unit", scope="unit"), {"factor": 0.5}),
    "list": (
        objectives.Objective(listwise, unit="list", scope="list"),
        {"layout": "groups", "group_size": 4},
    ),
}


@pytest.mark.parametrize("name", but("unit", USER_FUNCTIONS))
def test_user_functions(name: str) -> None:
    function, changes = USER_FUNCTIONS[name]
    compare(
        lambda batch: prefer(batch, function, ref_hidden=None, ref_weight=None, **changes),
        [Batch(*shape) for shape in SHAPES[:2]],
    )


REPRESENTATIVES = ("ipo", "epsilon_dpo", "cispo")


def compare_objective(name: str) -> None:
    declared = next(one for one in registry.catalogue() if one.name == name)
    objective, extras = configured(declared), extras_of(declared)
    extras = {key: value for key, value in extras.items() if key not in FILLED}
    changes = {"extras": extras}
    if declared.name == "mallows_po":
        extras.pop("ref_entropy", None)
    if declared.unit == "list":
        changes |= {"layout": "groups", "group_size": 4}
    if "old_token_logp" in extras:
        extras["old_token_logp"] = extras["old_token_logp"][:, :6]
    if not declared.needs_reference and declared.unit != "token":
        changes |= {"ref_hidden": None, "ref_weight": None}
    batch = Batch(B, 6)

    def function(batch: Batch) -> Tensor:
        return prefer(batch, objective, **changes)

    compare(function, [batch], dynamic=None)


FILLED = ("chosen_kl", "rejected_kl", "margin_plus", "margin_minus")


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_objectives(name: str) -> None:
    compare_objective(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in objectives.names() if n not in REPRESENTATIVES])
def test_every_other_objective(name: str) -> None:
    compare_objective(name)


COMPOSITES = {
    "wpo": lambda: objectives.wpo("dpo"),
    "combine": lambda: objectives.combine(["dpo", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(name: str) -> None:
    objective = COMPOSITES[name]()
    compare(lambda batch: prefer(batch, objective), [Batch(*shape) for shape in SHAPES[:2]])


MODULES = {
    "dpo": nn.FusedLinearDPOLoss(use_ref_model=False),
    "dpo with likelihood": nn.FusedLinearDPOLoss(use_ref_model=False, compute_nll_loss=True),
    "cpo": nn.FusedLinearCPOLoss(),
    "simpo": nn.FusedLinearSimPOLoss(),
    "orpo": nn.FusedLinearORPOLoss(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    module = MODULES[name]
    compare(
        lambda batch: module(batch.weight, 1.5 * batch.hidden, batch.target, batch.bias)[0],
        [Batch(*shape) for shape in SHAPES[:2]],
    )


@pytest.mark.slow
def test_settings_of_a_module_may_change_later() -> None:
    module = nn.FusedLinearDPOLoss(use_ref_model=False)
    expected = nn.FusedLinearDPOLoss(use_ref_model=False, beta=0.3, compute_nll_loss=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    batch = Batch(*SHAPES[0])
    given = (batch.weight, batch.hidden, batch.target, batch.bias)
    compiled(*given)
    module.beta, module.compute_nll_loss = 0.3, True
    torch.testing.assert_close(compiled(*given), expected(*given))


@pytest.mark.slow
def test_a_module_of_tokens() -> None:
    module = nn.FusedLinearGRPOLoss(beta=0.0)

    def function(batch: Batch) -> Tensor:
        scored, advantages = batch.target != -100, batch.weight.detach()[: len(batch.target), 0]
        tokens = batch.target.clamp(min=0)
        return module(1.5 * batch.hidden, batch.weight, tokens, scored, advantages, batch.bias)[0]

    compare(function, [Batch(*shape) for shape in SHAPES[:2]])


def test_packed_rows() -> None:
    def function(batch: Batch) -> Tensor:
        boundaries = torch.arange(0, batch.target.numel() + 1, batch.target.shape[1])
        return preference_loss(
            batch.hidden.flatten(0, 1),
            batch.weight,
            batch.target.flatten(),
            "simpo",
            bias=batch.bias,
            cu_seqlens=boundaries,
        ).loss

    compare(function, [Batch(*shape) for shape in SHAPES[:2]])


def test_without_gradient() -> None:
    batch = Batch(*SHAPES[0])
    compiled = torch.compile(prefer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(batch)
    assert not got.requires_grad
    torch.testing.assert_close(got, prefer(batch).detach())


def test_under_autocast() -> None:
    def function(batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_logprob(batch.hidden, batch.weight, batch.target).logp.sum()

    batch = Batch(*SHAPES[0], needs=())
    batch.hidden = batch.hidden.float().requires_grad_()
    batch.weight = batch.weight.float().requires_grad_()
    batch.leaves = [batch.hidden, batch.weight]
    compare(function, [batch])


# The operators by themselves.


def scoring_arguments(dtype=torch.float64, needs=True, lora=False, schedule="auto", scored=True):
    hidden, weight = draw(3, 4, H, dtype=dtype), draw(V, H, dtype=dtype)
    bias = draw(V, dtype=dtype)
    target = torch.randint(V, (3, 4))
    target[:, :2] = -100
    if not scored:
        target.fill_(-100)
    update = (draw(2, H, dtype=dtype), draw(V, 2, dtype=dtype), 0.7) if lora else None
    leaves = [hidden, bias, *((update[0], update[1]) if update else (weight,))]
    for one in leaves if needs else ():
        one.requires_grad_()
    asked = ask(
        hidden,
        weight,
        target,
        bias=bias,
        lora=update,
        outputs=("logp", "entropy", "mean_logits", "lse", "is_top1"),
        options=ScoringOptions(schedule=schedule, memory_budget=8 * V * 8),
    )
    return SCORES.arguments(*asked[:3], target)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float32},
        {"needs": False},
        {"lora": True},
        {"schedule": "recompute"},
        {"scored": False},
    ],
    ids=str,
)
def test_opcheck_of_scoring(changes) -> None:
    torch.library.opcheck(operators.linear_scores.default, scoring_arguments(**changes))


def test_opcheck_of_scoring_backward() -> None:
    arguments = scoring_arguments()
    found = operators.linear_scores(*arguments)
    split = SCORES.inputs
    inputs = tuple(one.detach() if isinstance(one, Tensor) else one for one in arguments[:split])
    upstream = [torch.ones(3, 4).double(), None, None, None, None, None]
    kept = [one.detach() for one in found[6:]]
    torch.library.opcheck(
        operators.linear_scores_backward.default,
        (*inputs, *kept, *upstream, *arguments[split:]),
    )


def of_two_heads(rule, needs=("hidden", "weight")):
    hidden, weight = draw(3, 4, H), draw(V, H)
    for name, one in (("hidden", hidden), ("weight", weight)):
        one.requires_grad_(name in needs)
    mask = torch.rand(3, 4) < 0.6
    target = torch.where(mask, torch.randint(V, (3, 4)), -100)
    models = [
        ask(hidden, weight, target).models[0],
        ask(draw(3, 4, TEACHER), draw(V + 2, TEACHER), target, vocab_range=(0, V)).models[0],
    ]
    request = make_request(models, ignore_index=-100, options=None)
    return request, rule, models, target


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",), ()])
def test_opcheck_of_divergences(needs) -> None:
    arguments = DIVERGENCE.arguments(*of_two_heads(Divergence("reverse_kl", 0.5), needs))
    torch.library.opcheck(operators.linear_divergence.default, arguments)


def test_opcheck_of_divergences_backward() -> None:
    arguments = DIVERGENCE.arguments(*of_two_heads(Divergence("reverse_kl", 0.5)))
    _, kept, direct = operators.linear_divergence(*arguments)
    split = DIVERGENCE.inputs
    inputs = tuple(one.detach() if isinstance(one, Tensor) else one for one in arguments[:split])
    more = kept.detach(), direct.detach(), torch.ones(3, 4).double()
    torch.library.opcheck(
        operators.linear_divergence_backward.default, (*inputs, *more, *arguments[split:])
    )


def test_opcheck_of_mixtures() -> None:
    rule = WithMixture(Scores(("logp",), ("logp",)), Scores(("logp",), ()), 0.1)
    arguments = WITH_MIXTURE.arguments(*of_two_heads(rule, ()))
    torch.library.opcheck(operators.linear_scores_and_mixture.default, arguments)


@pytest.mark.parametrize("name", ["linear_scores", "linear_divergence"])
def test_a_second_derivative_of_an_operator(name: str) -> None:
    arguments = scoring_arguments()
    if name == "linear_divergence":
        arguments = DIVERGENCE.arguments(*of_two_heads(Divergence("forward_kl", 0.5)))
    value = getattr(operators, name)(*arguments)[0].sum()
    (gradient,) = torch.autograd.grad(value, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_batches_are_not_traced() -> None:
    batch = Batch(*SHAPES[0])
    options = ScoringOptions(schedule="batches")
    compiled = torch.compile(
        lambda one: prefer(one, options=options), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="schedule='batches'"):
        compiled(batch)
