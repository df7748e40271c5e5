# SPDX-License-Identifier: Apache-2.0
"""``diagnose``: two models of a directory, a file of pairs, and the folder that comes out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref.cli import main as cli
from tests.diagnostics.plain import centred_similarity, spearman
from tests.diagnostics.tiny import moved_from, plain_logps

PAIRS = [
    {"prompt": f"{a} plus {b} is", "chosen": f" {a + b}.", "rejected": f" {a * b + 1}, I think <b>"}
    for a, b in ((1, 2), (3, 4), (5, 6), (2, 9), (7, 1), (4, 4))
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from fastpref.demo.data import Example
    from fastpref.demo.model import ModelSize, build_model, save, train_tokenizer

    folder = tmp_path_factory.mktemp("diagnose")
    examples = [Example.pair(one["prompt"], one["chosen"], one["rejected"]) for one in PAIRS]
    tokenizer = train_tokenizer(examples, 400)
    torch.manual_seed(0)
    size = ModelSize(vocabulary=400, hidden=16, layers=2, heads=2, positions=64)
    reference = build_model(tokenizer, size)
    policy = moved_from(reference, 0.05)
    save(policy, tokenizer, folder / "policy")
    save(reference, tokenizer, folder / "reference")
    lines = [json.dumps(one) for one in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return {"folder": folder, "policy": policy, "reference": reference, "tokenizer": tokenizer}


def run(folder: Path, out: Path, *more: str) -> int:
    arguments = ["--model", str(folder / "policy"), "--reference", str(folder / "reference")]
    arguments += ["--data", str(folder / "pairs.jsonl"), "--out", str(out), *more]
    return cli.main(["diagnose", *arguments])


@pytest.mark.heavy
def test_a_report(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(given["folder"], tmp_path / "out", "--samples", "3", "--beta", "0.5") == 0
    said = capsys.readouterr().out
    assert "pairs under the policy: 6 of 6" in said and "index.html" in said
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    ratios: dict[str, list[float]] = {"chosen": [], "rejected": []}
    tokenizer = given["tokenizer"]
    for pair in PAIRS:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        for kind, values in ratios.items():
            ids = torch.tensor([tokenizer(pair["prompt"] + pair[kind] + "<eos>")["input_ids"]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            sums = [plain_logps(given[name], batch).sum() for name in ("policy", "reference")]
            values.append(float(sums[0] - sums[1]))
    for kind, values in ratios.items():
        assert found["log_ratios"][kind] == pytest.approx(values, rel=1e-3, abs=1e-3)
    assert found["displacement"]["chosen_drop"] == pytest.approx(
        -sum(ratios["chosen"]) / len(PAIRS), rel=1e-3, abs=1e-3
    )
    margins = [0.5 * (a - b) for a, b in zip(ratios["chosen"], ratios["rejected"], strict=True)]
    assert found["margins"] == pytest.approx(margins, rel=1e-3, abs=1e-3)
    assert len(found["did"]["entropy"]) == len(PAIRS)
    assert all(1 <= one <= 3.001 for one in found["did"]["effective_samples"])
    assert len(found["spinal"]["policy"]["transport"]) == 2
    page = (tmp_path / "out" / "index.html").read_text()
    pictures = re.findall(r'src="(.*?)"', page)
    assert len(pictures) == 3 and "I think &lt;b&gt;" in re.sub("</?span.*?>", "", page)
    for name in [*pictures, "credit-1-chosen.png", "credit-3-rejected.png"]:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    rewards = [float(one) for one in re.findall(r"<h3>chosen, reward (\S+)</h3>", page)]
    assert rewards == pytest.approx([0.5 * one for one in ratios["chosen"][:3]], rel=1e-2, abs=1e-3)


@pytest.mark.heavy
def test_numbers_of_hidden_states_lengths_and_samples(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by its definition; what is sampled is written here, one response ends early."""
    tokenizer, samples = given["tokenizer"], []
    asked: dict[str, Any] = {}

    def generate(self: Any, input_ids: Tensor, **options: Any) -> Tensor:
        asked.update(options)
        generator = torch.Generator().manual_seed(input_ids.shape[1])
        written = torch.randint(5, 300, (2, 4), generator=generator)
        written[0, 2] = tokenizer.eos_token_id
        rows = torch.cat([input_ids.expand(2, -1), written], 1)
        samples.append((input_ids.shape[1], rows))
        return rows

    monkeypatch.setattr(type(given["policy"]), "generate", generate)
    assert run(given["folder"], tmp_path, "--samples", "2") == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert (asked["do_sample"], asked["top_k"], asked["top_p"]) == (True, 0, 1.0)
    assert asked["temperature"] == 1.0 and asked["num_return_sequences"] == 2
    rises = []
    for at, (start, rows) in enumerate(samples):
        sums = {}
        for name in ("policy", "reference"):
            labels = rows.clone()
            labels[:, :start], labels[0, start + 3 :] = -100, -100
            whole = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}
            sums[name] = plain_logps(given[name], whole).sum(1).tolist()
        weights = [math.exp(-one + max(sums["reference"])) for one in sums["reference"]]
        shares = [one / sum(weights) for one in weights]
        ratios = [a - b for a, b in zip(sums["policy"], sums["reference"], strict=True)]
        total = math.log(sum(weights) / 2) - max(sums["reference"])
        entropy = total - sum(a * b for a, b in zip(shares, ratios, strict=True))
        assert found["did"]["entropy"][at] == pytest.approx(entropy, rel=1e-3, abs=1e-3)
        effective = 1 / sum(one**2 for one in shares)
        assert found["did"]["effective_samples"][at] == pytest.approx(effective, rel=1e-3)
        rises += ratios
    assert found["displacement"]["dispersion"] == pytest.approx(
        sum(rises) / len(rises), rel=1e-3, abs=1e-3
    )
    lengths: dict[str, list[int]] = {"chosen": [], "rejected": []}
    sums, similar = {"policy": [], "reference": []}, []  # type: ignore[var-annotated]
    for pair in PAIRS:
        prompt = len(tokenizer(pair["prompt"])["input_ids"])
        ids = {
            kind: tokenizer(pair["prompt"] + pair[kind] + "<eos>")["input_ids"] for kind in lengths
        }
        longest, batch = max(map(len, ids.values())), {}
        for kind, one in ids.items():
            lengths[kind].append(len(one) - prompt)
            padded = one + [tokenizer.pad_token_id] * (longest - len(one))
            marks = [1] * len(one) + [0] * (longest - len(one))
            labels = [-100] * prompt + one[prompt:] + [-100] * (longest - len(one))
            parts = {"input_ids": padded, "attention_mask": marks, "labels": labels}
            for name, values in parts.items():
                batch.setdefault(name, []).append(values)
        rows = {name: torch.tensor(values) for name, values in batch.items()}
        for name, margins in sums.items():
            chosen, rejected = plain_logps(given[name], rows).sum(1).tolist()
            margins.append(chosen - rejected)
        similar += centred_similarity(given["reference"], rows)
    assert found["ches"] == pytest.approx(similar, rel=1e-3, abs=1e-4)
    assert found["lengths"] == lengths
    order = spearman(sums["reference"], sums["policy"])
    assert found["log_margin_order"] == pytest.approx(order)
    margins = [0.1 * (a - b) for a, b in zip(sums["policy"], sums["reference"], strict=True)]
    more = [float(a - b) for a, b in zip(*lengths.values(), strict=True)]
    slope = float(np.polyfit(more, margins, 1)[0])
    assert found["length_bias"]["slope"] == pytest.approx(slope, rel=1e-2, abs=1e-4)


@pytest.mark.heavy
def test_a_model_without_finite_numbers(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastpref.demo.model import save

    broken = moved_from(given["policy"], 0.0)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(torch.nan)
    save(broken, given["tokenizer"], tmp_path / "broken")
    assert run(given["folder"], tmp_path / "out", "--model", str(tmp_path / "broken")) == 2
    said = capsys.readouterr().err
    assert "pairs under the policy: log-probabilities must be finite, got nan of pair 1" in said


@pytest.mark.heavy
def test_of_a_model_beside_itself(given: dict[str, Any], tmp_path: Path) -> None:
    """Nothing has moved, and JSON has no NaN for what cannot be measured."""
    folder = given["folder"]
    arguments = ["--model", str(folder / "policy"), "--reference", str(folder / "policy")]
    arguments += ["--data", str(folder / "pairs.jsonl"), "--out", str(tmp_path), "--limit", "2"]
    assert cli.main(["diagnose", *arguments]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["pairs"] == 2 and found["did"] is None
    assert found["displacement"]["chosen_drop"] == 0
    assert found["log_margin_order"] == pytest.approx(1)
    assert found["length_bias"]["correlation"] is None or math.isfinite(
        found["length_bias"]["correlation"]
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--limit", "0"), "--limit must be at least 1, got 0"),
        (("--samples", "-1"), "--samples must be at least 0, got -1"),
        (("--batch-size", str(2**31)), "--batch-size must be at most 2147483647, got 2147483648"),
        (("--beta", "nan"), "--beta nan: expected a number greater than 0"),
        (("--beta", "0"), "--beta 0.0: expected a number greater than 0"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
        (("--reference", "nowhere"), "--reference nowhere: is not a directory"),
    ],
)
def test_misuse(
    given: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    said: str,
) -> None:
    out = tmp_path / "out"
    assert run(given["folder"], out, *more) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "loading" not in printed.out
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("pairs.jsonl", "pairs.jsonl: File exists"),
        pytest.param(
            "/proc",
            "--out must be a folder that can be written to, got /proc: ",
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="has no /proc"),
        ),
    ],
)
def test_a_folder_that_is_none(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str], out: str, said: str
) -> None:
    """Known before anything is read."""
    assert run(given["folder"], given["folder"] / out, "--data", "nowhere.jsonl") == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == ""
