# SPDX-License-Identifier: Apache-2.0
"""AsyncGRPO with rollouts that were drawn before, patched and stock."""

import queue
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tests.integrations.trl.runs import ARGUMENTS, RELEASE

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
    pytest.mark.skipif(RELEASE < (1, 16), reason="trained on a GPU, or with other rollouts"),
]


class Rollouts:
    """Stands for the worker and for the transfer of weights to it."""

    def __init__(self, samples: list[Any]) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        for sample in samples:
            self.rollout_buffer.put(sample)

    def send_weights(self, weights: Any) -> None:
        for _ in weights:
            pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class PlainAttention:
    """For the kernel of flash attention: (tokens, heads, width), of sequences one by one."""

    @staticmethod
    def flash_attn_varlen_func(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts_q: Tensor,
        starts_k: Tensor,
        *_: Any,
        softmax_scale: float,
        **given: Any,
    ) -> Tensor:
        assert given["causal"] and given["window_size"] == (-1, -1)
        parts = []
        bounds = zip(starts_q.tolist(), starts_q[1:].tolist(), strict=False)
        bounds_k = zip(starts_k.tolist(), starts_k[1:].tolist(), strict=False)
        for (a, b), (c, d) in zip(bounds, bounds_k, strict=True):
            q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
            # The last query sees the last key.
            seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=softmax_scale
            )
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)


def samples(kind: Any, count: int) -> list[Any]:
    generator = numpy.random.default_rng(0)
    made = []
    for i in range(count):
        ids = generator.integers(3, 259, size=6 + i % 5)
        mask = numpy.arange(len(ids)) >= 3
        values = {
            "prompt": [{"role": "user", "content": "?"}],
            "completion": [{"role": "assistant", "content": "!"}],
            "input_ids": ids,
            "completion_mask": mask.astype(numpy.int64),
            "old_log_probs": (-5.5 * mask).astype(numpy.float32),
            "advantage": 1.0 - 2.0 * (i % 2),
            "model_version": 0,
            "group_id": i // 2,
            "metrics": {"reward": float(i % 2)},
        }
        known = getattr(kind, "__dataclass_fields__", values)
        made.append(kind(**{name: value for name, value in values.items() if name in known}))
    return made


@pytest.mark.heavy
def test_async_grpo(
    tmp_path: Path,
    tokenizer: Any,
    labelled: Any,
    make_model: Any,
    compare: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trl.experimental.async_grpo import (
        AsyncGRPOConfig,
        AsyncGRPOTrainer,
        async_grpo_trainer,
        packing,
    )
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    # What needs a GPU, or a server, which is not asked.
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: 1.0)
    monkeypatch.setattr(async_grpo_trainer, "VLLMClient", lambda *_: None)
    monkeypatch.setattr(packing, "_flash_attn", lambda: PlainAttention)
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {**ARGUMENTS, "temperature": 0.7, "token_budget": 0, "max_staleness": 100}

    def make() -> Any:
        rollouts = Rollouts(samples(RolloutSample, 16))
        trainer = AsyncGRPOTrainer(
            model=str(tmp_path / "model"),
            reward_funcs=lambda completions, **_: [0.0 for _ in completions],
            args=AsyncGRPOConfig(output_dir=str(tmp_path), **settings),
            train_dataset=labelled.select_columns("prompt"),
            processing_class=tokenizer,
            rollout_worker=rollouts,
            weight_transfer=rollouts,
        )
        return trainer

    compare(make)
