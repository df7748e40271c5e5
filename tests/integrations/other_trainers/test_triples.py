# SPDX-License-Identifier: Apache-2.0
"""Trainers that hand over log-probabilities of responses and take losses and rewards of pairs."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
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

Triple = tuple[Tensor, Tensor, Tensor]


def logged(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> tuple[Tensor, ...]:
    """What a trainer makes of the triple: the loss, and metrics."""
    accuracy = (chosen_rewards > rejected_rewards).double().mean()
    return losses.mean(), losses, chosen_rewards, rejected_rewards, accuracy


class TrlTo024:
    """TRL's trainer up to 0.24, and ms-swift's, which inherits from it."""

    def __init__(self, loss_type: str = "sigmoid") -> None:
        self.beta, self.loss_type = BETA, loss_type

    def dpo_loss(
        self, pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, loss_type: str, model_output: Any
    ) -> Triple:
        assert set(model_output) == {"chosen_logps", "rejected_logps"}
        losses, chosen, rejected = plain_dpo(pc, pr, rc, rr)
        if loss_type == "ipo":
            losses = ((pc - pr) - (rc - rr) - 1 / (2 * self.beta)).square()
        return losses, chosen, rejected

    def get_batch_loss_metrics(self, logps: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
        (pc, pr), (rc, rr) = logps.chunk(2), reference.chunk(2)
        output = {"chosen_logps": pc, "rejected_logps": pr}
        return logged(*self.dpo_loss(pc, pr, rc, rr, self.loss_type, output))


def test_trl_to_024(model: Any, batch: Batch, reference: Tensor) -> None:
    trainer, changed = TrlTo024(), TrlTo024()
    run_lines("TRL to 0.24", 0, trainer=changed)
    logps = plain_log_probs(model, batch).sum(-1)
    got, want = (one.get_batch_loss_metrics(logps, reference) for one in (changed, trainer))
    assert "dpo_loss" in vars(changed)
    expect_same_training(model, got, want)


def test_trl_to_024_with_means(model: Any, batch: Batch, reference: Tensor) -> None:
    trainer, changed = TrlTo024("ipo"), TrlTo024("ipo")
    ipo = fastpref.objectives.get("ipo", beta=changed.beta, normalize="sum")
    changed.dpo_loss = lambda pc, pr, rc, rr, *_: ipo(pc, pr, rc, rr)  # type: ignore[method-assign]
    lengths = (batch.labels[:, 1:] != IGNORED).sum(-1)
    logps = plain_log_probs(model, batch).sum(-1) / lengths
    steps = [one.get_batch_loss_metrics(logps, reference / lengths) for one in (changed, trainer)]
    expect_same_training(model, *steps)


class LlamaFactory:
    """Halves, a dict of log-probabilities and logits, and a method from four to the triple."""

    def __init__(self, lines: bool) -> None:
        self.beta, self.label_smoothing, self.ftx_gamma = BETA, 0.1, 0.5
        self.lines = lines

    def compute_preference_loss(self, pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> Triple:
        """The "robust" loss of TRL."""
        eps = self.label_smoothing
        straight, chosen, rejected = plain_dpo(pc, pr, rc, rr)
        flipped = plain_dpo(pr, pc, rr, rc)[0]
        return ((1 - eps) * straight - eps * flipped) / (1 - 2 * eps), chosen, rejected

    def concatenated_forward(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        inputs, labels = batch.inputs(), batch.labels
        if self.lines:
            names = run_lines("LLaMA-Factory", 0, model=model, batch=inputs, labels=labels)
            logits, logps, lengths = (
                names[name] for name in ("all_logits", "all_logps", "valid_length")
            )
        else:
            logits = model(**inputs, use_cache=False).logits
            logps = by_token(logits[:, :-1], labels[:, 1:]).sum(-1)
            lengths = (labels[:, 1:] != IGNORED).sum(-1)
            scored = (labels[:, 1:] != IGNORED)[..., None]
            logits = (logits[:, :-1] * scored).mean(-1)  # of scored tokens, where theirs are all
        chosen, rejected = logps.chunk(2)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": logits.chunk(2)[0],
            "rejected_logits": logits.chunk(2)[1],
            "chosen_logps_avg": chosen / lengths.chunk(2)[0],
        }

    def get_batch_loss_metrics(
        self, model: Any, batch: Batch, reference: Tensor
    ) -> tuple[Tensor, ...]:
        output = self.concatenated_forward(model, batch)
        losses, chosen, rejected = self.compute_preference_loss(
            output["chosen_logps"], output["rejected_logps"], *reference.chunk(2)
        )
        losses = losses - self.ftx_gamma * output["chosen_logps_avg"]
        metrics = [output[name].mean() for name in ("chosen_logits", "rejected_logits")]
        return *logged(losses, chosen, rejected), *metrics


def test_llama_factory(model: Any, batch: Batch, reference: Tensor) -> None:
    trainer, changed = LlamaFactory(lines=False), LlamaFactory(lines=True)
    run_lines("LLaMA-Factory", 2, trainer=changed)
    assert "compute_preference_loss" in vars(changed)
    got, want = (one.get_batch_loss_metrics(model, batch, reference) for one in (changed, trainer))
    expect_same_training(model, got, want)


def test_llama_factory_with_ld_alpha(model: Any, batch: Batch, reference: Tensor) -> None:
    """What a response has beyond the length of its partner counts less."""
    trainer = SimpleNamespace(ld_alpha=0.4)

    def plain() -> Tensor:
        tokens = plain_log_probs(model, batch)
        starts = (batch.labels[:, 1:] != IGNORED).long().argmax(-1)
        lengths = (batch.labels[:, 1:] != IGNORED).sum(-1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        front = torch.arange(tokens.shape[1]) < (starts + shared)[:, None]
        return (tokens * front).sum(-1) + trainer.ld_alpha * (tokens * ~front).sum(-1)

    def changed() -> Tensor:
        names = run_lines(
            "LLaMA-Factory", 0, model=model, batch=batch.inputs(), labels=batch.labels
        )
        given = {"output": names["output"], "valid_length": names["valid_length"]}
        return run_lines("LLaMA-Factory", 1, self=trainer, **given)["all_logps"]

    got, want = (
        logged(*plain_dpo(*one().chunk(2), *reference.chunk(2))) for one in (changed, plain)
    )
    expect_same_training(model, got, want)


class MsSwift(TrlTo024):
    """Labels are rolled by one and no logit is cut off; what is padded stays in the batch."""

    def __init__(self, lines: bool) -> None:
        super().__init__()
        self.lines = lines

    def per_token(
        self, model: Any, inputs: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, means of logits, and the mask, each (rows, T)."""
        if self.lines:
            names = run_lines("ms-swift", 0, model=model, batch=inputs, labels=labels)
            return names["per_token_logps"], names["mean_all_logits"], names["loss_mask"]
        logits = model(**inputs, use_cache=False).logits
        scored = labels != IGNORED
        return by_token(logits, labels), logits.mean(-1) * scored, scored

    def step(
        self, model: Any, inputs: dict[str, Tensor], labels: Tensor, reference: Tensor
    ) -> tuple[Tensor, ...]:
        logps, mean_logits, mask = self.per_token(model, inputs, torch.roll(labels, -1, 1))
        return *self.get_batch_loss_metrics(logps.sum(-1), reference), mean_logits[mask].mean()


def test_ms_swift(model: Any, batch: Batch, reference: Tensor) -> None:
    labels = batch.labels.clone()
    labels[:, 0] = IGNORED
    trainer, changed = MsSwift(lines=False), MsSwift(lines=True)
    run_lines("TRL to 0.24", 0, trainer=changed)
    steps = [one.step(model, batch.inputs(), labels, reference) for one in (changed, trainer)]
    expect_same_training(model, *steps)


class Actor(torch.nn.Module):
    """OpenRLHF's: scores every position, then cuts the last one off."""

    def __init__(self, model: Any, lines: bool) -> None:
        super().__init__()
        self.model, self.lines, self.temperature = model, lines, 0.7

    def forward(
        self, sequences: Tensor, attention_mask: Tensor | None, positions: Tensor
    ) -> Tensor:
        """(rows, T - 1)."""
        rolled = torch.roll(sequences, -1, 1)
        if self.lines:
            names = run_lines(
                "OpenRLHF",
                0,
                self=self,
                sequences=sequences,
                foward_attention_mask=attention_mask,
                position_ids=positions,
                rolled_sequences=rolled,
            )
            return names["log_probs"][:, :-1]
        # OpenRLHF turns the cache off in the model's configuration.
        logits = self.model(
            sequences, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits
        return by_token(logits / self.temperature, rolled)[:, :-1]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_openrlhf(packed: bool, model: Any, batch: Batch, reference: Tensor) -> None:
    """Prompts and padding are masked out of the sums; the loss comes back averaged."""
    inputs, labels, boundaries = batch.packed()
    ends = boundaries[1:].tolist()

    def sums(lines: bool) -> Tensor:
        actor = Actor(model, lines)
        if packed:
            log_probs = actor(inputs["input_ids"], None, inputs["position_ids"])
            masked = (log_probs * (labels[:, 1:] != IGNORED))[0]
            starts_and_ends = zip([0, *ends[:-1]], ends, strict=True)
            return torch.stack([masked[start : end - 1].sum() for start, end in starts_and_ends])
        positions = batch.attention_mask.cumsum(-1) - 1
        positions.masked_fill_(batch.attention_mask == 0, 1)
        log_probs = actor(batch.input_ids, batch.attention_mask, positions)
        return (log_probs * (batch.labels[:, 1:] != IGNORED)).sum(-1)

    def averaged(*logps: Tensor) -> Triple:
        losses, chosen, rejected = plain_dpo(*logps)
        return losses.mean(), chosen, rejected

    changed = run_lines("OpenRLHF", 1, beta=BETA)["loss_fn"]
    got, want = (
        loss_fn(*sums(lines).chunk(2), *reference.chunk(2))
        for lines, loss_fn in ((True, changed), (False, averaged))
    )
    expect_same_training(model, got, want)


@dataclass
class ChosenRejectedOutputs:
    """torchtune's."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_logits: Tensor | None = None
    rejected_logits: Tensor | None = None


class Decoder(torch.nn.Module):
    """torchtune's decoder: gives hidden states where its output layer is to be skipped."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.output, self.skip_output_layer = model.model, model.lm_head, False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(tokens).last_hidden_state
        return hidden if self.skip_output_layer else self.output(hidden)


def test_torchtune(model: Any, batch: Batch, reference: Tensor) -> None:
    class PreferenceLoss(torch.nn.Module):
        """Its base class."""

    class Plain(PreferenceLoss):
        def forward(self, policy: ChosenRejectedOutputs, ref: ChosenRejectedOutputs) -> Triple:
            pairs = (policy.chosen_logps, policy.rejected_logps)
            return plain_dpo(*pairs, ref.chosen_logps, ref.rejected_logps, beta=0.1)

    def step(loss_fn: torch.nn.Module, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
        ref = ChosenRejectedOutputs(*reference.chunk(2))
        return logged(*loss_fn(ChosenRejectedOutputs(chosen, rejected), ref))

    decoder = Decoder(model)
    labels = batch.labels
    logits = decoder(batch.input_ids)
    want = step(Plain(), *by_token(logits[:, :-1], labels[:, 1:]).sum(-1).chunk(2))
    names = run_lines(
        "torchtune",
        0,
        model=decoder,
        concatenated_input_ids=batch.input_ids,
        concatenated_labels=labels,
    )
    loss_fn = run_lines("torchtune", 1, PreferenceLoss=PreferenceLoss)["DPOLoss"]()
    got = step(loss_fn, names["chosen_log_probs"], names["rejected_log_probs"])
    expect_same_training(model, got, want)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_means_in_place_of_sums(loss: str, model: Any, batch: Batch) -> None:
    means = plain_log_probs(model, batch).sum(-1) / (batch.labels[:, 1:] != IGNORED).sum(-1)
    chosen, rejected = means.chunk(2)
    logsigmoid = torch.nn.functional.logsigmoid
    one = torch.ones(PAIRS, device="cpu", dtype=torch.float64)
    if loss == "simpo":
        beta, got = 2.0, run_lines("Means in place of sums", 0)["simpo_loss"](chosen, rejected)
        losses = -logsigmoid(beta * (chosen - rejected - 0.5))
    else:
        beta = BETA
        lengths = {"chosen_lengths": one, "rejected_lengths": one}
        got = fastpref.objectives.orpo(chosen, rejected, None, None, **lengths, beta=beta)
        odds = [each - torch.log1p(-each.exp()) for each in (chosen, rejected)]
        losses = -chosen - beta * logsigmoid(odds[0] - odds[1])
    want = logged(losses, beta * chosen.detach(), beta * rejected.detach())
    expect_same_training(model, logged(*got), want)
