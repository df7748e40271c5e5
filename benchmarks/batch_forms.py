# SPDX-License-Identifier: Apache-2.0
"""What FastDPOTrainer's ``padding_free`` and ``prefix_sharing`` save: tokens through the backbone,
and the time of a step (policy, reference, backward), against padded rows in the same process. On a
CPU that is time of one core, which neighbours do not add to:

python benchmarks/batch_forms.py --prompt 384 --completion 64
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig

from fastpref.integrations.trl import FastDPOTrainer

VOCABULARY = 8192
FORMS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding_free": {"padding_free": True},
    "prefix_sharing": {"prefix_sharing": True},
}


def measure(asked: argparse.Namespace) -> dict[str, tuple[int, float]]:
    """By form the positions that the policy's backbone is given, and its fastest step, seconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = Dataset.from_list([_pair(asked) for _ in range(asked.pairs)])
    with tempfile.TemporaryDirectory(prefix="fastpref-bench-") as folder:
        trainers = {name: _trainer(data, asked, folder, **form) for name, form in FORMS.items()}
    tokens, seconds = {}, {name: [] for name in FORMS}
    batches = {name: next(iter(one.get_train_dataloader())) for name, one in trainers.items()}
    for name, trainer in trainers.items():  # measured, checked and warm
        seen: list[int] = []
        trainer.model.model.register_forward_pre_hook(
            lambda module, args, given, seen=seen: seen.append(given["input_ids"].numel()),
            with_kwargs=True,
        )
        _step(trainer, batches[name])
        tokens[name] = seen[-1]
    for _ in range(asked.steps):
        for name, trainer in trainers.items():
            seconds[name].append(_step(trainer, batches[name]))
    return {name: (tokens[name], min(seconds[name])) for name in FORMS}


def _pair(asked: argparse.Namespace) -> dict[str, list[int]]:
    """Lengths between half of what is asked for and all of it."""

    def some(most: int) -> list[int]:
        length = int(torch.randint(most // 2, most + 1, ()))
        return torch.randint(3, VOCABULARY, (length,)).tolist()

    prompt, chosen, rejected = (some(n) for n in (asked.prompt, asked.completion, asked.completion))
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def _trainer(data: Any, asked: argparse.Namespace, folder: str, **form: Any) -> Any:
    words = {"<pad>": 0, "<eos>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    config = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=asked.pairs,
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        padding_free=form.pop("padding_free", False),
    )
    return FastDPOTrainer(
        _model(asked),
        ref_model=_model(asked),
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        objective="dpo",
        **form,
    )


def _model(asked: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=asked.hidden,
        intermediate_size=asked.hidden * 11 // 4,
        num_hidden_layers=asked.layers,
        num_attention_heads=max(1, asked.hidden // 64),
        pad_token_id=0,
        max_position_embeddings=asked.prompt + asked.completion,
    )
    return LlamaForCausalLM(config)


def _step(trainer: Any, batch: dict[str, Any]) -> float:
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    start = clock()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    if gpu:
        torch.cuda.synchronize()
    trainer.model.zero_grad()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"prompt": 384, "completion": 64, "pairs": 4, "layers": 4, "hidden": 256, "steps": 5}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    asked = parser.parse_args()
    found = measure(asked)
    whole, slow = found["padded"]
    for name, (tokens, seconds) in found.items():
        print(
            f"{name:<15}{tokens:>7} positions ({tokens / whole:.2f}) "
            f"{1e3 * seconds:>7.0f} ms a step ({seconds / slow:.2f})"
        )


if __name__ == "__main__":
    main()
