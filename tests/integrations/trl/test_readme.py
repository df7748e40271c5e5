# SPDX-License-Identifier: Apache-2.0
"""The examples of the page on TRL run, in their order."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.integrations import trl as integration
from tests.integrations.trl.runs import ARGUMENTS, RELEASE

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.skipif(RELEASE < (1, 15), reason="FastDPOTrainer needs TRL 1.15"),
]
README = Path(integration.__file__).with_name("README.md")


def test_examples_run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tokenizer: Any,
    preferences: Any,
    make_model: Any,
    trl_utils: Any,
) -> None:
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig

    make_model().save_pretrained(tmp_path / "model")  # from where TRL loads the reference too
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    patching, training = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(patching, {})
    assert trl_utils._ChunkedLogProbFunction is integration.LogProbAdapter
    given: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        "dataset": preferences,
        "tokenizer": tokenizer,
        "DPOConfig": lambda folder: DPOConfig(folder, **ARGUMENTS),
    }
    exec(training, given)
    trainer = given["trainer"]
    assert trainer.preference_loss.objective.name == "simpo"
    before = torch.cat([one.detach().flatten() for one in trainer.model.parameters()])
    trainer.train()
    after = torch.cat([one.detach().flatten() for one in trainer.model.parameters()])
    assert trainer.state.global_step == ARGUMENTS["max_steps"]
    assert (after - before).norm() > 1e-3
