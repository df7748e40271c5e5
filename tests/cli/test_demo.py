# SPDX-License-Identifier: Apache-2.0
"""The demo command: what stops it, and one run of it from end to end."""

import json

import pytest

from fastpref.cli.main import main
from fastpref.demo import require_libraries

GOOD = {"prompt": "How many figs?\n", "chosen": "Two figs.", "rejected": "Ten figs."}


def pairs_file(directory, *, bad_line=None):
    lines = [json.dumps({**GOOD, "prompt": f"How many figs in {n}?\n"}) for n in range(16)]
    if bad_line is not None:
        lines[6] = bad_line
    path = directory / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def refused(capsys, *arguments):
    """The one line on stderr of a demo that stops before any training."""
    assert main(["demo", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert "step" not in out
    assert err.startswith("fastpref demo: ") and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "chosen": "b"}', '"rejected" is missing'),
        ('{"prompt": "a", "chosen', "broken JSON"),
        ('{"prompt": "a", "chosen": "", "rejected": "c"}', '"chosen" is empty'),
    ],
)
def test_bad_line_stops_it_with_file_and_line(tmp_path, capsys, line, said):
    path = pairs_file(tmp_path, bad_line=line)
    message = refused(capsys, "--data", path)
    assert f"{path}, line 7: " in message and said in message and "expected" in message
    assert not (tmp_path / "demo-output").exists()


def test_missing_file_stops_it(capsys):
    assert "missing.jsonl" in refused(capsys, "--data", "missing.jsonl")


def test_unknown_objective_stops_it_with_the_choices(capsys):
    message = refused(capsys, "--objective", "dpoo")
    assert "--objective dpoo" in message and "dpo, " in message


def test_directory_that_is_no_model_stops_it(tmp_path, capsys):
    assert "has no config.json" in refused(capsys, "--model", tmp_path)
    assert not (tmp_path / "demo-output").exists()


def test_other_arguments_are_checked(tmp_path, capsys):
    assert "--steps 0" in refused(capsys, "--steps", 0)
    taken = pairs_file(tmp_path)
    assert f"--out {taken}" in refused(capsys, "--out", taken)


def test_missing_library_is_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("fastpref.demo.LIBRARIES", ("json", "no_such_library"))
    message = refused(capsys)
    assert "no_such_library" in message and 'pip install "fastpref[demo]"' in message
    monkeypatch.setattr("fastpref.demo.LIBRARIES", ("json",))
    require_libraries()


def test_demo_runs_from_end_to_end(tmp_path, capsys):
    from fastpref.demo import quiet, stay_offline

    stay_offline()
    quiet()
    import torch

    from fastpref.demo.data import load_pairs
    from fastpref.demo.model import ModelSize, build_model, save, train_tokenizer

    data = pairs_file(tmp_path)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(load_pairs(data), 400)
    size = ModelSize(vocabulary=400, hidden=32, layers=1, heads=2)
    save(build_model(tokenizer, size), tokenizer, tmp_path / "tiny")

    arguments = ["--data", data, "--model", tmp_path / "tiny", "--steps", 2, "--out", "out"]
    assert main(["demo", *map(str, arguments)]) == 0
    out, _ = capsys.readouterr()
    assert "14 pairs to train on, 2 held out" in out
    assert "step 2 of 2" in out
    assert out.count("held-out prompt") == 2  # of at most three
    assert "largest difference in loss" in out

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["objective"] == "dpo" and len(results["losses"]) == 2
    assert 0 <= results["after"]["preferred_share"] <= 1
    compared = results["comparison"]
    assert compared["largest_loss_difference"] < 1e-5
    for head in ("stock", "fastpref"):
        assert len(compared[head]["losses"]) == 2
        assert all(
            0 < inside < whole
            for inside, whole in zip(
                compared[head]["head_seconds"], compared[head]["step_seconds"], strict=True
            )
        )
    assert (tmp_path / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "model" / "config.json").exists()
