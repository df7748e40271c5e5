# SPDX-License-Identifier: Apache-2.0
"""Preferences of multimodal models, whose hidden states and heads are those of text:

    python examples/multimodal_dpo.py

DA-DPO (Qiu et al. 2026, arXiv:2601.00623): scorers of several kinds vote on how hard each pair is.
LLaVA-MoD's second stage (Shu et al. 2024, arXiv:2408.15881): the reference is a larger teacher; the
first stage, and DHO's two heads, are in two_models.py. UnifiedReward-Flex (arXiv:2602.02380): pairs
of evaluations behind long prefixes of images that are not scored, and the likelihood of the better
one. Takes a step with each and says its loss, and what the prefix costs.
"""

import torch
from torch import Tensor

from fastpref import PreferenceOutput, explain, preference_loss
from fastpref.curriculum import vote_difficulty
from fastpref.objectives import combine, get

IGNORE = -100
Head = tuple[Tensor, Tensor]  # hidden states (2P, T, H), weight (V, H)


def da_dpo(policy: Head, reference: Head, target: Tensor, gaps: Tensor) -> PreferenceOutput:
    """``gaps`` (M, P): how much higher each scorer, such as CLIP and a language model, rates the
    chosen response. An easy pair has a large margin, and is held nearer to the reference."""
    easy = 1 - vote_difficulty(gaps)
    return preference_loss(
        *policy,
        target,
        "da_dpo",
        ref_hidden=reference[0],
        ref_weight=reference[1],
        extras={"reward_margin": easy},
        beta=0.1,
    )


def teacher_dpo(student: Head, teacher: Head, target: Tensor) -> PreferenceOutput:
    """The teacher's hidden states have another width, and its vocabulary is padded further: of its
    head the ids that both have are used."""
    hidden, weight = teacher
    return preference_loss(
        *student,
        target,
        "dpo",
        ref_hidden=hidden,
        ref_weight=weight[: len(student[1])],
        beta=0.1,
    )


def evaluation_dpo(policy: Head, reference: Head, target: Tensor) -> PreferenceOutput:
    """DPO and the chosen response's likelihood; ``target`` is IGNORE over prompt and images, whose
    hidden states are not read."""
    return preference_loss(
        *policy,
        target,
        combine([get("dpo", beta=0.1), get("sft")], [1.0, 1.0]),
        ref_hidden=reference[0],
        ref_weight=reference[1],
    )


def main() -> None:
    torch.manual_seed(0)
    pairs, prefix, length, width, vocabulary = 4, 224, 256, 64, 2000
    target = torch.randint(vocabulary, (2 * pairs, length))
    target[:, :prefix] = IGNORE
    policy = torch.randn(2 * pairs, length, width), torch.randn(vocabulary, width) / 8
    policy[0].requires_grad_()
    reference = policy[0].detach() + 0.1 * torch.randn_like(policy[0]), policy[1]
    teacher = torch.randn(2 * pairs, length, 96), torch.randn(vocabulary + 48, 96) / 10
    outputs = {
        "da-dpo": da_dpo(policy, reference, target, torch.randn(2, pairs)),
        "teacher": teacher_dpo(policy, teacher, target),
        "evaluation": evaluation_dpo(policy, reference, target),
    }
    for name, output in outputs.items():
        (gradient,) = torch.autograd.grad(output.loss, policy[0], retain_graph=True)
        print(f"{name:12} loss {output.loss.item():.4f}   |gradient| {gradient.norm().item():.4f}")
    whole = torch.where(target == IGNORE, 0, target)
    for name, scored in (("with", whole), ("without", target)):
        print(f"{name:8} the prefix scored: {explain(*policy, scored)}")


if __name__ == "__main__":
    main()
