# SPDX-License-Identifier: Apache-2.0
"""Pairs to losses and metrics: the objective itself, and the pair head, that of the CPU and that of
CUDA on the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import _extension, objectives
from fastpref.objectives import Objective
from fastpref.units import pair_head
from tests.cuda_on_host.kernels import unavailable_reason
from tests.cuda_on_host.pair_head import PairHeadKernel, compile_pair_head

FAMILY = [
    objectives.get("dpo"),
    objectives.get("dpo", beta=0.5, label_smoothing=0.2),
    objectives.get("ipo"),
    objectives.get("ipo", beta=0.3, normalize="sum"),
    objectives.get("hinge", beta=0.05),
    objectives.get("simpo", beta=2.0, gamma=0.7, label_smoothing=0.1),
]
IDS = [f"{one.name}{dict(one.settings) or ''}" for one in FAMILY]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> PairHeadKernel:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return compile_pair_head(tmp_path_factory.mktemp("host"))


Kernel = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
WHY_NO_OPERATOR = _extension.ops_unavailable_reason()
with_operator = pytest.mark.skipif(WHY_NO_OPERATOR is not None, reason=str(WHY_NO_OPERATOR))
OPERATOR = pytest.param("operator", marks=with_operator)
ON_THE_HOST = pytest.param("cuda", marks=pytest.mark.heavy)


@pytest.fixture(params=[OPERATOR, ON_THE_HOST])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The operator, or the CUDA kernel in its place."""
    if request.param == "cuda":
        compiled = request.getfixturevalue("compiled")
        monkeypatch.setattr(torch.ops.fastpref, "pair_head", compiled, raising=False)
        monkeypatch.setattr(pair_head, "operators_serve", lambda *tensors: True)
    found: Kernel = torch.ops.fastpref.pair_head
    return found


@pytest.fixture(params=["objective", OPERATOR])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "objective":
        monkeypatch.setattr(pair_head, "operators_serve", lambda *tensors: False)


def make_pairs(
    objective: Objective, pairs: int, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Log-probs that are strided views, and lengths with empty responses among them."""
    generator = torch.Generator().manual_seed(pairs)
    rows = -60 * torch.rand(4, 2 * pairs, generator=generator, dtype=torch.float64).to(dtype)
    logps: list[Tensor | None] = [row[::2].requires_grad_() for row in rows]
    if not objective.needs_reference:
        logps[2:] = [None, None]
    lengths = torch.randint(0, 9, (2, pairs), generator=generator)
    given = dict(zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True))
    return logps, {name: given[name] for name in objective.extras}


def differentiable(logps: list[Tensor | None]) -> list[Tensor]:
    return [one for one in logps if one is not None]


@pytest.mark.parametrize("pairs", [1, 5, 700])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("objective", FAMILY, ids=IDS)
def test_the_kernel_is_the_objective_in_one_launch(
    kernel: Kernel, objective: Objective, dtype: torch.dtype, pairs: int
) -> None:
    logps, extras = make_pairs(objective, pairs, dtype)
    inputs = differentiable(logps)
    fused = pair_head.pair_head(objective, *logps, **extras)
    wide = [None if one is None else one.detach().double().requires_grad_() for one in logps]
    expected = objective(*wide, **extras)
    close = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    )
    upstream = torch.randn(pairs, dtype=torch.float64)
    gradients = torch.autograd.grad(fused.losses, inputs, upstream.to(dtype))
    wanted = torch.autograd.grad(expected.losses, differentiable(wide), upstream)
    for got, want in zip((*fused[:3], *gradients), (*expected, *wanted), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **close)
    assert not fused.chosen_rewards.requires_grad and not fused.rejected_rewards.requires_grad
    means = pair_head._measured(expected[1], expected[2], *wide[:2])
    for got, one in zip(fused.metrics.values(), means, strict=True):
        torch.testing.assert_close(got.double(), one.mean(), **close)


@pytest.mark.parametrize("objective", FAMILY, ids=IDS)
@pytest.mark.heavy
def test_no_barrier_is_missing(compiled: PairHeadKernel, objective: Objective) -> None:
    """The order in which warps run between barriers changes no bit."""
    logps, _ = make_pairs(objective, 700)
    link = pair_head.link_of(objective)
    assert link is not None
    arguments = (*logps, None, None, link.kind, link.scale, link.shift, link.flipped)
    results = [
        compiled(*arguments, link.reward_scale, link.rewards_per_token, backwards)
        for backwards in (False, True)
    ]
    assert all(torch.equal(*one) for one in zip(*results, strict=True))


@pytest.mark.parametrize("margin", [-1e4, -800.0, -30.0, -1e-9, 0.0, 1e-9, 1.0, 30.0, 800.0, 1e4])
def test_far_margins_stay_finite_and_exact(kernel: Kernel, margin: float) -> None:
    for objective in (
        objectives.get("dpo", beta=1.0, label_smoothing=0.1),
        objectives.get("hinge", beta=1.0),
    ):
        chosen = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        fused = pair_head.pair_head(objective, chosen, zero, zero, zero).losses
        (gradient,) = torch.autograd.grad(fused.sum(), chosen)
        losses = objective(chosen, zero, zero, zero).losses
        torch.testing.assert_close(fused, losses, rtol=1e-14, atol=1e-300)
        (expected,) = torch.autograd.grad(losses.sum(), chosen)
        torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-300)


def test_no_number_stays_none(either: None) -> None:
    nan = torch.tensor([torch.nan, -1.0])
    for objective in FAMILY:
        zero = torch.zeros(2)
        reference = (zero, zero) if objective.needs_reference else ()
        extras = dict.fromkeys(objective.extras, torch.ones(2, dtype=torch.int64))
        result = pair_head.pair_head(objective, nan, zero, *reference, **extras)
        assert result.losses.isnan().tolist() == [True, False]
        assert result.metrics["rewards/chosen"].isnan()


def test_metrics_have_the_names_of_trl(either: None) -> None:
    chosen, rejected = torch.tensor([-1.0, -5.0, -2.0]), torch.tensor([-3.0, -4.0, -2.0])
    zero = torch.zeros(3)
    dpo = objectives.get("dpo", beta=0.5)
    metrics = pair_head.pair_head(dpo, chosen, rejected, zero, zero).metrics
    expected = {
        "rewards/chosen": -4 / 3,
        "rewards/rejected": -1.5,
        "rewards/margins": 1 / 6,
        "rewards/accuracies": 1 / 3,  # a tie is no success
        "logps/chosen": -8 / 3,
        "logps/rejected": -3.0,
    }
    assert list(metrics) == list(expected)
    for name, value in expected.items():
        assert metrics[name].dim() == 0 and not metrics[name].requires_grad
        assert metrics[name].item() == pytest.approx(value, rel=1e-6), name


def test_means_of_no_pairs_are_0(either: None) -> None:
    empty = torch.zeros(0, requires_grad=True)
    result = pair_head.pair_head(objectives.get("dpo"), empty, empty, empty, empty)
    assert result.losses.shape == (0,)
    assert not any(result.metrics.values())
    assert torch.autograd.grad(result.losses.sum(), empty)[0].shape == (0,)


def test_halves_are_summed_up_in_float32(either: None) -> None:
    rows = [torch.tensor([-3.0, -7.0], dtype=torch.bfloat16) for _ in range(4)]
    result = pair_head.pair_head(objectives.get("dpo"), *rows)
    assert result.losses.dtype == torch.float32
    assert all(one.dtype == torch.float32 for one in result.metrics.values())


def test_only_the_gradients_asked_for(kernel: Kernel) -> None:
    logps, extras = make_pairs(FAMILY[0], 5)
    frozen = [logps[0], *(one.detach() for one in differentiable(logps[1:]))]
    losses = pair_head.pair_head(FAMILY[0], *frozen, **extras).losses
    (gradient,) = torch.autograd.grad(losses.sum(), differentiable(logps)[:1])
    assert gradient.shape == (5,)


@pytest.mark.parametrize("objective", FAMILY, ids=IDS)
def test_a_second_derivative_is_that_of_the_objective(kernel: Kernel, objective: Objective) -> None:
    logps, extras = make_pairs(objective, 5)
    seconds = []
    for losses in (
        pair_head.pair_head(objective, *logps, **extras).losses,
        objective(*logps, **extras).losses,
    ):
        first = torch.autograd.grad(losses.sum(), differentiable(logps), create_graph=True)
        total = sum((one * (i + 1)).sum() for i, one in enumerate(first))
        if total.requires_grad:
            seconds.append(torch.autograd.grad(total, differentiable(logps), allow_unused=True))
    if seconds:
        torch.testing.assert_close(*seconds)


def test_log_probs_that_depend_on_each_other(kernel: Kernel) -> None:
    """A gradient with a graph is partial, as one without is."""
    objective, zero = objectives.get("dpo", beta=0.5), torch.zeros(4, dtype=torch.float64)
    gradients = []
    for create_graph in (False, True):
        chosen = -torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        chosen.requires_grad_()
        losses = pair_head.pair_head(objective, chosen, chosen.flip(0), zero, zero).losses
        weights = torch.arange(4.0)
        gradients.append(
            torch.autograd.grad((weights * losses).sum(), chosen, create_graph=create_graph)[0]
        )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("objective", FAMILY, ids=IDS)
def test_first_and_second_derivatives_of_the_operator(kernel: Kernel, objective: Objective) -> None:
    logps, extras = make_pairs(objective, 5)
    inputs = differentiable(logps)
    # A margin of the hinge apart from its kink.
    close = [(one.detach() / 60).requires_grad_() for one in inputs]

    def losses(*given: Tensor) -> Tensor:
        return pair_head.pair_head(objective, *given, **extras).losses

    assert torch.autograd.gradcheck(losses, close)
    assert torch.autograd.gradgradcheck(losses, close)


@with_operator
@pytest.mark.parametrize("pairs", [1, 5])
@pytest.mark.parametrize("objective", FAMILY[:4:2], ids=IDS[:4:2])
def test_tracing_knows_the_shapes(objective: Objective, pairs: int) -> None:
    torch.library.opcheck(torch.ops.fastpref.pair_head.default, arguments_of(objective, pairs))


def arguments_of(objective: Objective, pairs: int, **changes: Any) -> list[Any]:
    """Of the operator, in their order."""
    logps, extras = make_pairs(objective, pairs)
    lengths = [extras.get(name) for name in ("chosen_lengths", "rejected_lengths")]
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "chosen", "rejected")
    given = dict(zip(names, (*logps, *lengths), strict=True))
    link = pair_head.link_of(objective)
    assert link is not None
    given |= {"link": link.kind, "scale": link.scale, "shift": link.shift, "flipped": link.flipped}
    given |= {"reward_scale": link.reward_scale, "per_token": link.rewards_per_token}
    return [None if one is None else detached(one) for one in (given | changes).values()]


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@with_operator
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_chosen": torch.zeros(5).half()}, "policy_chosen_logps must be float64 or float"),
        ({"policy_rejected": torch.zeros(4).double()}, r"policy_rejected_logps .* shape \(5,\)"),
        ({"ref_chosen": torch.zeros(5)}, "ref_chosen_logps must have the dtype"),
        ({"ref_rejected": torch.zeros(5, device="meta").double()}, "must be on the device"),
        ({"chosen": torch.zeros(5).int()}, "chosen_lengths must have .* lengths int64"),
        ({"rejected": torch.zeros(10).long()[::2]}, "rejected_lengths must be contiguous"),
        ({"link": 3}, r"link must be 0 \(logistic\), 1 \(square\) or 2 \(hinge\), got 3"),
    ],
)
def test_the_operator_refuses(change: dict[str, Any], message: str) -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpref.pair_head.default.redispatch(keys, *arguments_of(FAMILY[2], 5, **change))


def test_unknown_extras_are_refused_on_any_device(either: None) -> None:
    rows = [torch.zeros(3)] * 4
    with pytest.raises(TypeError, match="dpo has no extra reward_margin"):
        pair_head.pair_head(objectives.get("dpo"), *rows, reward_margin=torch.ones(3))


def goes_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], kernel: Kernel
) -> bool:
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(torch.ops.fastpref, "pair_head", counted, raising=False)
    call()
    return bool(calls)


def test_what_the_kernel_cannot_do_the_objective_does(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
        return beta * (rejected - chosen)

    rows = [torch.zeros(3) - i for i in range(4)]
    lengths = {"chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(3)}
    named_alike = Objective(dpo, unit="pair", scope="pair")
    simpo, ipo = objectives.get("simpo"), objectives.get("ipo")
    integers = {name: one.int() for name, one in lengths.items()}
    for call, served in (
        (lambda: pair_head.pair_head(FAMILY[0], *rows), True),
        (lambda: pair_head.pair_head(simpo, *rows[:2], **integers), True),
        (lambda: pair_head.pair_head(named_alike, *rows[:2]), False),
        (lambda: pair_head.pair_head(simpo, *rows[:2], **lengths), False),
        (lambda: pair_head.pair_head(FAMILY[0], rows[0].double(), *rows[1:]), False),
        (lambda: pair_head.pair_head(objectives.get("sft"), *rows[:2], chosen_nll=rows[0]), False),
    ):
        assert goes_to_the_kernel(monkeypatch, call, kernel) == served
    with pytest.raises(ValueError, match="chosen_lengths"):
        pair_head.pair_head(ipo, *rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_chosen_logps": None}, "dpo needs a reference but ref_chosen_logps is None"),
        ({"policy_rejected_logps": torch.zeros(2)}, "the log-probs must all be"),
        ({"policy_chosen_logps": torch.zeros(3, dtype=torch.int64)}, "must be a floating tensor"),
    ],
)
def test_bad_input_is_named(either: None, change: dict[str, Tensor], message: str) -> None:
    names = (
        "policy_chosen_logps",
        "policy_rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
    )
    given = {name: torch.zeros(3) for name in names} | change
    with pytest.raises((TypeError, ValueError), match=message):
        pair_head.pair_head(objectives.get("dpo"), **given)


def test_a_value_for_each_pair_is_left_to_the_objective(kernel: Kernel) -> None:
    objective = objectives.get("dpo", beta=torch.tensor([0.1, 0.3, 0.2]))
    logps, _ = make_pairs(objective, 3)
    assert pair_head.link_of(objective) is None
    found = pair_head.pair_head(objective, *logps).losses
    torch.testing.assert_close(found, objective(*differentiable(logps)).losses)
