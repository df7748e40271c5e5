# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref env``: it always prints, and fails only with its self-check."""

import argparse
import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpref
from fastpref.cli import env
from fastpref.scoring import backends, products
from fastpref.scoring.backends import unavailable_reason


def run(as_json: bool = False) -> int:
    return env.run(argparse.Namespace(json=as_json))


@pytest.mark.heavy
def test_command_prints_json_that_says_what_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastpref", "env", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [name for name, section in report.items() if "error" in section] == []
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["fastpref"] == fastpref.__version__
    assert report["backends"]["cpu"]["torch"] == "available"
    assert report["backends"]["cpu"]["cpp"] == (unavailable_reason("cpp", "cpu") or "available")
    assert "torch on cpu" in report["self_check"]["max_error"]


@pytest.mark.slow
@pytest.mark.heavy
def test_text_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    sections = ("versions", "libraries", "build", "cpu", "gpus", "backends", "tuning", "trl")
    for heading in (*sections, "environment"):
        assert heading in lines
    assert lines[-1].startswith("self-check: OK")


def test_packages_that_are_absent_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("pytest", "no-such-package-as-this"))
    versions = env._versions()
    assert versions["no-such-package-as-this"] == "not installed"
    assert versions["pytest"] == pytest.__version__


@pytest.mark.heavy
@pytest.mark.parametrize(
    "section, as_json",
    [
        # Each takes seconds, for the sections that are left.
        pytest.param(
            section,
            as_json,
            marks=[] if (section, as_json) == ("cpu", True) else pytest.mark.slow,
        )
        for section in (
            "versions",
            "libraries",
            "build",
            "cpu",
            "gpus",
            "backends",
            "tuning",
            "trl",
        )
        for as_json in (False, True)
    ],
)
def test_a_failing_probe_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], section: str, as_json: bool
) -> None:
    def fail() -> dict[str, Any]:
        raise OSError("out of order")

    monkeypatch.setattr(env, f"_{section}", fail)
    assert run(as_json) == 0
    out = capsys.readouterr().out
    assert "OSError: out of order" in out
    assert "FASTPREF_CPU_CAPABILITY" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the backend runs on CUDA tensors, got cpu"
    monkeypatch.setattr(backends, "unavailable_reason", lambda name, device: reason)
    found = env._backends()["cpu"]
    assert found == {"torch": reason, "cpp": reason} | dict.fromkeys(env.ON_GPUS, "no GPU")
    said = env.render({"gpus": env._gpus(), "environment": {}, "self_check": {"error": "none"}})
    assert said.startswith("gpus\n  no GPU\n")


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_scores_fail_the_self_check(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: float,
    dtype: torch.dtype,
) -> None:
    right = fastpref.linear_logprob

    def skewed(*args: Any, **kwargs: Any) -> fastpref.TokenScores:
        scores = right(*args, **kwargs)
        assert scores.logp is not None
        if args[0].dtype == dtype:
            scores.logp.detach()[-1] += wrong
        return scores

    monkeypatch.setattr(env, "BACKENDS", ("torch",))
    monkeypatch.setattr(env, "SELF_CHECK_DTYPES", {"cpu": ("float32", "bfloat16")})
    assert env._self_check()["ok"]
    assert env._self_check()["max_error"].keys() == {"torch on cpu", "torch on cpu in bfloat16"}
    monkeypatch.setattr(fastpref, "linear_logprob", skewed)
    assert run() == 1
    assert "self-check: FAILED" in capsys.readouterr().out


def test_an_exception_fails_the_self_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> fastpref.TokenScores:
        raise RuntimeError("no scores today")

    monkeypatch.setattr(fastpref, "linear_logprob", fail)
    assert run() == 1
    assert "self-check: FAILED, RuntimeError: no scores today" in capsys.readouterr().out


@pytest.mark.parametrize("reason", [None, "this processor has no bfloat16 instructions"])
def test_how_16_bit_products_run(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    monkeypatch.setattr(products, "_slow_on_this_processor", lambda dtype: reason)
    report = env._cpu()
    for name in ("bfloat16", "float16"):
        expected = f"in float32 blocks: {reason}" if reason else f"in {name}"
        assert report[f"{name} products"] == expected


def test_environment_lists_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREF_CPU_CAPABILITY", "avx2")
    monkeypatch.delenv("MAX_JOBS", raising=False)
    report = env._environment()
    assert report["FASTPREF_CPU_CAPABILITY"]["value"] == "avx2"
    assert report["MAX_JOBS"]["value"] is None


def test_verdicts_are_said_where_they_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTPREF_CACHE_DIR", str(tmp_path))
    assert env._tuning()["verdicts"].startswith(f"{tmp_path};")


def test_environment_knows_every_variable_of_the_sources() -> None:
    root = Path(fastpref.__file__).resolve().parents[1]
    sources = [*root.glob("fastpref/**/*.py"), *root.glob("csrc/**/*.*"), root / "setup.py"]
    if not (root / "setup.py").exists():
        pytest.skip("not run from a checkout")
    text = "\n".join(path.read_text() for path in sources)
    named = set(re.findall(r"FASTPREF_[A-Z_]+", text))
    macros = set(re.findall(r"#define (FASTPREF_[A-Z_]+)", text))
    assert "FASTPREF_CPU_CAPABILITY" in named
    assert named - macros <= {name for name, _, _ in env.VARIABLES}


@pytest.mark.slow
@pytest.mark.heavy
def test_unfollowed_capability_is_explained() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastpref", "env"],
        env={**os.environ, "FASTPREF_CPU_CAPABILITY": "avx9"},
        capture_output=True,
        text=True,
    )
    if "capability " not in done.stdout:
        pytest.skip("fastpref/_C was not built here")
    assert "FASTPREF_CPU_CAPABILITY=avx9 ignored: expected baseline, avx2 or avx512" in done.stdout
    assert done.returncode == 0


def test_module_level_imports_are_of_the_standard_library() -> None:
    tree = ast.parse(Path(env.__file__).read_text())
    names = [
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    ]
    names += [
        node.module or "."
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        if not node.level
    ]
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in tree.body)


def test_says_what_a_patch_of_trl_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    from trl.trainer import utils

    found = env._trl()
    assert found["head"].startswith("DPO, KTO, SFT, GRPO, RLOO, AsyncGRPO")
    assert found["divergence"] == "Distillation" and "full logits" in found["not reached"]
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    assert "does not know this part of TRL" in env._guarded(env._trl)["error"]

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert env._trl() == {"patch()": "TRL is not installed"}
