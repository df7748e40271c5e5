# SPDX-License-Identifier: Apache-2.0
"""The weight's gradient projected on a basis, against the dense gradient of plain torch in float64,
projected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import ScoringOptions, explain, linear_logprob, preference_loss
from fastpref.optim import WeightGradBasis
from fastpref.scoring import plan as schedule
from tests.ranks import Ranks
from tests.scoring import refusing
from tests.scoring.cases import BACKENDS
from tests.scoring.operations import Operations

N, H, V, RANK = 150, 12, 2051, 5
SCHEDULES: dict[str, dict[str, Any]] = {
    "keep": {},
    "keep in part": {"memory_budget": 110 * V * 8},
    "recompute": {"schedule": "recompute"},
    "least": {"memory_budget": 1},
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 4.0, "temperature": 1.3},
    "biased": {"bias": torch.linspace(-2, 2, V, dtype=torch.float64)},
}


class Head:
    """Rows, a head, a basis, and where what is projected on it goes."""

    def __init__(self, dtype: torch.dtype = torch.float64, rows: int = N) -> None:
        generator = torch.Generator().manual_seed(4)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = draw(rows, H).to(dtype).requires_grad_()
        self.weight = (0.8 * draw(V, H)).to(dtype)
        self.target = torch.randint(V, (rows,), generator=generator)
        self.target[::7] = -100
        self.upstream = draw(rows)
        self.upstream[3] = 0
        transform = torch.linalg.qr(draw(H, H))[0]
        self.out = torch.zeros(V, RANK, dtype=torch.float32)
        self.norms = torch.zeros(H, dtype=torch.float32)
        self.measured = WeightGradBasis(transform[:, 2 : 2 + RANK], self.out, transform, self.norms)
        self.basis = self.measured[:2]

    def logp(self, **arguments: Any) -> Tensor:
        logp = linear_logprob(self.hidden, self.weight, self.target, **arguments).logp
        assert logp is not None
        return logp

    def dense(self, **form: Any) -> tuple[Tensor, Tensor]:
        """The gradients at hidden and weight, of plain torch."""
        hidden, weight = (
            one.detach().double().requires_grad_() for one in (self.hidden, self.weight)
        )
        logits = hidden @ weight.t() + form.get("bias", 0)
        cap = form.get("softcap")
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        log_p = (logits / form.get("temperature", 1.0)).log_softmax(-1)
        picked = log_p.gather(-1, self.target.clamp(min=0)[:, None])[:, 0]
        scored = torch.where(self.target < 0, 0, picked)
        d_hidden, d_weight = torch.autograd.grad((scored * self.upstream).sum(), (hidden, weight))
        return d_hidden, d_weight

    def run(self, **arguments: Any) -> None:
        logp = self.logp(**arguments)
        (logp * self.upstream.to(logp.dtype)).sum().backward()


def close(got: Tensor, want: Tensor, rtol: float = 1e-6) -> None:
    """To rounding of float32, of the largest number."""
    error = float((got.double() - want).abs().max() / want.abs().max())
    assert error <= rtol, error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
def test_as_the_dense_gradient_projected(
    backend: str, name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "MEASURED_BYTES", 300 * (RANK + H) * 8)  # several slabs
    head, options = Head(), ScoringOptions(backend=backend, **SCHEDULES[name])  # type: ignore[arg-type]
    d_hidden, d_weight = head.dense(**FORMS[form])
    head.run(options=options, weight_grad_basis=head.measured, **FORMS[form])
    columns, _, transform, _ = head.measured
    assert transform is not None
    close(head.out, d_weight @ columns)
    close(head.norms, (d_weight @ transform).square().sum(0))
    assert head.hidden.grad is not None
    torch.testing.assert_close(head.hidden.grad, d_hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_error_is_that_of_the_dense_gradient(dtype: torch.dtype, name: str) -> None:
    head, options = Head(dtype), ScoringOptions(**SCHEDULES[name])
    _, d_weight = head.dense()
    head.run(options=options, weight_grad_basis=head.basis)
    want = d_weight @ head.measured.columns
    close(head.out, want, {torch.float32: 2e-6}.get(dtype, 2e-2))
    dense = Head(dtype)
    dense.weight.requires_grad_()
    dense.run(options=options)
    assert dense.weight.grad is not None and head.hidden.grad is not None
    assert torch.equal(dense.hidden.grad, head.hidden.grad)  # type: ignore[arg-type]
    error = (head.out.double() - want).norm()
    assert error <= 2 * (dense.weight.grad.double() @ head.measured.columns - want).norm()


def test_each_backward_adds() -> None:
    head = Head()
    _, d_weight = head.dense()
    loss = (head.logp(weight_grad_basis=head.basis) * head.upstream).sum()
    loss.backward(retain_graph=True)
    torch.autograd.grad(3 * loss, head.hidden)
    close(head.out, 4 * d_weight @ head.measured.columns)


def test_where_nothing_else_needs_a_gradient() -> None:
    head = Head()
    head.hidden.requires_grad_(False)
    head.run(weight_grad_basis=head.basis)
    close(head.out, head.dense()[1] @ head.measured.columns)
    assert head.hidden.grad is None
    plan = explain(head.hidden, head.weight, head.target, weight_grad_basis=head.basis)
    assert plan.units == pytest.approx(1 + RANK / H)


def test_without_recording_nothing_is_added() -> None:
    head = Head()
    with torch.no_grad():
        assert not head.logp(weight_grad_basis=head.basis).requires_grad
    assert not head.out.any()


def test_entropy_lse_and_mean_logits() -> None:
    head = Head()
    names = ("logp", "entropy", "lse", "mean_logits")
    hidden, weight = (one.detach().clone().requires_grad_() for one in (head.hidden, head.weight))
    logits = hidden @ weight.t()
    log_p, scored = logits.log_softmax(-1), head.target >= 0
    picked = log_p.gather(-1, head.target.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    values = picked + 2 * entropy - logits.logsumexp(-1) + 0.5 * logits.mean(-1)
    (values * head.upstream)[scored].sum().backward()
    found = linear_logprob(
        head.hidden, head.weight, head.target, outputs=names, weight_grad_basis=head.basis
    )
    total = found.logp + 2 * found.entropy - found.lse + 0.5 * found.mean_logits  # type: ignore[operator]
    (total * head.upstream).sum().backward()
    assert weight.grad is not None
    close(head.out, weight.grad @ head.measured.columns)


def test_vocab_range_and_context() -> None:
    head, opened = Head(), []
    head.target.clamp_(max=V - 60)

    class Context:
        def __enter__(self) -> None:
            opened.append(True)

        def __exit__(self, *error: object) -> None:
            pass

    arguments: dict[str, Any] = {"weight_context": lambda weight, bias: Context()}
    head.run(vocab_range=(0, V - 51), weight_grad_basis=head.basis, **arguments)
    head.weight = head.weight[: V - 51]
    close(head.out[: V - 51], head.dense()[1] @ head.measured.columns)
    assert not head.out[V - 51 :].any() and len(opened) == 2


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_products_are_counted(name: str, measured: bool) -> None:
    head = Head(torch.float32)
    head.target[:] = torch.arange(N)
    head.upstream[:] = 1
    arguments = {
        "options": ScoringOptions(**SCHEDULES[name]),
        "weight_grad_basis": head.measured if measured else head.basis,
    }
    plan = explain(head.hidden, head.weight, head.target, **arguments)
    with Operations() as operations:
        head.run(**arguments)
    columns = RANK + (H if measured else 0)
    projected = 2 * N * H * columns
    assert operations.flop == pytest.approx(plan.units * 2 * N * H * V + projected)
    again = 0 if name == "keep" else 1 - plan.kept_rows / N
    assert plan.units == pytest.approx(2 + again + columns / H)


class Made(TorchDispatchMode):
    """Elements of every new tensor whose columns are those of a gradient of the weight, and whose
    rows are ids."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in args if isinstance(one, Tensor)}
        if isinstance(found, Tensor) and found.untyped_storage()._cdata not in given:
            if found.dim() == 2 and found.shape[1] in (H, RANK, RANK + H) and found.shape[0] > N:
                self.elements.append(found.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["keep", "recompute"])
def test_nothing_of_the_weights_size_is_made(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "MEASURED_BYTES", 200 * (RANK + H) * 4)
    head, options = Head(dtype), ScoringOptions(**SCHEDULES[name])
    with Made() as made:
        head.run(options=options, weight_grad_basis=head.measured)
    assert made.elements and max(made.elements) <= V * RANK


@pytest.mark.parametrize("name", ["keep", "recompute"])
def test_memory_that_runs_out_adds_once(name: str) -> None:
    exact = Head(torch.float32)
    want = exact.dense()[1] @ exact.measured.columns
    found: list[Head] = []

    def make() -> refusing.Call:
        head = Head(torch.float32)
        found.append(head)
        options = ScoringOptions(memory_budget=2 * N * V * 4, **SCHEDULES[name])

        def backward(logp: Tensor) -> dict[str, Tensor]:
            (logp * head.upstream.to(logp.dtype)).sum().backward()
            return {"out": head.out}

        return refusing.Call(
            lambda: head.logp(options=options, weight_grad_basis=head.basis), backward
        )

    for _, results in refusing.each_refused(make, 4096, 6):
        close(results["out"], want, 3e-6)
    assert len(found) == 1 + 6


PAIRS = {"rows": 6, "length": 25}


def pairs(dtype: torch.dtype = torch.float64) -> tuple[Head, Tensor, Tensor]:
    head = Head(dtype, PAIRS["rows"] * PAIRS["length"])
    shape = PAIRS["rows"], PAIRS["length"]
    return head, head.hidden.detach().view(*shape, H).requires_grad_(), head.target.view(shape)


def plain_dpo(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().t()
    picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = torch.where(target < 0, 0, picked).sum(-1).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.mark.parametrize("wanted", ["keep", "recompute", "batches"])
def test_preference_loss(wanted: str) -> None:
    head, hidden, target = pairs()
    dense = head.weight.clone().requires_grad_()
    plain_dpo(hidden, dense, target).backward()
    d_hidden, hidden.grad = hidden.grad, None
    options = ScoringOptions(schedule=wanted, memory_budget=2 * 25 * V * 8)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {
        "ref_logps": torch.zeros(PAIRS["rows"], dtype=torch.float64),
        "options": options,
        "weight_grad_basis": head.basis,
    }
    plan = explain(hidden, head.weight, target, "dpo", **arguments)
    assert plan.schedule == ("batches" if wanted == "batches" else plan.schedule)
    found = preference_loss(hidden, head.weight, target, "dpo", **arguments)
    (2 * found.loss).backward(retain_graph=True)
    assert dense.grad is not None
    close(head.out, 2 * dense.grad @ head.measured.columns)
    torch.testing.assert_close(hidden.grad, 2 * d_hidden)
    # A term of one's own on the scores that came with the loss.
    (found.loss + found.logps.sum()).backward()
    logits = hidden.detach() @ dense.t()
    picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    (sums,) = torch.autograd.grad(torch.where(target < 0, 0, picked).sum(), dense)
    close(head.out, (3 * dense.grad + sums) @ head.measured.columns)


def test_norms_are_of_the_whole_gradient() -> None:
    head, hidden, target = pairs()
    dense = head.weight.clone().requires_grad_()
    plain_dpo(hidden, dense, target).backward()
    options = ScoringOptions(memory_budget=2 * 25 * V * 8)
    ref = torch.zeros(PAIRS["rows"], dtype=torch.float64)
    arguments: dict[str, Any] = {"ref_logps": ref, "options": options}
    for basis, name in ((head.basis, "batches"), (head.measured, "recompute")):
        arguments["weight_grad_basis"] = basis
        plan = explain(hidden, head.weight, target, "dpo", **arguments)
        assert plan.schedule == name or basis is head.basis
    preference_loss(hidden, head.weight, target, "dpo", **arguments).loss.backward()
    assert dense.grad is not None and head.measured.transform is not None
    close(head.norms, (dense.grad @ head.measured.transform).square().sum(0))


def test_with_a_reference_beside_the_policy() -> None:
    """``tdpo``: scores and divergence of the same tiles."""
    head, hidden, target = pairs()
    ref_hidden = torch.randn(hidden.shape, dtype=torch.float64)
    ref_weight = torch.randn(V, H, dtype=torch.float64)
    given: dict[str, Any] = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    dense = head.weight.clone().requires_grad_()
    preference_loss(hidden, dense, target, "tdpo", **given).loss.backward()
    given["weight_grad_basis"] = head.basis
    preference_loss(hidden, head.weight, target, "tdpo", **given).loss.backward()
    assert dense.grad is not None
    close(head.out, dense.grad @ head.measured.columns)


def sharded(rank: int, weight: Tensor, out: Tensor, name: str) -> tuple[Tensor, Tensor]:
    head = Head()
    own = slice(0, 1000) if rank == 0 else slice(1000, V)
    head.weight, mine = weight[own].contiguous(), out[own].contiguous()
    options = ScoringOptions(**SCHEDULES[name])
    head.run(
        tp_group=dist.group.WORLD, options=options, weight_grad_basis=(head.measured.columns, mine)
    )
    assert head.hidden.grad is not None
    return mine, head.hidden.grad


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["keep", "recompute"])
def test_each_rank_has_its_own_rows(two_ranks: Ranks, name: str) -> None:
    head = Head()
    d_hidden, d_weight = head.dense()
    first, second = two_ranks(sharded, head.weight, head.out, name)
    close(torch.cat([first[0], second[0]]), d_weight @ head.measured.columns)
    for _, found in (first, second):
        torch.testing.assert_close(found, d_hidden)


def refused(error: type[Exception], match: str, **changes: Any) -> None:
    head = Head()
    for name in ("weight",):
        if name in changes:
            setattr(head, name, changes.pop(name))
    with pytest.raises(error, match=match):
        head.logp(**{"weight_grad_basis": head.basis} | changes)


def test_what_does_not_go_with_it() -> None:
    head = Head()
    columns, out = head.basis
    lora = torch.zeros(2, H), torch.zeros(V, 2), 1.0
    refused(ValueError, "does not go with lora", lora=lora)
    refused(ValueError, r"weight must not need a gradient.*requires_grad_\(False\)",
            weight=head.weight.clone().requires_grad_())  # fmt: skip
    refused(ValueError, "does not go with restrict_to", restrict_to=head.target[:, None])
    refused(ValueError, "schedule='direct'", options=ScoringOptions(schedule="direct"))
    refused(ValueError, "does not measure the gradient of mean_logits",
            weight_grad_basis=head.measured, outputs=("logp", "mean_logits"))  # fmt: skip
    for basis, error, match in (
        (columns, TypeError, r"must be \(Q, out\).*got Tensor"),
        ((columns,), TypeError, "got 1 values"),
        ((columns, None), TypeError, "weight_grad_basis's out"),
        ((columns.t(), out), ValueError, r"Q must be \(12, r\).*got \(5, 12\)"),
        ((columns.long(), out), TypeError, "Q must be floating point"),
        ((columns.clone().requires_grad_(), out), ValueError, r"Q gets no gradient.*detach"),
        ((columns, out.double()), TypeError, r"out must be float32.*torch.zeros\(2051, 5"),
        ((columns, out[:-1]), ValueError, r"out must be \(2051, 5\), got \(2050, 5\)"),
        ((columns, out.clone().requires_grad_()), ValueError, "out is added to in backward"),
        ((columns, out[:, :1].expand(V, RANK)), ValueError, "out must have memory.*clone"),
        ((columns, out, head.measured.transform, None), ValueError, "both transform and norms"),
    ):
        refused(error, match, weight_grad_basis=basis)


def test_where_a_call_is_traced_or_transformed() -> None:
    head = Head()

    def loss(hidden: Tensor) -> Tensor:
        found = linear_logprob(hidden, head.weight, head.target, weight_grad_basis=head.basis)
        assert found.logp is not None
        return found.logp.sum()

    with pytest.raises(ValueError, match=r"weight_grad_basis is known to neither torch\.compile"):
        torch.func.grad(loss)(head.hidden.detach())
