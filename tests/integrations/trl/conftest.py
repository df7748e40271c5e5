# SPDX-License-Identifier: Apache-2.0
"""Tiny trainers of TRL's, stock and fastpref's."""

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.trl.runs import ARGUMENTS, distinct_letters


@pytest.fixture
def make_dpo(tmp_path: Path, tokenizer: Any, preferences: Any, make_model: Any) -> Any:
    """``make_dpo(kind, **arguments)``: a trainer of that class, None: TRL's own; arguments of
    DPOConfig go to it.

    The reference is another model than the policy, so that no metric starts at 0; with
    ``reference=False`` there is none.
    """
    from trl import DPOConfig, DPOTrainer

    def make(
        kind: Any = None, architecture: str = "llama", reference: Any = True, **more: Any
    ) -> Any:
        names = [name for name in more if name in DPOConfig.__dataclass_fields__]
        settings = {"beta": 0.5, **{name: more.pop(name) for name in names}}
        if "objective" in more:
            more["beta"] = settings.pop("beta")
        if isinstance(reference, bool):
            reference = make_model(architecture, seed=1) if reference else None
        model = more.pop("model", None)
        return (kind or DPOTrainer)(
            model=make_model(architecture) if model is None else model,
            ref_model=reference,
            args=DPOConfig(output_dir=str(tmp_path), **{**ARGUMENTS, **settings}),
            processing_class=tokenizer,
            **{"train_dataset": preferences, **more},
        )

    return make


@pytest.fixture
def make_sampling(tmp_path: Path, tokenizer: Any, labelled: Any, make_model: Any) -> Any:
    """``make_sampling(kind, config, **arguments)``: a trainer of that class, which samples
    completions and rewards those of many letters."""
    make_model().save_pretrained(tmp_path / "model")

    def make(kind: Any, config: Any, **arguments: Any) -> Any:
        return kind(
            model=str(tmp_path / "model"),
            reward_funcs=distinct_letters,
            args=config(
                output_dir=str(tmp_path),
                **ARGUMENTS,
                num_generations=2,
                max_completion_length=8,
                temperature=0.7,
                **arguments,
            ),
            train_dataset=labelled.select_columns("prompt"),
            processing_class=tokenizer,
        )

    return make
