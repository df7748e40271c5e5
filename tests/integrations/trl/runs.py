# SPDX-License-Identifier: Apache-2.0
"""Arguments of tiny trainings, and the release of the TRL that runs them."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

try:
    RELEASE = tuple(int(part) for part in version("trl").split(".")[:2])
except PackageNotFoundError:
    RELEASE = (0, 0)

# Of TRL 1.15 plain_head stands for the stock head, which runs on GPUs only.
STOCK_MAKES_LOGITS = RELEASE == (1, 15)

# Plain descent: an optimizer that divides by the gradient would magnify rounding.
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "logging_first_step": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def distinct_letters(completions: list[str], **_: Any) -> list[float]:
    """A reward."""
    return [float(len(set(completion))) for completion in completions]


def through_head(trainer: Any) -> Any:
    """TRL 1.14 scores through its fused head where Liger's kernels are asked for, which are not
    there, nor needed for that."""
    if RELEASE == (1, 14):
        from trl.models.utils import _ForwardRedirection

        trainer.use_liger_kernel = True
        trainer._forward_redirection = _ForwardRedirection()
    return trainer


def plain_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[Tensor | None, ...]:
    """What TRL's fused head computes, from all logits: that of TRL 1.15 runs on GPUs only."""
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float() * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = (logits / temperature).log_softmax(-1)
    values = {
        "entropy": -(logps.exp() * logps).sum(-1),
        "log_sum_sq_probs": (2 * logps.detach()).logsumexp(-1),
        "mean_logits": logits.detach().mean(-1) / temperature,
        "is_top1": logits.argmax(-1) == targets,
    }
    own = logps.gather(-1, targets[:, None])[:, 0]
    return own, *(value if name in outputs else None for name, value in values.items())


def plain_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    beta: float,
    temperature: float = 1.0,
    *heads: float | None,
) -> tuple[Tensor, Tensor]:
    """Likewise of TRL 1.15's divergence: of each row, and the student's entropy. ``heads`` are
    scale and soft cap, of the student and of the teacher."""

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Any) -> Tensor:
        scale, softcap = head
        logits = torch.nn.functional.linear(hidden, weight, bias).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return (logits / temperature).log_softmax(-1)

    q = logps(student_hidden, student_weight, student_bias, heads[:2])
    p = logps(teacher_hidden, teacher_weight, teacher_bias, heads[2:]).detach()
    entropy = -(q.exp() * q).sum(-1).detach()
    if beta == 0:
        return (p.exp() * (p - q)).sum(-1), entropy
    if beta == 1:
        return (q.exp() * (q - p)).sum(-1), entropy
    m = ((1 - beta) * q.exp() + beta * p.exp()).log()
    sides = beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)
    return sides.sum(-1), entropy
