# SPDX-License-Identifier: Apache-2.0
"""Warm-up on both completions, preference training through TRL, and measures of the result."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig
from trl.trainer.utils import add_fused_lm_head

from .. import linear_logprob, objectives, sequence_logp
from .data import Pair
from .model import encode
from .objective import config_arguments
from .recipe import Recipe
from .trainer import make_trainer

Head = Literal["stock", "fastpref"]
Progress = Callable[[int, int, float], None]  # step, steps, loss


def device() -> torch.device:
    """Where the demo runs: the CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scored_by(head: Head) -> AbstractContextManager[Any]:
    """A context in which TRL's trainers score with TRL's own head or with fastpref's."""
    if head == "stock":
        return nullcontext()
    from ..integrations import trl

    return trl.patched()


def sequence_lengths(tokenizer: Any, pairs: Sequence[Pair]) -> list[int]:
    """Tokens of each pair's longer sequence, prompt and completion."""
    return [
        len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
        for ids in encode(tokenizer, pairs)
    ]


def warm_up(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], recipe: Recipe, progress: Progress
) -> None:
    """Teach a model of `build_model` to write completions, chosen and rejected alike."""
    sequences = [
        (ids["prompt_ids"], ids[side])
        for ids in encode(tokenizer, pairs)
        for side in ("chosen_ids", "rejected_ids")
    ]
    batches = _batches(sequences, recipe.warm_up_batch, Random(recipe.seed))
    total = recipe.warm_up_steps
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.warm_up_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 1.0) * max(1 - step / total, 0.05)
    )
    model.train()
    for step in range(total):
        ids, attended, labels = _pad(next(batches), tokenizer.pad_token_id, model.device)
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


def _batches(
    sequences: Sequence[tuple[list[int], list[int]]], size: int, random: Random
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Batches of `size` sequences without end, shuffled anew in every epoch."""
    queue: list[tuple[list[int], list[int]]] = []
    while True:
        while len(queue) < size:
            queue += random.sample(sequences, len(sequences))
        yield queue[:size]
        queue = queue[size:]


def _pad(
    sequences: Sequence[tuple[list[int], list[int]]], pad: int, where: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels (-100 on prompts and padding), each ``(B, T)``."""
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    ids = torch.full((len(sequences), longest), pad)
    attended = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        attended[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids.to(where), attended.to(where), labels.to(where)


def preferred_share(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """The share of `pairs` whose chosen completion has the higher log-probability."""
    add_fused_lm_head(model)
    model.eval()
    examples = encode(tokenizer, pairs)
    preferred = 0
    for at in range(0, len(examples), 16):
        batch = examples[at : at + 16]
        sequences = [
            (ids["prompt_ids"], ids[side])
            for side in ("chosen_ids", "rejected_ids")
            for ids in batch
        ]
        ids, attended, labels = _pad(sequences, tokenizer.pad_token_id, model.device)
        with torch.no_grad():
            outputs = model(
                input_ids=ids, attention_mask=attended, labels=labels, fused_lm_head=True
            )
        logps = sequence_logp(outputs.log_probs, mask=labels[:, 1:] != -100)
        chosen, rejected = logps.chunk(2)
        preferred += int((chosen > rejected).sum())
    return preferred / len(pairs)


def complete(model: Any, tokenizer: Any, pair: Pair, tokens: int = 64) -> str:
    """What `model` writes after the prompt, always taking the likeliest token."""
    # As in training, where the end of a prompt may be part of a token of the completion; in the
    # extreme the whole of it is.
    prompt = encode(tokenizer, [pair])[0]["prompt_ids"] or tokenizer(pair.prompt)["input_ids"]
    ids = torch.tensor([prompt], device=model.device)
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


def preference_trainer(
    model: Any,
    reference: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    objective: objectives.Objective,
    recipe: Recipe,
    *,
    directory: Path,
    progress: Progress,
) -> Any:
    """A trainer of TRL over `pairs`; its ``train()`` does ``recipe.steps`` steps and saves nothing.

    Args:
        model: the policy; trained in place.
        reference: another copy of the model that training starts from.
    """
    config = DPOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=recipe.batch,
        max_steps=recipe.steps,
        learning_rate=recipe.rate,
        warmup_steps=min(5, recipe.steps // 2),
        max_length=recipe.max_length,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=device().type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **config_arguments(objective),
    )
    # Of several GPUs one is used: Trainer would take all in nn.DataParallel, which TRL refuses.
    config._n_gpu = min(config.n_gpu, 1)
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, **pair.numbers}
        for pair in pairs
    ]
    trainer = make_trainer(
        objective,
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_Report(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
