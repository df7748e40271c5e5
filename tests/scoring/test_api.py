# SPDX-License-Identifier: Apache-2.0
"""The contract of linear_logprob and explain: signatures, shapes, dtypes, layouts, autocast, and
that explain's cost is what is paid."""

import contextlib
import inspect

import pytest
import torch

import fastpref
from fastpref import ScoringOptions, TokenScores, explain, linear_logprob
from fastpref.scoring import Plan
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import BACKENDS, DTYPES, make_case
from tests.scoring.operations import Operations

backends = pytest.mark.parametrize("backend", BACKENDS)


def test_signatures():
    signature = inspect.signature(linear_logprob)
    assert list(signature.parameters) == [
        "hidden",
        "weight",
        "target",
        "bias",
        "ignore_index",
        "temperature",
        "logit_scale",
        "softcap",
        "outputs",
        "tp_group",
        "vocab_range",
        "options",
        "lora",
        "weight_context",
        "restrict_to",
        "reduce_hidden_grad",
        "weight_grad_basis",
    ]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    assert (
        kinds
        == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3 + [inspect.Parameter.KEYWORD_ONLY] * 14
    )
    defaults = [parameter.default for parameter in signature.parameters.values()][3:]
    assert defaults == [None, -100, 1.0, 1.0, None, ("logp",), *[None] * 6, True, None]
    assert fastpref.linear_logprob is linear_logprob
    assert TokenScores._fields == (
        "logp",
        "entropy",
        "log_sum_sq_probs",
        "mean_logits",
        "is_top1",
        "lse",
    )


@pytest.mark.parametrize("name", OUTPUTS)
def test_only_what_was_asked_for(name):
    case = make_case(rows=5, vocab=11)
    scores = linear_logprob(case.hidden, case.weight, case.target, outputs=(name,))
    assert [field for field in OUTPUTS if getattr(scores, field) is not None] == [name]


def test_no_output_at_all():
    case = make_case(rows=5, vocab=11)
    assert linear_logprob(case.hidden, case.weight, case.target, outputs=()) == TokenScores()


def test_which_outputs_are_differentiable():
    case = make_case(rows=5, vocab=11)
    hidden = case.hidden.clone().requires_grad_()
    scores = linear_logprob(hidden, case.weight, case.target, outputs=OUTPUTS)
    assert [name for name in OUTPUTS if getattr(scores, name).requires_grad] == [
        "logp",
        "entropy",
        "mean_logits",
        "lse",
    ]


@backends
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3), (0,), (0, 5), (3, 0)])
def test_shapes(backend, shape):
    hidden = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, shape)
    scores = linear_logprob(
        hidden, weight, target, outputs=OUTPUTS, options=ScoringOptions(backend=backend)
    )
    assert all(value.shape == target.shape for value in scores)
    expected = (hidden @ weight.t()).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(scores.logp, expected)
    actual = torch.autograd.grad(scores.logp.sum(), (hidden, weight))
    for a, b in zip(actual, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["auto", "keep", "recompute"])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_scored(backend, dtype, schedule, frozen):
    """Zeros that are still connected, so that a rank without tokens joins the backward pass."""
    hidden = torch.full((2, 3, 4), torch.nan, dtype=dtype).requires_grad_()
    weight = torch.randn(11, 4, dtype=dtype).requires_grad_(not frozen)
    bias = torch.randn(11, dtype=dtype).requires_grad_(not frozen)
    scores = linear_logprob(
        hidden,
        weight,
        torch.full((2, 3), -100),
        bias=bias,
        outputs=("logp",) if frozen else OUTPUTS,
        options=ScoringOptions(backend=backend, schedule=schedule),
    )
    for value in scores:
        assert value is None or (value == 0).all()
    assert scores.logp.requires_grad
    scores.logp.sum().backward()
    for tensor in (hidden,) if frozen else (hidden, weight, bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@backends
def test_nothing_scored_without_gradient(backend):
    weight = torch.randn(11, 4)
    scores = linear_logprob(
        torch.randn(3, 4),
        weight,
        torch.full((3,), -100),
        outputs=OUTPUTS,
        options=ScoringOptions(backend=backend),
    )
    assert all((value == 0).all() for value in scores)


def test_another_ignore_index():
    case = make_case(rows=40, vocab=11, ignored=0.3)
    target = torch.where(case.scored, case.target, 3)
    scores = linear_logprob(case.hidden, case.weight, target, ignore_index=3)
    assert ((scores.logp == 0) == (target == 3)).all()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_layouts(backend, dtype, schedule):
    """Inputs that are not contiguous, and an upstream gradient of stride 0, give what contiguous
    copies give, in gradients of the inputs' shapes."""
    b, t, h, v = 3, 5, 6, 40
    options = ScoringOptions(backend=backend, schedule=schedule)
    sequence = torch.randn(b, t + 1, h).to(dtype)
    table = torch.randn(v + 7, h).to(dtype)
    biases = torch.randn(2 * v).to(dtype)
    labels = torch.randint(0, v, (t + 1, b)).t()
    variants = {
        "shifted": (sequence[:, :-1], table[7:], biases[:v], labels[:, 1:]),
        "transposed": (
            sequence.transpose(0, 1)[:t].transpose(0, 1),
            table[7:].t().contiguous().t(),
            biases[::2],
            labels[:, 1:].int(),
        ),
        "columns": (
            torch.cat([sequence, sequence], -1)[:, 1:, h // 2 : h // 2 + h],
            torch.cat([table, table], 1)[:v, 1 : h + 1],
            biases[:1].expand(v),
            labels[:, 1:],
        ),
    }
    for name, (*leaves, target) in variants.items():
        results = []
        for copy in (False, True):
            hidden, weight, bias = (
                (leaf.contiguous() if copy else leaf).detach().requires_grad_() for leaf in leaves
            )
            logp = linear_logprob(
                hidden,
                weight,
                target.long().contiguous() if copy else target,
                bias=bias,
                options=options,
            ).logp
            (logp.sum() if not copy else (logp * torch.ones(b, t)).sum()).backward()
            results.append((logp, hidden.grad, weight.grad, bias.grad))
        tolerance = 8 * torch.finfo(dtype).eps
        for one, other in zip(*results, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=name)


@backends
@pytest.mark.parametrize(
    "hidden_dtype, weight_dtype, product",
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_mixed_dtypes(backend, hidden_dtype, weight_dtype, product):
    """The wider dtype is used, and each gradient has its own input's."""
    case = make_case(rows=30, vocab=257)
    hidden = case.hidden.clone().to(hidden_dtype).requires_grad_()
    weight = case.weight.clone().to(weight_dtype).requires_grad_()
    options = ScoringOptions(backend=backend)
    logp = linear_logprob(hidden, weight, case.target, options=options).logp
    assert explain(hidden, weight, case.target, options=options).dtype == product
    logp.sum().backward()
    wide = [tensor.detach().to(product).requires_grad_() for tensor in (hidden, weight)]
    same = linear_logprob(*wide, case.target, options=options).logp
    same.sum().backward()
    assert torch.equal(logp, same)
    assert torch.equal(hidden.grad, wide[0].grad.to(hidden_dtype))
    assert torch.equal(weight.grad, wide[1].grad.to(weight_dtype))


N, H, V = 150, 5, 2051


def scoring_inputs(needs, dtype=torch.float32):
    case = make_case(rows=N, hidden=H, vocab=V, dtype=dtype, bias=True)
    inputs = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {k: v.clone().requires_grad_(k in needs) for k, v in inputs.items()}
    if "bias" not in needs:
        del leaves["bias"]
    return {**leaves, "target": case.target}


def measured_units(arguments, upstream):
    """u of the products of forward and of backward."""
    unit = 2 * N * H * V
    with Operations() as forward:
        scores = linear_logprob(**arguments)
    with Operations() as backward:
        if upstream:
            torch.autograd.backward(
                [getattr(scores, name) for name in upstream], list(upstream.values())
            )
    return forward.flop / unit, backward.flop / unit


PART = 100 * V * 4  # bytes: 64 of the 150 rows are kept


@backends
@pytest.mark.parametrize(
    "needs, schedule, budget, forward, backward",
    [
        ((), "auto", None, 1, 0),
        (("hidden",), "auto", None, 2, 0),
        (("hidden",), "direct", 1, 2, 0),
        (("hidden",), "keep", None, 1, 1),
        (("hidden",), "recompute", None, 1, 2),
        (("weight",), "auto", None, 1, 1),
        (("weight",), "recompute", None, 1, 2),
        (("weight",), "auto", 1, 1, 2),
        (("hidden", "weight"), "auto", None, 1, 2),
        (("hidden", "weight"), "keep", None, 1, 2),
        (("hidden", "weight"), "keep", PART, 1, 2 + 86 / 150),
        (("hidden", "weight"), "recompute", None, 1, 3),
        (("hidden", "weight"), "recompute", PART, 1, 3),
        (("hidden", "weight"), "auto", 1, 1, 3),
    ],
)
def test_cost_is_what_explain_says(backend, needs, schedule, budget, forward, backward):
    options = ScoringOptions(backend=backend, schedule=schedule, memory_budget=budget)
    arguments = {**scoring_inputs(needs), "options": options}
    plan = explain(**arguments)
    assert isinstance(plan, Plan)
    upstream = {"logp": torch.randn(N)} if needs else {}
    paid = measured_units(arguments, upstream)
    assert paid == pytest.approx((forward, backward), rel=1e-9)
    assert (plan.forward_units, plan.backward_units) == pytest.approx(paid, rel=1e-9)
    assert plan.units == pytest.approx(sum(paid))
    assert plan.backend == backend


@backends
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
@pytest.mark.parametrize("names", [("entropy",), ("lse",), ("logp", "entropy", "lse")])
def test_entropy_and_lse_cost_one_unit_more_at_most(backend, schedule, names):
    options = ScoringOptions(backend=backend, schedule=schedule)
    arguments = {
        **scoring_inputs(("hidden", "weight")),
        "options": options,
        "outputs": ("logp", "entropy", "lse"),
    }
    plan = explain(**arguments)
    upstream = {name: torch.randn(N) for name in names}
    forward, backward = measured_units(arguments, upstream)
    assert forward + backward <= plan.units + (schedule == "auto") + 1e-9


@backends
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_an_output_that_nobody_differentiates_costs_nothing(backend, schedule):
    options = ScoringOptions(backend=backend, schedule=schedule)
    arguments = {**scoring_inputs(("hidden", "weight")), "options": options}
    with_all = {**arguments, "outputs": OUTPUTS}
    upstream = {"logp": torch.randn(N)}
    assert measured_units(with_all, upstream) == measured_units(arguments, upstream)


@backends
def test_a_bias_alone_costs_no_large_product(backend):
    arguments = {**scoring_inputs(("bias",)), "options": ScoringOptions(backend=backend)}
    _, backward = measured_units(arguments, {"logp": torch.randn(N)})
    assert backward <= 1 / H
    assert explain(**arguments).units == 1


@backends
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
@pytest.mark.parametrize("names", [("logp",), ("logp", "entropy")])
def test_rows_without_gradient_cost_nothing(backend, schedule, names):
    options = ScoringOptions(backend=backend, schedule=schedule)
    arguments = {
        **scoring_inputs(("hidden", "weight")),
        "options": options,
        "outputs": names,
    }
    gradient = torch.randn(N)
    _, whole = measured_units(arguments, dict.fromkeys(names, gradient))
    gradient[: N // 2] = 0
    _, half = measured_units(arguments, dict.fromkeys(names, gradient))
    assert half == pytest.approx(whole / 2)
    _, nothing = measured_units(arguments, dict.fromkeys(names, torch.zeros(N)))
    assert nothing == 0


@backends
def test_unscored_rows_cost_nothing(backend):
    arguments = {
        **scoring_inputs(("hidden", "weight")),
        "options": ScoringOptions(backend=backend),
    }
    arguments["target"] = arguments["target"].clone()
    arguments["target"][::2] = -100
    assert explain(**arguments).scored == N // 2
    assert measured_units(arguments, {"logp": torch.randn(N)}) == pytest.approx((0.5, 1.0))


def test_explain_prints_one_line():
    line = str(explain(**scoring_inputs(("hidden", "weight"))))
    assert "\n" not in line
    for part in ("keep", "3.00u", "MiB", "hidden, weight", f"{N} of {N} rows"):
        assert part in line


def test_explain_computes_nothing():
    arguments = scoring_inputs(("hidden", "weight"))
    with Operations() as operations:
        explain(**arguments)
    assert operations.flop == 0


@backends
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, schedule, dtype):
    """The weight is cast once per call, products run in the autocast dtype, gradients come back in
    the parameters' dtype."""
    arguments = scoring_inputs(("hidden", "weight", "bias"))
    arguments["options"] = ScoringOptions(backend=backend, schedule=schedule)
    weight, gradient = arguments["weight"], torch.randn(N)
    with torch.autocast("cpu", dtype=dtype), Operations(weight.numel()) as operations:
        assert explain(**arguments).dtype == dtype
        logp = linear_logprob(**arguments).logp
    forward_casts = operations.casts
    with operations:
        logp.backward(gradient)
    assert logp.dtype == torch.float32
    # d weight is written in float32 at once.
    assert forward_casts == operations.casts == 1

    low = {
        name: arguments[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight")
    }
    bias = arguments["bias"].detach().requires_grad_()
    same = linear_logprob(
        **low, bias=bias, target=arguments["target"], options=arguments["options"]
    ).logp
    same.backward(gradient)
    assert torch.equal(logp, same)
    for name, leaf in (*low.items(), ("bias", bias)):
        assert arguments[name].grad.dtype == torch.float32
        assert torch.equal(arguments[name].grad, leaf.grad.float())


@backends
def test_autocast_leaves_float64_alone(backend):
    case = make_case(rows=30, vocab=257)
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
    options = ScoringOptions(backend=backend)
    expected = linear_logprob(hidden, weight, case.target, options=options).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logprob(hidden, weight, case.target, options=options).logp
        logp.sum().backward()
    assert logp.dtype == torch.float64 and torch.equal(logp, expected)
    assert hidden.grad.dtype == torch.float64


def test_a_partitioned_head():
    """Holds its data inside the context alone; backward enters it again."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    whole = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    target, weight, entered = torch.arange(6), whole.new_empty(0), []

    @contextlib.contextmanager
    def gathered(given, bias):
        entered.append(bias)
        given.data = whole
        yield
        given.data = whole.new_empty(0)

    for schedule in ("auto", "keep", "recompute"):
        options = ScoringOptions(schedule=schedule)
        given = {"weight_context": gathered, "options": options}
        plan = fastpref.explain(hidden, weight, target, **given)
        assert plan.vocab_size == 11
        entered.clear()
        logp = linear_logprob(hidden, weight, target, **given).logp
        assert len(entered) == 1 and weight.shape == (0,)
        (found,) = torch.autograd.grad(logp.sum(), hidden)
        assert len(entered) == 2
        expected = linear_logprob(hidden, whole, target, options=options).logp
        assert torch.equal(logp, expected)
        assert torch.equal(found, torch.autograd.grad(expected.sum(), hidden)[0])


@pytest.mark.parametrize("given", [3, lambda weight, bias: None])
def test_a_weight_context_that_is_none(given):
    hidden, weight = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(TypeError, match="weight_context must be a function of weight and bias"):
        linear_logprob(hidden, weight, torch.zeros(2, dtype=torch.long), weight_context=given)
