# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, and its tables name what there is."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastpref import diffusion, objectives
from fastpref.diffusion import preset, presets, step_log_prob, step_log_ratio

README = Path(diffusion.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def text() -> str:
    if not README.exists():
        pytest.skip("the package is installed without its README")
    return README.read_text(encoding="utf-8")


def test_code_runs(text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model, ref, target, mean, ref_mean, sample = torch.randn(6, 6, 4, 3, generator=generator)
    names = {
        "preset": preset,
        "step_log_prob": step_log_prob,
        "step_log_ratio": step_log_ratio,
        "torch": torch,
        "objectives": objectives,
        "args": SimpleNamespace(beta_dpo=10.0),
        "mean": mean.requires_grad_(),
        "ref_mean": ref_mean,
        "sample": sample,
        "std": 0.3,
        "B": 3,
        "T": 2,
        "old_logp": torch.zeros(3, 2),
        "rewards": torch.rand(3),
        "groups": torch.zeros(3, dtype=torch.int64),
    }
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names | {"model_pred": model, "ref_pred": ref, "target": target})


def test_every_preset_is_in_the_table(text: str) -> None:
    for name in presets():
        base, _, version = name.rpartition("_")
        listed = f"`{name}`" in text or (version == "sdxl" and f"`{base}_sd15`, `_sdxl`" in text)
        assert listed, name


def test_every_file_is_in_the_table(text: str) -> None:
    for path in README.parent.glob("*.py"):
        assert path.stem == "__init__" or f"`{path.name}`" in text, path.name
