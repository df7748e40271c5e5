# SPDX-License-Identifier: Apache-2.0
"""Trainers whose losses take log-probabilities by token, or these and entropies."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.other_trainers.page import run_lines
from tests.integrations.other_trainers.stand_ins import (
    BETA,
    IGNORED,
    PAIRS,
    Batch,
    by_token,
    expect_same_training,
    plain_dpo,
    plain_log_probs,
)


def halos_forward(model: Any, batch: Batch) -> Tensor:
    given = {"ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return run_lines("HALOs", 0, model=model, labels=batch.labels, **given)["all_logps"]


def test_halos(model: Any, batch: Batch, reference_tokens: Tensor) -> None:
    trainer = SimpleNamespace(config=SimpleNamespace(loss=SimpleNamespace(beta=BETA)))

    def plain_loss(self: Any, batch: Any, *logps: Tensor) -> tuple[Tensor, ...]:
        pc, pr, rc, rr = logps
        rewards = [BETA * (policy - ref).sum(-1) for policy, ref in ((pc, rc), (pr, rr))]
        losses = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1])
        ones = losses.new_ones(1)
        return losses, rewards[0].detach(), rewards[1].detach(), ones, ones

    def step(loss: Any, logps: Tensor) -> tuple[Tensor, ...]:
        found = loss(trainer, {}, *logps.chunk(2), *reference_tokens.chunk(2))
        return found[0].mean(), logps, *found

    changed = run_lines("HALOs", 1)["loss"]
    got = step(changed, halos_forward(model, batch))
    expect_same_training(model, got, step(plain_loss, plain_log_probs(model, batch)))


def test_halos_kto(model: Any, batch: Batch, reference_tokens: Tensor) -> None:
    """Two desirable and four undesirable responses; what stays are rewards without beta."""
    kl = torch.tensor(0.7, device="cpu", dtype=torch.float64)
    desirable = 2
    labels = torch.arange(2 * PAIRS, device="cpu", dtype=torch.int64) < desirable

    def plain(logps: Tensor) -> tuple[Tensor, ...]:
        ratio = (logps - reference_tokens).sum(-1)
        signed = torch.where(labels, ratio - kl, kl - ratio)
        losses = 1 - torch.sigmoid(BETA * signed)
        return losses.mean(), losses, BETA * ratio.detach()

    def changed(logps: Tensor) -> tuple[Tensor, ...]:
        names = {
            "policy_chosen": logps[:desirable],
            "policy_rejected": logps[desirable:],
            "ref_chosen": reference_tokens[:desirable],
            "ref_rejected": reference_tokens[desirable:],
        }
        found = run_lines("HALOs", 2, labels=labels, kl=kl, beta=BETA, **names)
        return found["losses"].mean(), found["losses"], found["rewards"]

    got = changed(halos_forward(model, batch))
    expect_same_training(model, got, plain(plain_log_probs(model, batch)))


def interleaved(batch: Batch, rows: Tensor) -> Tensor:
    """Chosen and rejected rows by turns, of rows in halves."""
    return rows.unflatten(0, (2, PAIRS)).transpose(0, 1).flatten(0, 1)


class NemoRl:
    """Its loss function: sums over masked tokens, pairs by turns, one divisor for all ranks."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(
        self, next_token_logprobs: Tensor, data: dict[str, Tensor], global_valid_seqs: Tensor
    ) -> tuple[Tensor, ...]:
        ref = data["reference_policy_logprobs"][:, :-1]
        mask = data["token_mask"][:, 1:]
        rewards = ((next_token_logprobs - ref) * mask).sum(-1)
        chosen, rejected = rewards[::2], rewards[1::2]
        losses = -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected))
        valid = data["sample_mask"][::2]
        loss = (losses * valid).sum() / (global_valid_seqs / 2)
        return loss, losses, chosen.detach(), rejected.detach()


@pytest.fixture(scope="module")
def nemo_data(batch: Batch, reference_tokens: Tensor) -> dict[str, Tensor]:
    padded = torch.nn.functional.pad(reference_tokens, (0, 1))  # their last position is of no use
    return {
        "input_ids": interleaved(batch, batch.input_ids),
        "token_mask": (interleaved(batch, batch.labels) != IGNORED).long(),
        "sample_mask": torch.ones(2 * PAIRS, device="cpu", dtype=torch.float64),
        "reference_policy_logprobs": interleaved(batch, padded),
    }


@pytest.mark.parametrize("block", [0, 1], ids=["log-probabilities", "one call"])
def test_nemo_rl(block: int, model: Any, nemo_data: dict[str, Tensor]) -> None:
    data, loss_fn = dict(nemo_data), NemoRl(BETA)
    if block == 0:
        data["sample_mask"] = data["sample_mask"].clone()
        data["sample_mask"][2:4] = 0
    valid = torch.tensor(14, device="cpu", dtype=torch.int64)  # there are other ranks
    hidden = model.model(data["input_ids"]).last_hidden_state
    weight = model.lm_head.weight
    ids = data["input_ids"][:, 1:]
    want = loss_fn(by_token((hidden @ weight.T)[:, :-1], ids), data, valid)
    given = {"data": data, "beta": BETA, "global_valid_seqs": valid}
    names = run_lines("NeMo-RL", block, hidden=hidden, weight=weight, **given)
    if block == 0:
        got = loss_fn(names["next_token_logprobs"], data, valid)
    else:
        output = names["output"]
        rewards = (output.chosen_rewards / BETA, output.rejected_rewards / BETA)
        got = (output.loss, output.losses, *rewards)
    expect_same_training(model, got, want)


@pytest.mark.parametrize("shape", ["rows", "packed"])
def test_verl(shape: str, model: Any, batch: Batch) -> None:
    """The actor's loss takes both, the entropy as a bonus."""
    temperature = 0.7
    ids = batch.input_ids if shape == "rows" else batch.packed()[0]["input_ids"]
    rolled = torch.roll(ids, -1, 1)
    advantages = torch.randn(ids.shape, device="cpu", dtype=torch.float64)

    def step(log_probs: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        loss = -(advantages * log_probs).mean() - 0.1 * entropy.mean()
        return loss, log_probs, entropy

    def plain() -> tuple[Tensor, Tensor]:
        logps = (model.lm_head(model.model(ids)[0]) / temperature).log_softmax(-1)
        chosen = logps.gather(-1, rolled[..., None])[..., 0]
        return chosen, -(logps.exp() * logps).sum(-1)

    hidden = model.model(ids)[0]
    given = {"hidden_states": hidden, "rolled_labels": rolled, "temperature": temperature}
    names = run_lines("verl", 0, self=model, **given)
    got = step(names["log_probs"], names["entropy"])
    expect_same_training(model, got, step(*plain()))


def test_a_loss_of_ones_own(model: Any, batch: Batch, reference_tokens: Tensor) -> None:
    """Clamped token by token, as humanline does: anything in torch follows the scores."""

    def step(logps: Tensor) -> tuple[Tensor, ...]:
        ratios = (logps - reference_tokens).clamp(-0.5, 0.8)
        chosen, rejected = ratios.sum(-1).chunk(2)
        zero = torch.zeros_like(chosen)
        losses = plain_dpo(chosen, rejected, zero, zero)[0]
        return losses.mean(), losses

    got = step(halos_forward(model, batch))
    expect_same_training(model, got, step(plain_log_probs(model, batch)))
