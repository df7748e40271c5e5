# SPDX-License-Identifier: Apache-2.0
"""Losses between two models on ``fastpref.linear_divergence``, each in a few lines of your own:

    python examples/two_models.py

GKD: Agarwal et al. 2023, arXiv:2306.13649. LLaVA-MoD: Shu et al. 2024, arXiv:2408.15881. DHO: Kang
et al. 2025, arXiv:2505.07675. Anchored SFT: the likelihood weighted by itself (DFT,
arXiv:2508.05629), held near the base model.
"""

import torch
from torch import Tensor

from fastpref import linear_divergence, linear_logprob

IGNORE = -100


def gkd(hidden: Tensor, weight: Tensor, teacher: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Generalized knowledge distillation: the generalized Jensen-Shannon divergence, mean over the
    response's tokens."""
    scored = target != IGNORE
    divergence = linear_divergence(hidden, weight, *teacher, scored, divergence="jsd", beta=0.5)
    return divergence.sum() / scored.sum()


def mimic(hidden: Tensor, weight: Tensor, teacher: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """LLaVA-MoD's first stage: KL(teacher, student) over the response's tokens, and their
    likelihood. Vocabularies that are padded differently are compared where both have tokens."""
    scored = target != IGNORE
    divergence = linear_divergence(hidden, weight, *teacher, scored)
    nll = -linear_logprob(hidden, weight, target).logp
    return (divergence + nll).sum() / scored.sum()


def dual_head(
    hidden: Tensor,
    label_head: Tensor,
    teacher_head: Tensor,
    teacher: tuple[Tensor, Tensor],
    target: Tensor,
    temperature: float = 2.0,
) -> Tensor:
    """DHO: one trunk, a head for the labels where there are any, and one that follows the teacher
    everywhere."""
    labelled = target != IGNORE
    nll = -linear_logprob(hidden, label_head, target).logp.sum() / labelled.sum().clamp(min=1)
    divergence = linear_divergence(hidden, teacher_head, *teacher, temperature=temperature)
    return nll + temperature**2 * divergence.mean()


def anchored_sft(
    hidden: Tensor, weight: Tensor, base: tuple[Tensor, Tensor], target: Tensor, alpha: float = 0.1
) -> Tensor:
    """The likelihood of each token weighted by the token's own probability, and KL(policy, base) of
    its distribution."""
    scored = target != IGNORE
    logp = linear_logprob(hidden, weight, target).logp
    drift = linear_divergence(hidden, weight, *base, scored, divergence="reverse_kl")
    return (alpha * drift - logp.detach().exp() * logp).sum() / scored.sum()


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 64, 128, requires_grad=True)
    weight = torch.randn(8000, 128, requires_grad=True)
    teacher = torch.randn(4, 64, 192), torch.randn(8064, 192)  # wider, its vocabulary padded
    base = torch.randn(4, 64, 128), weight.detach()
    target = torch.randint(8000, (4, 64))
    target[:, :32] = IGNORE
    losses = {
        "gkd": gkd(hidden, weight, teacher, target),
        "mimic": mimic(hidden, weight, teacher, target),
        "dual head": dual_head(hidden, weight, 0.5 * weight, teacher, target),
        "anchored sft": anchored_sft(hidden, weight, base, target),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        print(f"{name:14}{loss.item():8.3f}   |gradient| {gradient.norm().item():.4f}")


if __name__ == "__main__":
    main()
