# SPDX-License-Identifier: Apache-2.0
"""Preference losses of diffusion and flow models as their papers and codes write them, in float64
and sample by sample: errors first, then their differences. Differentiable."""

import math

import torch
from torch import Tensor

PICKSCORE = 0.11543526500463486, 0.28201571106910706


def error(pred: Tensor, target: Tensor, mask: Tensor | None = None, mean: bool = True) -> Tensor:
    """||pred - target||^2 of one sample, over what is left in."""
    square = (pred.double() - target.double()) ** 2
    square = square.flatten() if mask is None else square[mask.expand(square.shape) != 0]
    return square.mean() if mean else square.sum()


def errors(pred: Tensor, target: Tensor, mask: Tensor | None = None, mean: bool = True) -> Tensor:
    masks = [None] * len(pred) if mask is None else list(mask.expand(pred.shape))
    rows = zip(pred, target, masks, strict=True)
    return torch.stack([error(*row, mean=mean) for row in rows])


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(1 / (1 + torch.exp(-x)))


def diffusion_dpo(
    model: Tensor,
    ref: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor,
    half: float = 0.5,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(P,): -log sigmoid(-beta/2 ((m_w - m_l) - (r_w - r_l))), of weighted means."""
    m, r = errors(model, target, mask), errors(ref, target, mask)
    if weight is not None:
        m, r = weight.double() * m, weight.double() * r
    m_w, m_l = m.chunk(2)
    r_w, r_l = r.chunk(2)
    return -log_sigmoid(-half * beta * ((m_w - m_l) - (r_w - r_l)))


def smpo(
    model: Tensor,
    ref: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
) -> Tensor:
    """Of PickScores, as probabilities of two exponentials."""
    low, high = PICKSCORE
    of_chosen, of_rejected = (
        torch.exp((one.double() - low) / (high - low)) for one in (chosen_scores, rejected_scores)
    )
    prob = of_chosen / (of_chosen + of_rejected)
    return diffusion_dpo(model, ref, target, beta=beta * (2 * prob - 1) * 10)


def diffusion_kto(
    model: Tensor, ref: Tensor, target: Tensor, *, beta: float | Tensor, labels: Tensor
) -> Tensor:
    g = -(errors(model, target) - errors(ref, target))
    kl = max(0.0, float(g.detach().mean()))
    sign = 2 * labels.double() - 1
    return 1 - 1 / (1 + torch.exp(-sign * beta * (g - kl)))


def rank_dpo(
    model: Tensor, ref: Tensor, target: Tensor, *, beta: float | Tensor, scores: Tensor
) -> Tensor:
    """(G,), by a loop over the pairs of a list."""
    s = errors(model, target, mean=False) - errors(ref, target, mean=False)
    s = s.view(scores.shape)
    betas = torch.as_tensor(beta, dtype=torch.float64).expand(len(scores))
    losses = []
    for group, phi, own in zip(s, scores.double(), betas, strict=True):
        order = sorted(range(len(phi)), key=lambda k: -float(phi[k]))  # ties in input order
        tau = [1 + order.index(k) for k in range(len(phi))]
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(phi)):
            for j in range(len(phi)):
                if phi[i] > phi[j]:
                    gain = abs(2 ** float(phi[i]) - 2 ** float(phi[j]))
                    discount = abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
                    total = total - gain * discount * log_sigmoid(-own * (group[i] - group[j]))
        losses.append(total)
    return torch.stack(losses)


def ddo_edm(
    denoised: Tensor,
    ref: Tensor,
    data: Tensor,
    *,
    beta: float | Tensor,
    alpha: float | Tensor,
    labels: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    s = sigma.double()
    w = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    log_p = -w * errors(denoised, data, mean=False)
    log_ref = -w * errors(ref, data, mean=False)
    z = log_p - log_ref
    return torch.where(
        labels.bool(), -log_sigmoid(beta * z), -alpha * torch.log(1 - torch.sigmoid(beta * z))
    )


def d3po(
    mean: Tensor,
    ref_mean: Tensor,
    sample: Tensor,
    *,
    std: float | Tensor,
    beta: float | Tensor = 0.1,
    clip: float | Tensor = 0.1,
) -> Tensor:
    """Of densities with their constants, exponentials and logarithms."""
    each = torch.as_tensor(std, dtype=torch.float64).expand(len(mean))
    ratios = []
    for m, r, y, s in zip(mean, ref_mean, sample, each, strict=True):
        new, old = (
            (
                -((y.double() - one.double()) ** 2) / (2 * s**2)
                - torch.log(s)
                - math.log(math.sqrt(2 * math.pi))
            ).mean()
            for one in (m, r)
        )
        ratios.append(torch.exp(new - old))
    ratio = torch.stack(ratios)
    bound = torch.as_tensor(clip, dtype=torch.float64).expand(len(mean) // 2).repeat(2)
    clipped = torch.minimum(torch.maximum(ratio, 1 - bound), 1 + bound)
    chosen, rejected = torch.log(clipped).chunk(2)
    return -log_sigmoid(beta * (chosen - rejected))


def mapo(
    model: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor = 0.1,
    snr: float | Tensor = 0.5,
    temperature: float | Tensor = 1000.0,
) -> Tensor:
    chosen, rejected = errors(model, target).chunk(2)

    def f(x: Tensor) -> Tensor:
        return x / (torch.exp(x) - 1)

    margin = temperature * (f(snr * chosen) - f(snr * rejected))
    return chosen - beta * torch.nn.functional.logsigmoid(margin)


def dspo(model: Tensor, ref: Tensor, target: Tensor, *, beta: float | Tensor = 0.001) -> Tensor:
    """The square is formed."""
    pairs = len(model) // 2
    p, r, t = (one.double()[:pairs] for one in (model, ref, target))
    m, q = errors(model, target), errors(ref, target)
    inside = -0.5 * beta * ((m[:pairs] - m[pairs:]) - (q[:pairs] - q[pairs:]))
    share = beta * (1 - torch.sigmoid(inside))
    share = share.view(-1, *[1] * (p.dim() - 1))
    return ((p - t) - share * (p - r)).square().flatten(1).mean(1)


def diffusion_orpo(model: Tensor, target: Tensor, *, beta: float | Tensor = 0.1) -> Tensor:
    """Log odds of rejected minus chosen."""
    chosen, rejected = errors(model, target).chunk(2)
    return chosen - beta * log_sigmoid(rejected - chosen)


def negative_aware(
    model: Tensor, old: Tensor, target: Tensor, rewards: Tensor, *, beta: float | Tensor = 1.0
) -> Tensor:
    p, o = model.double(), old.double()
    beta = torch.as_tensor(beta, dtype=torch.float64).expand(len(p))
    beta = beta.view(-1, *[1] * (p.dim() - 1))
    r = rewards.double()
    towards = errors((1 - beta) * o + beta * p, target)
    away = errors((1 + beta) * o - beta * p, target)
    return r * towards + (1 - r) * away
