# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref tune``: checks and times the tiers of scoring on the GPU here (of several,
the first that CUDA_VISIBLE_DEVICES shows), for a head, and stores the verdict that
``backend='auto'`` then follows. Takes about a gigabyte of it, and 90 seconds unless a kernel
hangs."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..demo import DemoError
from ..isolation import Isolated
from ..scoring.backends import verdict, verdict_files
from ..scoring.backends.verdict_files import Record, Verdict
from ..tuning import child, timings
from ..tuning.checks import CHECKS, Setting
from ..tuning.heads import MODELS, Head, from_directory
from ..tuning.judge import Findings, Undecided, judge
from .checks import whole
from .progress import Parts, clear

DEVICE = "cuda"
# The first serves where nothing was tuned.
TIERS = ("rows", "triton")
# float32 is left out: torch's TF32 setting makes other kernels of it.
DTYPES = ("bfloat16", "float16")
PATIENCE = 45.0  # seconds of silence; the longest step compiles kernels


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="check and time the kernels on this GPU, for backend='auto' to choose by",
        description=__doc__,
    )
    head = parser.add_argument_group("whose head (one of the three)")
    head.add_argument("--model", choices=sorted(MODELS), metavar="NAME", help=", ".join(MODELS))
    head.add_argument("--hidden-size", type=int, metavar="H", help="with --vocab-size")
    head.add_argument("--vocab-size", type=int, metavar="V")
    head.add_argument(
        "--from", type=Path, metavar="DIR", dest="directory", help="a model's, with a config.json"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        help=f"of the products; may be repeated (default: {DTYPES[0]})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--show", action="store_true", help="what is stored; measures nothing")
    stored.add_argument("--forget", action="store_true", help="delete all that is stored")


def run(args: argparse.Namespace) -> int:
    """1 where no tier is left, or nothing could be measured."""
    if args.show:
        return _show(args.json)
    if args.forget:
        return _forget(args.json)
    try:
        head = _head(args)
    except (ValueError, DemoError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print(
            f"tune: torch {torch.__version__} finds no NVIDIA GPU; run this where training runs, "
            "with its torch",
            file=sys.stderr,
        )
        return 1
    return _tune(head, args.dtype or list(DTYPES[:1]), args.json)


def _head(args: argparse.Namespace) -> Head:
    sizes = args.hidden_size, args.vocab_size
    ways = args.model is not None, args.directory is not None, sizes != (None, None)
    if sum(ways) != 1 or (ways[2] and None in sizes):
        raise ValueError("give one of --model NAME, --from DIR, or --hidden-size H --vocab-size V")
    if args.model is not None:
        return MODELS[args.model]
    if args.directory is not None:
        try:
            return from_directory(args.directory)
        except ValueError as error:
            raise ValueError(f"--from {args.directory}: {error}") from None
    whole("--hidden-size", args.hidden_size, 1)
    whole("--vocab-size", args.vocab_size, 1)
    return Head(*sizes)


def _tune(head: Head, dtypes: list[str], as_json: bool) -> int:
    key = verdict.key_of(0)
    if not as_json:
        print("fastpref tune: " + ", ".join(f"{key[name]}" for name in ("device", "driver")))
    found: list[Findings] = []
    runner = Isolated(child.serve, PATIENCE)
    # As many where no tier fails: each in every case, and all of them side by side in each mode,
    # without statistics and with.
    parts = Parts(len(dtypes) * (len(CHECKS) * len(TIERS) + 2 * len(timings.MODES)))
    try:
        for dtype in dtypes:
            setting = Setting(DEVICE, dtype, *head)
            findings = judge(setting, TIERS, runner, parts.begin)
            clear()
            found.append(findings)
            if not as_json:
                print(_table(findings), flush=True)
    except Undecided as error:
        clear()
        print(f"tune: {error}", file=sys.stderr)
        return 1
    finally:
        runner.close()
    stored = _store(key, found)
    if as_json:
        print(json.dumps({"key": key, "stored": stored, "findings": list(map(_plain, found))}))
    return 0 if all(one.left for one in found) else 1


def _store(key: verdict_files.Key, found: list[Findings]) -> str | None:
    """The file; None, and a warning, where it cannot be written."""
    verdicts = [one for findings in found for one in findings.verdicts]
    subjects = [one for findings in found for one in findings.subjects]
    try:
        path = verdict_files.record(key, verdicts, instead_of=subjects)
    except OSError as error:
        verdict_files.warn(f"the verdict is not stored: {error}; set {verdict_files.VARIABLE}")
        return None
    print(f"\nstored in {path}", file=sys.stderr)
    return str(path)


def _table(findings: Findings) -> str:
    setting, columns = findings.setting, timings.columns(findings.setting)
    lines = [
        "",
        f"{setting.dtype}, H={setting.hidden_size}, V={setting.vocab_size} "
        f"(timed: N={timings.ROWS}, V={columns}; "
        f"at most {findings.peak / 2**20:.0f} MiB of the device)",
        f"  {'case':<36}{'tier':<10}{'error':>10}{'allowed':>10}{'ms':>10}",
    ]
    for case, errors in findings.errors.items():
        for tier in findings.tiers:
            if tier in errors:
                one = errors[tier]
                wrong = "" if one.fine else f"  WRONG, {one.quantity}"
                lines.append(
                    f"  {case:<36}{tier:<10}{one.error:>10.1e}{one.allowed:>10.1e}{'':>10}{wrong}"
                )
            elif findings.failed_in.get(tier) == case:
                lines.append(f"  {case:<36}{tier:<10}  {findings.left_out[tier]}")
    for heavy, times in findings.times.items():
        for mode, row in times.items():
            name = f"{mode}{', with statistics' if heavy else ''}"
            for tier, timing in row.items():
                lines.append(f"  {name:<36}{tier:<10}{'':>20}{timing.seconds * 1e3:>10.3f}")
    lines += [
        f"  {tier} is left out, in {findings.failed_in[tier]!r}: {reason}"
        for tier, reason in findings.left_out.items()
    ]
    lines += [f"  verdict: {verdict.summary(one)}" for one in findings.verdicts]
    if not findings.left:
        lines.append(
            "  no tier is left: train with ScoringOptions(backend='torch'), and report this"
        )
    return "\n".join(lines)


def _plain(findings: Findings) -> dict[str, Any]:
    return {
        "setting": findings.setting._asdict(),
        "errors": {
            case: {tier: one._asdict() for tier, one in errors.items()}
            for case, errors in findings.errors.items()
        },
        "left_out": {
            tier: {"in": findings.failed_in[tier], "reason": reason}
            for tier, reason in findings.left_out.items()
        },
        "peak_bytes": findings.peak,
        "verdicts": [asdict(one) for one in findings.verdicts],
    }


def _show(as_json: bool) -> int:
    records = verdict_files.everything()
    if as_json:
        print(json.dumps([asdict(one) for one in records], indent=1))
        return 0
    print(verdict.describe())
    for one in records:
        print(_paragraph(one))
    return 0


def _paragraph(record: Record) -> str:
    what = ", ".join(f"{name} {value[:12]}" for name, value in record.key.items())
    return "\n".join(["", what, *(f"  {_line(one)}" for one in record.verdicts)])


def _line(one: Verdict) -> str:
    times = "; ".join(
        f"{mode} " + ", ".join(f"{tier} {ms:.3f} ms" for tier, ms in row.items())
        for mode, row in one.milliseconds.items()
    )
    return f"{verdict.summary(one)} ({times})"


def _forget(as_json: bool) -> int:
    try:
        gone = [str(path) for path in verdict_files.forget()]
    except OSError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(gone))
    else:
        print("\n".join(f"deleted {path}" for path in gone) or "there is nothing to forget")
    return 0
