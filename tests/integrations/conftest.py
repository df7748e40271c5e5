# SPDX-License-Identifier: Apache-2.0
"""Models, a tokenizer and data small enough to train in a second, all made on the spot."""

import os

# Read when the libraries are imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.integrations.trl.runs import RELEASE, plain_head

WITHOUT_TRL = 'TRL is not installed (pip install "fastpref[trl]")'

# Initial weights this wide give logits with a spread of about 1, and targets that differ in rank.
SPREAD = 0.25
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": SPREAD,
}
# A bias, a soft cap and a scale of the logits, each by its own architecture.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 12, "layer_types": ["full_attention"]},
    "cohere": {"logit_scale": 0.25},
    "phi": {},
}

FEW_ROWS = 16
DISTILLATION = "trl.trainer.distillation_trainer"

WORDS = ("a green pear", "seven", "the cat sat", "no", "rain, then sun", "x = 3y", "it is", "old")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost far more than they give at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trl_utils(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """TRL's module with the fused head; left unpatched."""
    pytest.importorskip("trl", reason=WITHOUT_TRL)
    import trl.trainer.utils

    from fastpref.integrations import trl as integration

    integration.unpatch()
    if RELEASE == (1, 15):
        own = trl.trainer.utils._ChunkedLogProbFunction
        monkeypatch.setattr(own, "apply", staticmethod(plain_head))
    yield trl.trainer.utils
    integration.unpatch()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Bytes as tokens, and three special ones: a vocabulary of 259, no multiple of a vector."""
    pytest.importorskip("trl", reason=WITHOUT_TRL)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(symbols)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture
def make_model(tokenizer: Any) -> Any:
    """``make_model("llama", seed)``: a causal language model with random weights, float32."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    def make(architecture: str = "llama", seed: int = 0) -> Any:
        config = CONFIG_MAPPING[architecture](
            **SIZES,
            **ARCHITECTURES[architecture],
            vocab_size=len(tokenizer),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        bias = model.get_output_embeddings().bias
        if bias is not None:  # initialised to 0
            torch.nn.init.normal_(bias, std=SPREAD)
        return model

    return make


@pytest.fixture(scope="session")
def preferences() -> Any:
    """Eight pairs of different lengths."""
    pytest.importorskip("trl", reason=WITHOUT_TRL)
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"prompt": f"{word}?", "chosen": f" {WORDS[i - 1]}", "rejected": f" {WORDS[i - 3]}!"}
            for i, word in enumerate(WORDS)
        ]
    )


@pytest.fixture(scope="session")
def labelled() -> Any:
    """The same words as single completions, good and bad."""
    pytest.importorskip("trl", reason=WITHOUT_TRL)
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"prompt": f"{word}?", "completion": f" {WORDS[i - 1]}", "label": i % 2 == 0}
            for i, word in enumerate(WORDS)
        ]
    )


@dataclass(frozen=True)
class Training:
    """What a training leaves behind."""

    logs: list[dict[str, Any]]
    update: torch.Tensor  # all trained weights, after minus before
    head_calls: int


@pytest.fixture
def compare(trl_utils: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``compare(make_trainer)`` trains on TRL's head and on fastpref's and expects one result.

    ``make_trainer`` makes a fresh trainer each time. ``rtol`` and ``atol`` bound the difference of
    every logged number, ``update`` that of the change of the weights, relative to its norm;
    ``through`` names what of TRL is replaced. Returns the training on fastpref.
    """
    from fastpref.integrations import trl as integration
    from fastpref.integrations.trl import divergence

    counts: dict[str, Any] = {
        "head": lambda: (
            _count(monkeypatch, trl_utils._ChunkedLogProbFunction, "apply"),
            _count(monkeypatch, integration.LogProbAdapter, "apply"),
        ),
        "divergence": lambda: (
            _count(monkeypatch, sys.modules[DISTILLATION], "_chunked_divergence_loss"),
            _count(monkeypatch, divergence.DivergenceLoss, "__call__"),
        ),
    }

    def compare(
        make_trainer: Callable[[], Any],
        rtol: float = 2e-5,
        atol: float = 2e-5,
        update: float = 2e-5,
        through: str = "head",
    ) -> Training:
        stock_calls, adapter_calls = counts[through]()
        stock = _train(make_trainer, stock_calls)
        assert adapter_calls == []
        stock_calls.clear()
        with integration.patched():
            fast = _train(make_trainer, adapter_calls)
        assert stock_calls == []
        assert fast.head_calls == stock.head_calls > 0
        _expect_equal_logs(fast.logs, stock.logs, rtol, atol)
        norm = stock.update.norm()
        assert norm > 1e-3, "the weights hardly moved: nothing was compared"
        assert (fast.update - stock.update).norm() <= update * norm
        return fast

    return compare


@pytest.fixture
def compare_trainers() -> Any:
    """``compare_trainers(make_stock, make_fast)`` trains both and expects one result, the second
    without its head's product, and the first, ``stock_products``, with. Returns the second."""

    def compare(
        make_stock: Callable[[], Any], make_fast: Callable[[], Any], stock_products: bool = True
    ) -> Training:
        stock = _train_counting_products(make_stock)
        fast = _train_counting_products(make_fast)
        assert (stock.head_calls > 0) == stock_products
        assert fast.head_calls == 0
        _expect_equal_logs(fast.logs, stock.logs, 2e-5, 2e-5)
        norm = stock.update.norm()
        assert norm > 1e-3, "the weights hardly moved: nothing was compared"
        assert (fast.update - stock.update).norm() <= 2e-5 * norm
        return fast

    return compare


class HeadProducts(TorchFunctionMode):
    """Counts products with the vocabulary of more rows than a model is tried on, or generates."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.linear and args[1].shape[0] == self.vocabulary:
            self.count += args[0].shape[:-1].numel() > FEW_ROWS
        return function(*args, **(kwargs or {}))


def _train_counting_products(make_trainer: Callable[[], Any]) -> Training:
    torch.manual_seed(0)
    trainer = make_trainer()
    products = HeadProducts(trainer.model.config.vocab_size)
    with products:
        training = _train(lambda: trainer, [])
    return dataclasses.replace(training, head_calls=products.count)


def _count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    calls: list[None] = []
    original = getattr(owner, name)

    @functools.wraps(original)  # with its signature, by which it is known
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, staticmethod(counting) if name == "apply" else counting)
    return calls


def _train(make_trainer: Callable[[], Any], calls: list[None]) -> Training:
    torch.manual_seed(0)
    trainer = make_trainer()
    trained = [value for value in trainer.model.parameters() if value.requires_grad]
    before = [value.detach().clone() for value in trained]
    trainer.train()
    update = [(after - old).flatten() for after, old in zip(trained, before, strict=True)]
    return Training(trainer.state.log_history, torch.cat(update).detach(), len(calls))


def _expect_equal_logs(
    fast: list[dict[str, Any]], stock: list[dict[str, Any]], rtol: float, atol: float
) -> None:
    assert [set(entry) for entry in fast] == [set(entry) for entry in stock]
    timed = ("_runtime", "_per_second", "step_time")
    for entry, expected in zip(fast, stock, strict=True):
        for key, value in expected.items():
            if key.endswith(timed) or key.startswith("perf/"):
                continue
            close = math.isclose(entry[key], value, rel_tol=rtol, abs_tol=atol)
            assert close, (key, entry[key], value)
