# SPDX-License-Identifier: Apache-2.0
"""The example trains: its loss falls, and desirable responses get the larger rewards."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

PATH = Path(__file__).resolve().parents[2] / "examples" / "kto_trainer.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("kto_trainer", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.heavy
def test_it_trains(example, capsys):
    example.main()
    line = capsys.readouterr().out.strip().splitlines()[-1]
    _, loss, *_, margin = line.split()
    assert float(loss) < 0.6  # weights of 1 and 2 by a half each: 2/3 at first
    assert float(margin) > 0.5
