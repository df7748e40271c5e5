# SPDX-License-Identifier: Apache-2.0
"""linear_divergence against whole logits in plain torch, differentiated by autograd, in float64."""

import inspect

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, explain_divergence, linear_divergence
from tests.scoring.cases import BACKENDS
from tests.scoring.operations import Operations

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv", "bhattacharyya", "cosine")
N, H, TEACHER, V = 23, 6, 9, 31
MAPS = {
    "plain": {},
    "scaled": {"temperature": 1.7, "logit_scale": 0.6},
    "capped": {"softcap": 3.0, "temperature": 0.8},
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, **map) -> Tensor:
    z = hidden @ weight.t() + (0 if bias is None else bias)
    z = z * map.get("logit_scale", 1.0)
    if map.get("softcap"):
        z = map["softcap"] * torch.tanh(z / map["softcap"])
    return z / map.get("temperature", 1.0)


def by_hand(student: Tensor, teacher: Tensor, divergence: str, beta: float = 0.5) -> Tensor:
    """Of logits (N, V), from the definitions."""
    if divergence == "cosine":
        return 1 - torch.cosine_similarity(student, teacher, dim=-1)
    q, p = student.softmax(-1), teacher.softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1)

    m = (1 - beta) * q + beta * p
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tv": lambda: (p - q).abs().sum(-1) / 2,
        "bhattacharyya": lambda: -(p * q).sqrt().sum(-1).log(),
    }[divergence]()


class Models:
    """Of different width, the teacher's vocabulary padded further."""

    def __init__(self, dtype=torch.float64, needs=("hidden", "weight", "bias"), bias=True) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = draw(N, H), draw(V, H)
        self.bias = draw(V) if bias else None
        self.teacher_hidden, self.teacher_weight = draw(N, TEACHER), 0.6 * draw(V + 5, TEACHER)
        self.teacher_bias = draw(V + 5) if bias else None
        self.mask = torch.rand(N, generator=generator) < 0.7
        self.leaves = [getattr(self, name) for name in needs if getattr(self, name) is not None]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def run(self, **changes) -> Tensor:
        return linear_divergence(
            self.hidden,
            self.weight,
            self.teacher_hidden,
            self.teacher_weight,
            self.mask,
            **({"student_bias": self.bias, "teacher_bias": self.teacher_bias} | changes),
        )

    def expected(self, divergence: str, beta: float = 0.5, **map) -> Tensor:
        student = logits_of(self.hidden, self.weight, self.bias, **map)
        bias = None if self.teacher_bias is None else self.teacher_bias[:V]
        teacher = logits_of(self.teacher_hidden, self.teacher_weight[:V], bias, **map)
        return torch.where(self.mask, by_hand(student, teacher, divergence, beta), 0)

    def compare(self, got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got, want)
        upstream = torch.randn(N, dtype=got.dtype)
        actual = torch.autograd.grad(got, self.leaves, upstream)
        for a, b in zip(actual, torch.autograd.grad(want, self.leaves, upstream), strict=True):
            torch.testing.assert_close(a, b)


ROW = V * 8
SCHEDULES = {
    "all kept": {},
    "kept in part": {"memory_budget": 20 * ROW, "chunk_rows": 5},
    "recomputed": {"schedule": "recompute", "chunk_rows": 4},
    "least": {"memory_budget": 1},
}


@every_backend
@every_divergence
@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("needs", [("hidden", "weight", "bias"), ("hidden",), ("weight",)])
def test_as_by_hand(backend: str, divergence: str, map: str, needs) -> None:
    models = Models(needs=needs)
    options = ScoringOptions(backend=backend)
    got = models.run(divergence=divergence, beta=0.3, options=options, **MAPS[map])
    models.compare(got, models.expected(divergence, 0.3, **MAPS[map]))
    assert not got[~models.mask].any()


@every_divergence
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("needs", [("hidden", "weight", "bias"), ("hidden",)])
def test_schedules(divergence: str, schedule: str, needs) -> None:
    models = Models(needs=needs)
    options = ScoringOptions(**SCHEDULES[schedule])
    models.compare(models.run(divergence=divergence, options=options), models.expected(divergence))


def test_masked_positions_are_not_read() -> None:
    models = Models()
    hidden = torch.where(models.mask[:, None], models.hidden.detach(), torch.nan).requires_grad_()
    teacher = torch.where(models.mask[:, None], models.teacher_hidden, torch.nan)
    arguments = (hidden, models.weight, teacher, models.teacher_weight, models.mask)
    value = linear_divergence(*arguments)
    value.sum().backward()
    assert value.isfinite().all() and models.weight.grad.isfinite().all()
    assert not hidden.grad[~models.mask].any() and hidden.grad[models.mask].any(1).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("needs", [("hidden", "weight", "bias"), ("hidden",)])
def test_rows_without_an_upstream_gradient_reach_nothing(schedule: str, needs) -> None:
    """Whatever they hold; on the CPU they cost no products either."""
    models = Models(needs=needs)
    options = ScoringOptions(**SCHEDULES[schedule])
    dead = models.mask & (torch.arange(N) % 3 == 0)
    upstream = torch.randn(N).double().masked_fill(dead, 0)
    want = torch.autograd.grad(models.run(options=options), models.leaves, upstream)
    with torch.no_grad():
        models.hidden[dead] = torch.inf
    value = models.run(options=options)
    with Operations() as operations:
        got = torch.autograd.grad(value, models.leaves, upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not got[0][dead].any()
    live = int((models.mask & ~dead).sum())
    if schedule == "all kept" and len(needs) > 1:
        assert operations.flop == 2 * 2 * live * H * V


@every_backend
def test_an_overlap_that_underflows(backend: str) -> None:
    hidden = torch.tensor([[300.0]], requires_grad=True)
    heads = torch.tensor([[1.0], [0.0]]), hidden.detach(), torch.tensor([[0.0], [1.0]])
    value = linear_divergence(
        hidden, *heads, divergence="bhattacharyya", options=ScoringOptions(backend=backend)
    )
    (gradient,) = torch.autograd.grad(value.sum(), hidden)
    torch.testing.assert_close(value, torch.tensor([150 - 0.6931472]))
    torch.testing.assert_close(gradient, torch.tensor([[0.25]]), atol=0.26, rtol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_shapes(shape) -> None:
    hidden = torch.randn(*shape, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    got = linear_divergence(hidden, weight, torch.randn(*shape, TEACHER), torch.randn(V, TEACHER))
    assert got.shape == shape and got.dtype == torch.float32
    got.sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.isfinite().all()


@every_backend
@pytest.mark.parametrize("divergence", DIVERGENCES[:-1])
def test_columns_outside_the_vocabulary(backend: str, divergence: str) -> None:
    """A bias of -inf takes a column out of one model's distribution, or of both."""
    models = Models()
    closed = models.bias.detach().clone()
    closed[[0, 4]] = -torch.inf
    teacher = models.teacher_bias.clone()
    teacher[[0, 7]] = -torch.inf
    options = {"divergence": divergence, "options": ScoringOptions(backend=backend)}
    value = models.run(**options, student_bias=closed, teacher_bias=teacher)
    student = logits_of(models.hidden, models.weight, closed)
    other = logits_of(models.teacher_hidden, models.teacher_weight[:V], teacher[:V])
    want = torch.where(models.mask, by_hand(student, other, divergence).detach(), 0)
    infinite = divergence in ("forward_kl", "reverse_kl")
    assert value[models.mask].isinf().all() == infinite
    torch.testing.assert_close(value, want)
    if divergence == "forward_kl":
        return
    only = torch.where(other > -torch.inf, student, other) if infinite else student
    bias = torch.where(teacher[:V] > -torch.inf, closed, teacher[:V]) if infinite else closed
    value = models.run(**options, student_bias=bias, teacher_bias=teacher)
    want = torch.where(models.mask, by_hand(only, other, divergence).detach(), 0)
    torch.testing.assert_close(value, want)
    (gradient,) = torch.autograd.grad(value.sum(), models.hidden)
    assert gradient.isfinite().all()


def test_limits_of_the_jsd_are_the_two_kls() -> None:
    """As GKD defines them."""
    models = Models()
    for beta, name in ((0, "forward_kl"), (1.0, "reverse_kl")):
        models.compare(models.run(divergence="jsd", beta=beta), models.expected(name))


def test_a_model_and_itself() -> None:
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    for name in DIVERGENCES:
        value = linear_divergence(hidden, weight, hidden, weight, divergence=name)
        assert value.abs().max() < 1e-5, name


@every_divergence
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_error_is_that_of_plain_torch(backend, divergence: str, dtype, frozen: bool) -> None:
    needs = ("hidden",) if frozen else ("hidden", "weight")
    exact, low = rounded_models(dtype, needs)
    options = ScoringOptions(backend=backend)
    check_error(exact, low, low.run(divergence=divergence, options=options), divergence, needs)


def rounded_models(dtype: torch.dtype, needs, device: str = "cpu") -> tuple[Models, Models]:
    """The same values in float64 and in ``dtype``."""
    exact, low = Models(needs=needs, bias=False), Models(needs=needs, bias=False)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        rounded = getattr(low, name).detach().to(device, dtype)
        setattr(low, name, rounded.requires_grad_(name in needs))
        setattr(exact, name, rounded.detach().double().requires_grad_(name in needs))
    for models in (exact, low):
        models.mask = models.mask.to(device)
    return exact, low


def check_error(exact: Models, low: Models, value: Tensor, divergence: str, needs) -> None:
    """Within twice that of plain torch with logits in ``low``'s dtype."""
    upstream = torch.randn(N, device=value.device)
    want = measured(exact, exact.expected(divergence), needs, upstream.double())
    student = (low.hidden @ low.weight.t()).float()
    teacher = (low.teacher_hidden @ low.teacher_weight[:V].t()).float()
    plain = torch.where(low.mask, by_hand(student, teacher, divergence), 0)
    eager = measured(low, plain, needs, upstream)
    got = measured(low, value, needs, upstream)
    for a, b, x in zip(got, eager, want, strict=True):
        ulp = torch.finfo(a.dtype).eps * x.abs().max()
        assert (a - x).abs().max() <= 2 * (b - x).abs().max() + 2 * ulp
        assert (a - x).norm() <= 2 * (b - x).norm() + 2 * ulp


def measured(models: Models, value: Tensor, needs, upstream: Tensor) -> list[Tensor]:
    leaves = [getattr(models, name) for name in needs]
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def test_mixed_dtypes_and_autocast() -> None:
    models = Models(dtype=torch.float32, bias=False)
    low = models.teacher_hidden.bfloat16(), models.teacher_weight.bfloat16()
    value = linear_divergence(models.hidden, models.weight, *low, models.mask)
    wide = linear_divergence(
        models.hidden, models.weight, *(one.float() for one in low), models.mask
    )
    assert torch.equal(value, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = linear_divergence(models.hidden, models.weight, *low, models.mask)
    rounded = models.hidden.bfloat16(), models.weight.bfloat16()
    assert torch.equal(auto, linear_divergence(*rounded, *low, models.mask))
    auto.sum().backward()
    assert models.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",), ("weight",), ()])
@pytest.mark.parametrize("schedule", ["all kept", "kept in part", "recomputed"])
def test_cost_is_what_the_plan_says(needs, schedule: str) -> None:
    models = Models(needs=needs, bias=False)
    options = ScoringOptions(**SCHEDULES[schedule])
    plan = explain_divergence(
        models.hidden,
        models.weight,
        models.teacher_hidden,
        models.teacher_weight,
        models.mask,
        options=options,
    )
    with Operations() as operations:
        value = models.run(options=options)
        if needs:
            value.sum().backward()
    unit = 2 * int(models.mask.sum()) * H * V
    assert operations.flop / unit == pytest.approx(plan.units)


def test_backward_twice_and_a_second_derivative() -> None:
    for needs in (("hidden", "weight", "bias"), ("hidden",)):
        models = Models(needs=needs)
        value = models.run().sum()
        once = torch.autograd.grad(value, models.leaves, retain_graph=True)
        twice = torch.autograd.grad(value, models.leaves, create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
        with pytest.raises(RuntimeError, match="no second derivative"):
            twice[0].sum().backward()


def test_the_teacher_gets_no_gradient() -> None:
    models = Models()
    models.teacher_hidden.requires_grad_()
    models.teacher_weight.requires_grad_()
    models.run().sum().backward()
    assert models.teacher_hidden.grad is None and models.teacher_weight.grad is None
    with torch.no_grad():
        assert not models.run().requires_grad


def test_signature() -> None:
    names = list(inspect.signature(linear_divergence).parameters)
    assert names[:5] == [
        "student_hidden",
        "student_weight",
        "teacher_hidden",
        "teacher_weight",
        "mask",
    ]
    assert {"divergence", "beta", "temperature", "student_bias", "teacher_bias"} <= set(names)


BAD = {
    "divergence": ({"divergence": "kl"}, ValueError, "divergence must be one of"),
    "near divergence": ({"divergence": "forward-kl"}, ValueError, "did you mean 'forward_kl'"),
    "beta": ({"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
    "beta type": ({"beta": "1"}, TypeError, "beta must be a number"),
    "mask dtype": ({"mask": torch.ones(N)}, TypeError, "mask must be a bool tensor"),
    "mask shape": (
        {"mask": torch.ones(2, dtype=torch.bool)},
        ValueError,
        "mask must have the shape",
    ),
    "teacher rows": (
        {"teacher_hidden": torch.randn(N - 1, TEACHER)},
        ValueError,
        "teacher_hidden must hold the tokens of student_hidden",
    ),
    "teacher width": (
        {"teacher_hidden": torch.randn(N, 3)},
        ValueError,
        "teacher_hidden must end in the weight's hidden size",
    ),
    "student bias": ({"student_bias": torch.randn(3)}, ValueError, "student_bias must have shape"),
    "cuda": (
        {"options": ScoringOptions(backend="cuda")},
        ValueError,
        "backend='cuda' is not available",
    ),
    "direct": (
        {"options": ScoringOptions(schedule="direct")},
        ValueError,
        "schedule='direct' does not serve two heads, of which one is trained; use",
    ),
    "batches": (
        {"options": ScoringOptions(schedule="batches")},
        ValueError,
        "schedule='batches' does not serve two heads; use",
    ),
    "no vocabulary": (
        {"teacher_weight": torch.zeros(0, TEACHER)},
        ValueError,
        r"teacher_weight must have rows and columns, got shape \(0, 9\)",
    ),
    "options": ({"options": "torch"}, TypeError, "options must be a fastpref.ScoringOptions"),
    "no tensor": ({"teacher_weight": None}, TypeError, "teacher_weight must be a torch.Tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, error, message = BAD[name]
    models = Models(dtype=torch.float32, bias=False)
    arguments = {
        "student_hidden": models.hidden,
        "student_weight": models.weight,
        "teacher_hidden": models.teacher_hidden,
        "teacher_weight": models.teacher_weight,
        "mask": models.mask,
    }
    with pytest.raises(error, match=message):
        linear_divergence(**(arguments | changes))
