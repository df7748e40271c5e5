# SPDX-License-Identifier: Apache-2.0
"""The model of the demo: a small Llama and a tokenizer made from the data, or a local directory."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from . import DemoError
from .data import Example

VOCABULARY = 8192
EXPECTED = "expected a local directory with a transformers causal LM and its tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The size of a model built from a config."""

    vocabulary: int = VOCABULARY
    hidden: int = 192
    layers: int = 3
    heads: int = 8
    positions: int = 512


def train_tokenizer(examples: Iterable[Example], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with `vocabulary` tokens, trained on the examples' text.

    The whole numbers below 10,000 are part of its training text. They make a number one token, as
    in the tokenizers of large models, and fill a vocabulary for which a small file has too few
    words.
    """
    texts = [text for example in examples for text in (example.prompt, *example.completions)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *(f" {n}" for n in range(10_000))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_model(tokenizer: Any, size: ModelSize) -> Any:
    """A Llama with tied embeddings and random weights, fp32; set torch's seed first."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.hidden * 8 // 3,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def check_directory(directory: Path, option: str = "--model") -> None:
    """Raise `DemoError` where there is no model in `directory`, without loading any."""
    if not (directory / "config.json").is_file():
        missing = "has no config.json" if directory.is_dir() else "is not a directory"
        raise DemoError(f"{option} {directory}: {missing}; {EXPECTED}")


def load_model(directory: Path, option: str = "--model") -> tuple[Any, Any]:
    """The causal language model (fp32) and the tokenizer saved in `directory`, which `option`
    named.

    Raises:
        DemoError: if it is not a directory that ``save_pretrained`` made of both.
    """
    check_directory(directory, option)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others
        reason = str(error).strip().split("\n")[0]
        raise DemoError(f"{option} {directory}: {reason}; {EXPECTED}") from None
    if tokenizer.eos_token is None:
        raise DemoError(f"{option} {directory}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write model and tokenizer where `load_model` finds them."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
