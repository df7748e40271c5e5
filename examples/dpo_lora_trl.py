# SPDX-License-Identifier: Apache-2.0
"""DPO with LoRA in TRL, scored by fastpref: one call, and the trainer stays as it is:

    python examples/dpo_lora_trl.py

The head is frozen, which takes two products where TRL's own head takes three. The reference is the
model without its adapter. For a model and data of your own, put ``from_pretrained`` and
``load_dataset`` for the tiny ones here.
"""

import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig, DPOTrainer

import fastpref.integrations.trl

WORDS = ("red", "green", "blue", "seven", "old", "rain", "sun", "pear")


def make_tokenizer() -> Any:
    """Bytes as tokens."""
    symbols = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(symbols)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def make_model(tokenizer: Any) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config)


def make_trainer(folder: str) -> DPOTrainer:
    set_seed(0)
    tokenizer = make_tokenizer()
    pairs = [
        {"prompt": f"Say {word}:", "chosen": f" {word}", "rejected": f" not {word}!"}
        for word in WORDS
    ]
    return DPOTrainer(
        model=make_model(tokenizer),
        args=DPOConfig(
            output_dir=folder,
            beta=0.5,
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,  # here only
            bf16=False,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


def main() -> None:
    fastpref.integrations.trl.patch()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(folder).train()  # TRL logs loss, rewards and margins


if __name__ == "__main__":
    main()
