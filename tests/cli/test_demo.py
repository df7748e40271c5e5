# SPDX-License-Identifier: Apache-2.0
"""The demo command: what stops it, and one run of it from end to end."""

import json
import math
from pathlib import Path

import pytest

from fastpref.cli.main import main
from fastpref.demo import DemoError, require_libraries

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
    assert "objective dpoo" in message and "dpo, " in message
    assert "did you mean 'dpo'? Choose from " in message
    assert "objective ip:" in refused(capsys, "--compare", "dpo, ip")


def test_compare_with_objective_stops_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--compare", "ipo", "--objective", "dpo", "--data", "missing.jsonl"])
    assert stopped.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_list_that_is_none_stops_it_with_file_and_line(tmp_path, capsys):
    line = '{"prompt": "a", "completions": ["b", "c"], "rewards": [1]}'
    path = pairs_file(tmp_path, bad_line=line)
    message = refused(capsys, "--data", path, "--objective", "adpo")
    assert f"{path}, line 7: " in message and "1 numbers for 2 completions" in message


def test_column_that_is_missing_stops_it(tmp_path, capsys):
    message = refused(capsys, "--data", pairs_file(tmp_path), "--objective", "madpo")
    assert 'line 1: the field "reward_margin" is missing' in message


def test_directory_that_is_no_model_stops_it(tmp_path, capsys):
    assert "has no config.json" in refused(capsys, "--model", tmp_path)
    assert not (tmp_path / "demo-output").exists()


def test_other_arguments_are_checked(tmp_path, capsys):
    taken = pairs_file(tmp_path)
    assert f"got {taken}: File exists" in refused(capsys, "--out", taken)


@pytest.mark.parametrize("options", [(), ("--visual",)])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--steps", 2**31), "--steps must be at most 2147483647, got 2147483648"),
        (("--seed", -1), "--seed must be at least 0, got -1"),
        (("--seed", 2**32), "--seed must be at most 4294967295, got 4294967296"),
    ],
)
def test_numbers_are_checked_before_work(monkeypatch, capsys, options, given, said):
    monkeypatch.setattr("fastpref.cli.demo._demo", None)
    monkeypatch.setattr("fastpref.cli.demo._visual", None)
    assert said in refused(capsys, *given, *options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--compare", ","), "--compare has an empty name, got ','"),
        (("--compare", "dpo,,ipo"), "--compare has an empty name, got 'dpo,,ipo'"),
        (("--compare", ""), "--compare has an empty name, got ''"),
        (("--objective", " "), "--objective has an empty name, got ' '"),
        (("--compare", "dpo"), "--compare must be two names or more, got 'dpo' alone"),
        (("--compare", "dpo, ipo,dpo"), "--compare must name each objective once, got 'dpo, ipo"),
    ],
)
def test_names_are_checked_before_work(capsys, given, said):
    assert said in refused(capsys, *given, "--data", "missing.jsonl")


@pytest.mark.parametrize("options", [(), ("--visual",)])
def test_a_folder_for_results_is_checked_before_work(monkeypatch, tmp_path, capsys, options):
    taken = pairs_file(tmp_path)
    monkeypatch.setattr("fastpref.cli.demo._demo", None)
    monkeypatch.setattr("fastpref.cli.demo._visual", None)
    for out in (taken / "deeper", Path("/proc/new")):
        message = refused(capsys, "--out", out, *options)
        assert f"--out must be a folder that can be written to, got {out}: " in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "a small model learns to write answers"),
        ((), "about three minutes on two cores"),
        (("--steps", 2), "a preference training in TRL, then its head beside fastpref's"),
        (("--compare", "dpo,ipo"), "a training in TRL with each objective"),
    ],
)
def test_the_first_line_says_what_is_done(monkeypatch, capsys, options, said):
    def stop():
        raise DemoError("enough")

    monkeypatch.setattr("fastpref.cli.demo.quiet", stop)
    assert main(["demo", *map(str, options)]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(" 0:00  start") and said in line
    assert ("three minutes" in line) == (options == ())


def test_missing_library_is_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("fastpref.demo.LIBRARIES", ("json", "no_such_library"))
    message = refused(capsys)
    assert "no_such_library" in message and 'pip install "fastpref[demo]"' in message
    monkeypatch.setattr("fastpref.demo.LIBRARIES", ("json",))
    require_libraries()


@pytest.fixture
def tiny(tmp_path):
    """Where a tiny model is saved that was never trained."""
    from fastpref.demo import quiet, stay_offline

    stay_offline()
    quiet()
    import torch

    from fastpref.demo.data import load
    from fastpref.demo.model import ModelSize, build_model, save, train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(load(pairs_file(tmp_path)).examples, 400)
    size = ModelSize(vocabulary=400, hidden=32, layers=1, heads=2)
    save(build_model(tokenizer, size), tokenizer, tmp_path / "tiny")
    return tmp_path / "tiny"


def results_of(*arguments):
    """What a demo of two steps wrote."""
    arguments = ["--steps", 2, "--out", "out", *arguments]
    assert main(["demo", *map(str, arguments)]) == 0
    return json.loads(Path("out/results.json").read_text())


@pytest.mark.heavy
def test_demo_runs_from_end_to_end(tmp_path, tiny, capsys):
    results = results_of("--data", pairs_file(tmp_path), "--model", tiny)
    out, _ = capsys.readouterr()
    assert "14 pairs to train on, 2 held out" in out
    assert "step 2 of 2" in out
    assert out.count("held-out prompt") == 2  # of at most three
    assert "largest difference in loss" in out

    assert "The two heads under TRL's own dpo loss:" in out
    assert results["objective"] == "dpo" and len(results["losses"]) == 2
    assert results["trainer"] == "trl.DPOTrainer"
    assert 0 <= results["after"]["preferred_share"] <= 1
    assert_heads_agree(results["comparison"], "dpo", "sigmoid")
    assert (tmp_path / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "model" / "config.json").exists()


def assert_heads_agree(compared, objective, loss_type):
    assert (compared["objective"], compared["loss_type"]) == (objective, loss_type)
    assert compared["largest_loss_difference"] < 1e-5
    for head in ("stock", "fastpref"):
        assert len(compared[head]["losses"]) == 2
        assert all(
            0 < inside < whole
            for inside, whole in zip(
                compared[head]["head_seconds"], compared[head]["step_seconds"], strict=True
            )
        )


def lists_file(directory):
    lists = [
        {"prompt": f"How many figs in {n}?\n", "completions": ["Two.", "Ten figs.", "Figs."]}
        for n in range(18)
    ]
    for n, listed in enumerate(lists):
        listed["rewards"] = [n, 1, 0] if n > 1 else [1, 1, 1]
        if n % 2:
            listed = {name: listed[name][:2] for name in ("completions", "rewards")}
            lists[n].update(listed)
    path = directory / "lists.jsonl"
    path.write_text("\n".join(map(json.dumps, lists)) + "\n")
    return path


@pytest.mark.slow
def test_demo_trains_on_lists_with_both_heads(tmp_path, tiny, capsys):
    data = lists_file(tmp_path)
    results = results_of("--data", data, "--model", tiny, "--objective", "adpo")
    out, _ = capsys.readouterr()
    assert "adpo       training with fastpref.integrations.trl.FastDPOTrainer" in out
    assert "adpo       step 2 of 2" in out
    assert "TRL's DPOTrainer has no loss for adpo; what follows is under its dpo loss" in out
    assert "under TRL's own dpo loss on the best against the worst completion:" in out
    assert results["trainer"] == "fastpref.integrations.trl.FastDPOTrainer"
    assert results["examples"] == {"trained_on": 14, "held_out": 2, "of_equal_rewards": 2}
    assert_heads_agree(results["comparison"], "dpo", "sigmoid")


@pytest.mark.slow
def test_objectives_are_compared_from_the_same_model(tmp_path, tiny, capsys):
    results = results_of(
        "--data", lists_file(tmp_path), "--model", tiny, "--compare", "dpo, madpo,kto,adpo"
    )
    out, _ = capsys.readouterr()
    assert "14 lists to train on, 2 held out, 2 lists of equal rewards left out" in out
    assert out.count("step 2 of 2") == 4 and "largest difference in loss" not in out
    assert list(results["objectives"]) == ["dpo", "madpo", "kto", "adpo"]
    for name, outcome in results["objectives"].items():
        assert f"\n  {name} " in out
        assert ("FastDPOTrainer" in outcome["trainer"]) == (name != "dpo")
        assert len(outcome["losses"]) == 2 and outcome["seconds"] > 0
        assert 0 <= outcome["preferred_share"] <= 1 and outcome["log_ratio_margin"] != 0
    # At the first step the policy is the reference.
    assert results["objectives"]["dpo"]["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert results["objectives"]["kto"]["losses"][0] == pytest.approx(0.5, abs=1e-6)
    assert "comparison" not in results and not (tmp_path / "out" / "loss.png").exists()
