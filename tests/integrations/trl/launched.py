# SPDX-License-Identifier: Apache-2.0
"""A training of TRL's DPOTrainer on fastpref, to be started by ``accelerate launch``:

    python -m tests.integrations.trl.launched FOLDER BATCH [kill STEP | resume CHECKPOINT]

BATCH pairs to a process. Process 0 leaves losses in FOLDER/losses.json and the weights in
FOLDER/weights.pt. ``kill``: process 1 is killed in the backward pass of that step.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from fastpref.integrations import trl as integration

TIMEOUT = 60  # seconds, of the process group
STEPS, SAVED = 6, 2
WORDS = ("a pear", "seven", "the cat sat", "no", "rain, then sun", "x = 3y", "it is", "old")


def make_tokenizer() -> Any:
    """Bytes as tokens, and three special ones."""
    symbols = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(symbols)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def make_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_pairs() -> Any:
    return Dataset.from_list(
        [
            {
                "prompt": f"{i} {word}?",
                "chosen": f" {WORDS[i % 8 - 1]}",
                "rejected": f" {WORDS[i % 8 - 3]}!",
            }
            for i, word in enumerate(3 * WORDS)
        ]
    )


class Killer(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and args.process_index == 1:
            weight = kwargs["model"].get_input_embeddings().weight
            weight.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))


def main(folder: Path, batch: int, how: str, at: str) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True, timeout=timedelta(seconds=TIMEOUT))
    arguments = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=SAVED,
        train_sampling_strategy="sequential",  # drawn orders depend on the number of processes
        report_to="none",
        disable_tqdm=True,
        ddp_timeout=TIMEOUT,
    )
    with integration.patched():
        trainer = DPOTrainer(
            model=make_model(0),
            ref_model=make_model(1),
            args=arguments,
            train_dataset=make_pairs(),
            processing_class=make_tokenizer(),
            callbacks=[Killer(int(at))] if how == "kill" else [],
        )
        trainer.train(resume_from_checkpoint=at if how == "resume" else None)
    if trainer.accelerator.is_main_process:
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses = {entry["step"]: entry["loss"] for entry in logged}
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
        trained = trainer.accelerator.unwrap_model(trainer.model)
        torch.save(trained.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *(sys.argv[3:] or ("", "")))
