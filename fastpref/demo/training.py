# SPDX-License-Identifier: Apache-2.0
"""Warm-up on both completions, preference training through TRL, and measures of the result."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from .. import fuse_lm_head, linear_logprob, objectives, sequence_logp
from ..integrations import trl
from .data import Example
from .objective import config_arguments
from .recipe import Recipe
from .settings import configured, silenced
from .tokens import TokenIds, encode, pad

Head = Literal["stock", "fastpref"]
Progress = Callable[[int, int, float], None]  # step, steps, loss


def scored_by(head: Head) -> AbstractContextManager[Any]:
    """A context in which TRL's trainers score with TRL's own head or with fastpref's."""
    return nullcontext() if head == "stock" else trl.patched()


def warm_up(
    model: Any, tokenizer: Any, examples: Sequence[Example], recipe: Recipe, progress: Progress
) -> None:
    """Teach a model of `build_model` to write completions, chosen and rejected alike."""
    sequences = _chosen_and_rejected(tokenizer, examples)
    batches = _batches(sequences, recipe.warm_up_batch, Random(recipe.seed))
    total = recipe.warm_up_steps
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.warm_up_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 1.0) * max(1 - step / total, 0.05)
    )
    model.train()
    for step in range(total):
        ids, attended, labels = pad(next(batches), tokenizer.pad_token_id, model.device)
        states = model.base_model(input_ids=ids, attention_mask=attended).last_hidden_state
        weight = model.get_output_embeddings().weight
        scores = linear_logprob(states[:, :-1], weight, labels[:, 1:])
        loss = -cast(Tensor, scores.logp).sum() / (labels[:, 1:] != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, total, loss.item())
    model.eval()


def _chosen_and_rejected(tokenizer: Any, examples: Sequence[Example]) -> list[TokenIds]:
    """Two sequences of every example: the chosen one, then the rejected one."""
    encoded = encode(tokenizer, examples)
    return [
        (ids.prompt, ids.completions[place])
        for example, ids in zip(examples, encoded, strict=True)
        for place in (example.best, example.worst)
    ]


def _batches(sequences: Sequence[TokenIds], size: int, random: Random) -> Iterator[list[TokenIds]]:
    """Batches of `size` sequences without end, shuffled anew in every epoch."""
    queue: list[TokenIds] = []
    while True:
        while len(queue) < size:
            queue += random.sample(sequences, len(sequences))
        yield queue[:size]
        queue = queue[size:]


def preference_gaps(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[float]:
    """How much larger, in nats, the log-probability of each chosen completion is than that of the
    rejected one."""
    fuse_lm_head(model)
    model.eval()
    gaps: list[float] = []
    for at in range(0, len(examples), 16):
        sequences = _chosen_and_rejected(tokenizer, examples[at : at + 16])
        ids, attended, labels = pad(sequences, tokenizer.pad_token_id, model.device)
        with torch.no_grad():
            outputs = model(
                input_ids=ids, attention_mask=attended, labels=labels, fused_lm_head=True
            )
        logps = sequence_logp(outputs.log_probs, mask=labels[:, 1:] != -100)
        gaps += (logps[0::2] - logps[1::2]).tolist()
    return gaps


def preferred_share(gaps: Sequence[float]) -> float:
    """The share of examples whose chosen completion has the higher log-probability."""
    return sum(gap > 0 for gap in gaps) / len(gaps)


def complete(model: Any, tokenizer: Any, example: Example, tokens: int = 64) -> str:
    """What `model` writes after the prompt, always taking the likeliest token."""
    # As in training, where the end of a prompt may be part of a token of the completion; in the
    # extreme the whole of it is.
    prompt = encode(tokenizer, [example])[0].prompt or tokenizer(example.prompt)["input_ids"]
    ids = torch.tensor([prompt], device=model.device, dtype=torch.int64)
    model.eval()
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    text: str = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
    return text.strip()


class _Report(TrainerCallback):
    """Passes the loss of every step on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.progress(state.global_step, state.max_steps, float(logs["loss"]))


def batch_size(objective: objectives.Objective, examples: Sequence[Example], recipe: Recipe) -> int:
    """Rows of the data set a batch, so that it has about ``recipe.batch`` completions."""
    if objective.unit == "list":
        completions: float = mean(len(example.completions) for example in examples)
    else:
        completions = 2 if objective.unit == "pair" else 1
    return max(1, round(recipe.batch / completions))


def _rows(
    tokenizer: Any, examples: Sequence[Example], objective: objectives.Objective
) -> list[dict[str, Any]]:
    """The data set of a trainer: text for pairs, of which TRL makes tokens, else tokens."""
    if objective.unit == "pair":
        return [
            {"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected, **e.numbers}
            for e in examples
        ]
    if objective.unit == "list":
        encoded = zip(examples, encode(tokenizer, examples), strict=True)
        return [
            {"prompt_ids": ids.prompt, "completions_ids": ids.completions, "scores": e.rewards}
            for e, ids in encoded
        ]
    rows = [
        {"prompt_ids": prompt, "completion_ids": completion, "label": at % 2 == 0}
        for at, (prompt, completion) in enumerate(_chosen_and_rejected(tokenizer, examples))
    ]
    # Without labels an objective unlearns whatever it is given.
    return rows if "labels" in objective.extras else rows[1::2]


def preference_trainer(
    model: Any,
    reference: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    objective: objectives.Objective,
    recipe: Recipe,
    *,
    directory: Path,
    progress: Progress,
) -> Any:
    """TRL's DPOTrainer over `examples`, or FastDPOTrainer where TRL has not the objective as a
    loss; ``train()`` does ``recipe.steps`` steps and saves nothing.

    Args:
        model: the policy; trained in place.
        reference: another copy of the model that training starts from.
    """
    of_trl = config_arguments(objective)
    config = configured(
        DPOConfig,
        directory,
        per_device_train_batch_size=batch_size(objective, examples, recipe),
        max_steps=recipe.steps,
        learning_rate=recipe.rate,
        warmup_steps=min(5, recipe.steps // 2),
        max_length=recipe.max_length,
        seed=recipe.seed,
        data_seed=recipe.seed,
        **of_trl,
    )
    make = DPOTrainer if of_trl else partial(trl.FastDPOTrainer, objective=objective)
    trainer = make(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(_rows(tokenizer, examples, objective)),
        processing_class=tokenizer,
        callbacks=[_Report(progress)],
    )
    return silenced(trainer)
