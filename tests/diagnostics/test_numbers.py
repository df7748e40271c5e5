# SPDX-License-Identifier: Apache-2.0
"""Diagnostics of log-probabilities and hidden states against their definitions in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import ScoringOptions
from fastpref.diagnostics import (
    ches,
    did_entropy,
    displacement,
    layer_contraction,
    layer_transport,
    length_bias,
    log_margin_order,
)
from tests.diagnostics.plain import spearman


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_did_entropy_is_the_sum_over_samples() -> None:
    policy, ref = -20 + 3 * draw(4, 7), -22 + 3 * draw(4, 7, seed=1)
    found = did_entropy(policy.float(), ref.float())
    for at in range(4):
        s, r = policy.float()[at].double().tolist(), ref.float()[at].double().tolist()
        weights = [math.exp(-one) for one in r]
        z = sum(weights) / 7
        shares = [one / sum(weights) for one in weights]
        # q = e^x / Z; its entropy is the mean of -log q under q.
        entropy = -sum(w * ((a - b) - math.log(z)) for w, a, b in zip(shares, s, r, strict=True))
        assert found.entropy[at].item() == pytest.approx(entropy, rel=1e-12)
        samples = 1 / sum(one**2 for one in shares)
        assert found.effective_samples[at].item() == pytest.approx(samples, rel=1e-12)


def test_did_entropy_comes_near_the_exact_one() -> None:
    """Of twelve responses whose probabilities are known; the estimate is of many samples."""
    policy, ref = draw(12).log_softmax(0), (0.5 * draw(12, seed=1)).log_softmax(0)
    q = (policy - ref).softmax(0)
    exact = -(q * q.log()).sum()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(policy.exp(), 40_000, replacement=True, generator=generator)
    found = did_entropy(policy[drawn][None], ref[drawn][None])
    assert found.entropy.item() == pytest.approx(exact.item(), abs=0.03)
    assert found.effective_samples.item() > 10_000


def test_did_entropy_of_long_responses_stays_finite() -> None:
    found = did_entropy(-900 + 40 * draw(2, 32), -2000 + 40 * draw(2, 32, seed=1))
    assert found.entropy.isfinite().all()
    assert (found.effective_samples >= 1 - 1e-9).all()
    assert (found.effective_samples < 2).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_ches_is_the_papers_sum(normalize: bool, dtype: torch.dtype) -> None:
    chosen, rejected = draw(5, 9, 6).to(dtype), draw(5, 12, 6, seed=1).to(dtype)
    masks = [torch.rand(5, one.shape[1]) < 0.6 for one in (chosen, rejected)]
    masks[0][2] = False
    masks[1][:, -1] = False
    exact = chosen.double().clone(), rejected.double().clone()
    chosen[~masks[0]], rejected[~masks[1]] = torch.nan, torch.inf
    found = ches(chosen, rejected, *masks, normalize=normalize)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    for at in range(5):
        sums, counts = [], []
        for states, mask in zip(exact, masks, strict=True):
            total = [0.0] * 6
            for t in range(states.shape[1]):
                if mask[at, t]:
                    total = [a + b for a, b in zip(total, states[at, t].tolist(), strict=True)]
            sums.append(total)
            counts.append(max(1, int(mask[at].sum())) if normalize else 1)
        inner = sum(a * b for a, b in zip(*sums, strict=True)) / (counts[0] * counts[1])
        own = sum(a * a for a in sums[0]) / counts[0] ** 2
        assert found[at].item() == pytest.approx(inner - own, rel=1e-5, abs=1e-5)


def test_displacement() -> None:
    before = torch.tensor([-10.0, -20, -30]), torch.tensor([-11.0, -19, -33]), torch.tensor([-50.0])
    after = torch.tensor([-12.0, -19, -35]), torch.tensor([-15.0, -18, -32]), torch.tensor([-44.0])
    found = displacement(before, after)
    assert found.chosen_drop == pytest.approx((2 - 1 + 5) / 3)
    assert found.rejected_drop == pytest.approx((4 - 1 - 1) / 3)
    assert found.dispersion == pytest.approx(6)
    assert found.chosen_fell == pytest.approx(2 / 3)
    assert found.both_fell == pytest.approx(1 / 3)
    assert displacement(before[:2], after[:2]).dispersion is None


def test_log_margin_order() -> None:
    a, b = draw(40), 0.5 * draw(40) + draw(40, seed=1)
    b[:10] = b[0]  # ties
    wanted = spearman(a.tolist(), b.tolist())
    assert log_margin_order(a, b).item() == pytest.approx(wanted, rel=1e-12)
    assert log_margin_order(a, a.exp()).item() == pytest.approx(1)
    assert log_margin_order(a, -a).item() == pytest.approx(-1)
    assert log_margin_order(a, torch.zeros_like(a)).isnan()


def test_length_bias() -> None:
    chosen = torch.randint(5, 50, (60,), generator=torch.Generator().manual_seed(0))
    rejected = torch.randint(5, 50, (60,), generator=torch.Generator().manual_seed(1))
    margins = 0.02 * (chosen - rejected) + 0.3 * draw(60)
    found = length_bias(margins, chosen, rejected)
    more = (chosen - rejected).numpy().astype(float)
    slope, _ = np.polyfit(more, margins.numpy(), 1)
    assert found.slope == pytest.approx(slope)
    assert found.correlation == pytest.approx(np.corrcoef(more, margins.numpy())[0, 1])
    assert found.chosen_longer == pytest.approx((more > 0).mean())
    right = margins.numpy() > 0
    assert found.accuracy_longer == pytest.approx(right[more > 0].mean())
    assert found.accuracy_shorter == pytest.approx(right[more < 0].mean())
    assert found.accuracy_longer > found.accuracy_shorter
    same = length_bias(margins, chosen, chosen)
    assert math.isnan(same.slope) and math.isnan(same.accuracy_longer)


@pytest.mark.parametrize("form", [{}, {"bias": True, "softcap": 3.0}])
def test_layer_transport_is_the_angle(form: dict[str, Any]) -> None:
    a, b, weight = draw(20, 8), draw(20, 8, seed=1), draw(53, 8, seed=2)
    bias = draw(53, seed=3) if form.get("bias") else None
    cap = form.get("softcap")
    mask = torch.arange(20) % 3 > 0
    found = layer_transport(a, b, weight, mask, bias=bias, softcap=cap)
    assert found.shape == (20,) and not found[~mask].any()
    for at in mask.nonzero()[:, 0].tolist():
        rows = []
        for hidden in (a, b):
            logits = (weight @ hidden[at] + (0 if bias is None else bias)).tolist()
            if cap is not None:
                logits = [cap * math.tanh(one / cap) for one in logits]
            top = max(logits)
            exps = [math.exp(one - top) for one in logits]
            rows.append([one / sum(exps) for one in exps])
        overlap = sum(math.sqrt(p * q) for p, q in zip(*rows, strict=True))
        assert found[at].item() == pytest.approx(2 * math.acos(min(1.0, overlap)), rel=1e-7)


class Largest(TorchDispatchMode):
    """Elements of the largest new tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in args if isinstance(one, Tensor)}
        if isinstance(found, Tensor) and found.untyped_storage()._cdata not in given:
            self.elements = max(self.elements, found.untyped_storage().nbytes() // 8)
        return found


def test_transport_keeps_no_logits() -> None:
    """The workspace is what is asked for, however large the vocabulary."""
    a, b, weight = draw(300, 4), draw(300, 4, seed=1), draw(9000, 4, seed=2)
    budget = 1 << 23
    with Largest() as made:
        found = layer_transport(a, b, weight, options=ScoringOptions(memory_budget=budget))
    assert 0 < made.elements * 8 <= budget < 300 * 9000 * 8 / 2
    torch.testing.assert_close(found, layer_transport(a, b, weight))


def test_small_and_largest_angles() -> None:
    """Near 0 the length is half the Fisher length of the step, where arccos would give 0; far
    apart it is pi."""
    hidden, weight = draw(30, 8), draw(53, 8, seed=2)
    step = 1e-7 * draw(30, 8, seed=4)
    found = layer_transport(hidden, hidden + step, weight)
    p = (hidden @ weight.t()).softmax(-1)
    z = step @ weight.t()
    variance = (p * z.square()).sum(-1) - (p * z).sum(-1).square()
    torch.testing.assert_close(found, variance.sqrt(), rtol=1e-2, atol=0)
    assert not layer_transport(hidden, hidden, weight).any()
    far = torch.tensor([[200.0]], dtype=torch.float64)
    ends = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert layer_transport(far, -far, ends).item() == pytest.approx(math.pi)


@pytest.mark.parametrize("tail", [0.25, 0.5, 1.0])
def test_contraction_is_the_slope_of_the_tail(tail: float) -> None:
    hidden = draw(40, 12) * torch.linspace(0.1, 2, 12, dtype=torch.float64)
    values = np.linalg.svd(hidden.numpy(), compute_uv=False)
    first = 12 - math.ceil(tail * 12)
    ranks = np.arange(1, 13)
    slope, _ = np.polyfit(np.log(ranks[first:]), np.log(values[first:]), 1)
    assert layer_contraction(hidden, tail=tail).item() == pytest.approx(-slope)
    assert layer_contraction(7 * hidden, tail=tail).item() == pytest.approx(-slope)


def test_contraction_of_a_known_power_and_without_rank() -> None:
    left, right = (torch.linalg.qr(draw(32, 32, seed=seed))[0] for seed in (0, 1))
    ranks = torch.arange(1, 33, dtype=torch.float64)
    assert layer_contraction(left @ torch.diag(ranks**-1.7) @ right).item() == pytest.approx(1.7)
    # Two directions alone: what rounding leaves of the others is not fitted.
    low = left[:, :2] @ torch.diag(torch.tensor([4.0, 1.0]).double()) @ right[:2]
    assert layer_contraction(low).item() == pytest.approx(2)
    assert layer_contraction(left[:, :1] @ right[:1]).isnan()


def test_bad_use() -> None:
    pair = draw(4), draw(4)
    for call, error, match in (
        (lambda: did_entropy(draw(4), draw(4)), ValueError, r"policy_logps must be \(G, K\)"),
        (lambda: did_entropy(draw(4, 2), draw(4, 3)), ValueError, "ref_logps must have the shape"),
        (lambda: did_entropy([[1.0]], draw(1, 1)), TypeError, "policy_logps must be a"),
        (lambda: ches(draw(2, 3, 4), draw(2, 3, 4), draw(2, 3) > 0, draw(2, 3)), TypeError,
         "rejected_mask must be bool"),
        (lambda: ches(draw(2, 3, 4), draw(3, 3, 4), draw(2, 3) > 0, draw(3, 3) > 0), ValueError,
         "rejected_hidden must hold as many pairs"),
        (lambda: displacement(pair, (*pair, draw(2))), ValueError, "or neither; got them in after"),
        (lambda: displacement(pair, (draw(3), draw(4))), ValueError, "after.chosen must have the"),
        (lambda: displacement(draw(4), pair), TypeError, r"before must be \(chosen, rejected\)"),
        (lambda: log_margin_order(draw(4), draw(4).long()), TypeError, "use margins_b.float"),
        (lambda: length_bias(draw(4), draw(4), draw(5)), ValueError, "rejected_lengths must have"),
        (lambda: layer_contraction(draw(4, 3), tail=0.0), ValueError, r"tail must .* in \(0, 1\]"),
        (lambda: layer_contraction(draw(4)), ValueError, r"hidden must be \(N, H\)"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
