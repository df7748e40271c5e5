# SPDX-License-Identifier: Apache-2.0
"""The loss of TRL's own DPO trainer on log-probabilities that a test has drawn."""

import collections
import types

import pytest
import torch


def loss_and_slopes(logps, lengths, *, tau=0.05, **settings):
    """TRL's mean loss, and its gradient to the policy's summed log-probs times the pairs.

    ``logps`` is (4, P): policy chosen and rejected, reference chosen and rejected. ``lengths`` is
    (2, P), at least 1. ``settings`` are DPOConfig's; loss_type is a single one.
    """
    trl = pytest.importorskip("trl")
    settings = {"label_smoothing": 0.0, "f_divergence_type": "reverse_kl"} | settings
    defaults = {"loss_weights": [1.0], "ld_alpha": None, "f_alpha_divergence_coef": 0.5}
    trainer = types.SimpleNamespace(
        **(defaults | settings),
        loss_types=[settings["loss_type"]],
        args=types.SimpleNamespace(discopop_tau=tau),
        model=types.SimpleNamespace(training=False),
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        use_weighting=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
    )
    totals, counts = logps[:2].reshape(-1), lengths.reshape(-1)
    scored = torch.arange(int(counts.max())) < counts[:, None]
    token_logps = (scored * (totals / counts)[:, None]).requires_grad_()
    nothing = torch.zeros_like(token_logps)
    outputs = types.SimpleNamespace(
        log_probs=token_logps, entropy=nothing, mean_logits=nothing, is_top1=scored
    )
    completion = torch.cat([torch.zeros(len(counts), 1), scored], dim=1).long()
    inputs = {
        "input_ids": completion,
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": logps[2],
        "ref_rejected_logps": logps[3],
    }
    default = torch.get_default_dtype()
    torch.set_default_dtype(logps.dtype)  # of the tensors TRL makes of its settings
    try:
        loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    finally:
        torch.set_default_dtype(default)
    slopes = torch.autograd.grad(loss, token_logps)[0][:, 0]
    return loss.detach(), logps.shape[1] * slopes.view(2, -1)


def check(ours, logps, lengths, *, rtol=1e-9, atol=1e-9, **settings):
    """``ours`` takes the four log-probs and returns PairLosses; it must agree with TRL."""
    policy = logps[:2].clone().requires_grad_()
    losses = ours(*policy, *logps[2:]).losses
    slopes = torch.autograd.grad(losses.sum(), policy)[0]
    loss, expected = loss_and_slopes(logps, lengths, **settings)
    torch.testing.assert_close(losses.mean(), loss, rtol=rtol, atol=atol)
    torch.testing.assert_close(slopes, expected, rtol=rtol, atol=atol)
