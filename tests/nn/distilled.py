# SPDX-License-Identifier: Apache-2.0
"""Student, teacher and labels, and a distillation module against Liger-Kernel's."""

import torch
import torch.nn.functional as F

from tests.nn.peers import IGNORE, close, ours, peer_of

N, H, V = 11, 8, 23
LEAVES = ("student_input", "student_weight", "student_bias")


def batch(teacher_vocab=V, bias=True):
    generator = torch.Generator().manual_seed(9)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(V, (N,), generator=generator)
    labels[[0, 4, 10]] = IGNORE
    return {
        "student_input": draw(N, H),
        "student_weight": 0.5 * draw(V, H),
        "teacher_input": draw(N, H + 3),
        "teacher_weight": 0.5 * draw(teacher_vocab, H + 3),
        "true_labels": labels,
        "student_bias": draw(V) if bias else None,
        "teacher_bias": draw(teacher_vocab) if bias else None,
    }


def leaves(given):
    fresh = {name: given[name].clone().requires_grad_() for name in LEAVES if _there(given, name)}
    return dict(given) | fresh


def gradients(loss, given):
    found = [given[name] for name in LEAVES if _there(given, name)]
    return torch.autograd.grad(1.7 * loss, found, retain_graph=True)


def compare(name, given, settings):
    mine, theirs = leaves(given), leaves(given)
    settings = {"return_soft_hard_loss": True} | settings
    got = ours(name)(**settings)(**mine)
    want = peer_of(name)(compiled=False, **settings)(**theirs)
    # Liger-Kernel adds up in float32.
    close(got, want)
    close(gradients(got[0], mine), gradients(want[0], theirs))


def check_common_vocabulary(kind, more):
    """The divergence is that of heads cut to the ids both have, the cross-entropy that of the
    student's own."""
    given, common = batch(teacher_vocab=V + more), V + min(0, more)
    heads = [f"{model}_{part}" for model in ("student", "teacher") for part in ("weight", "bias")]
    cut = given | {name: given[name][:common] for name in heads}
    cut["true_labels"] = torch.where(given["true_labels"] == IGNORE, IGNORE, 0)
    module = kind(return_soft_hard_loss=True)
    loss, soft, hard = module(**given)
    close((soft,), (module(**cut)[1],), 1e-9)
    logits = plain_logits(given, "student")
    close((hard,), (F.cross_entropy(logits, given["true_labels"], ignore_index=IGNORE),), 1e-9)
    close((loss,), (0.5 * soft + 0.5 * hard,), 1e-9)


def plain_logits(given, model):
    logits = given[f"{model}_input"] @ given[f"{model}_weight"].t()
    return logits if given[f"{model}_bias"] is None else logits + given[f"{model}_bias"]


def _there(given, name):
    return given[name] is not None
