# SPDX-License-Identifier: Apache-2.0
"""The example of the page trains."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

from types import SimpleNamespace

from datasets import Dataset

import fastpref
from tests.integrations.transformers.trainings import PAD, make_model, make_rows

pytestmark = pytest.mark.heavy
README = Path(fastpref.__file__).parent / "integrations" / "transformers" / "README.md"


def test_it_trains(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: row[name] for name in names} for row in make_rows("pair", 16)]
    model = make_model()
    before = model.lm_head.weight.detach().clone()
    given = {
        "model": model,
        "tokenizer": SimpleNamespace(pad_token_id=PAD),
        "dataset": Dataset.from_list(rows),
    }
    exec(example, given)
    assert given["trainer"].state.global_step == 3  # of an epoch each
    assert not torch.equal(model.lm_head.weight, before)


def test_nothing_is_imported_before_it_is_used():
    code = "import fastpref.integrations.transformers, sys; sys.exit('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
