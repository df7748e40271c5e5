# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref bench``: forward and backward of the head, with DPO or with a divergence.

Against the bare products of the scored tokens and against the alternatives; then peak memory
against its formula.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench import choice, gpu, scaling
from ..bench import report as reporting
from ..bench.implementations import Implementation
from ..bench.memory import measure
from ..bench.suites import LIMIT, OVERFLOWING, SUITES, Suite
from ..bench.timing import interleave
from ..bench.work import MODELS, Shape, Work, make_work

DTYPES = ("float32", "bfloat16")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="measure fastpref against the alternatives")
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument(
        "--suite", choices=("cpu", "scaling", "gpu", "choice"), default="cpu", help="default: cpu"
    )
    parser.add_argument(
        "--what",
        choices=tuple(SUITES),
        action="append",
        help="of the cpu suite; default: score, dpo, divergence",
    )
    parser.add_argument(
        "--model", choices=tuple(MODELS), default="small", help="whose head (default: small)"
    )
    parser.add_argument(
        "--masked", type=float, default=0.5, help="share of prompt tokens (default 0.5)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument(
        "--out", type=Path, default=None, help="also write JSON, CSV and pictures to this folder"
    )
    parser.add_argument(
        "--report", type=Path, default=None, metavar="FILE.json", help="measure nothing, redraw"
    )


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        print(f"--rounds must be at least 1, got {args.rounds}", file=sys.stderr)
        return 2
    if not 0 <= args.masked < 1:
        print(f"--masked must be in [0, 1), got {args.masked}", file=sys.stderr)
        return 2
    if args.report is not None:
        return _redraw(args.report, args.out)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.suite == "scaling":
        return _run_scaling(args)
    if args.suite != "cpu":
        return _run_gpu(args)
    quick = Shape(4, 64, 256, 8192, args.masked)
    shape = quick if args.quick else Shape.of_model(args.model, args.masked)
    report: dict[str, Any] = {"machine": _machine(), "shape": vars(shape), "cases": []}
    print(reporting.headline(report))
    for what in args.what or (name for name, suite in SUITES.items() if suite.usual):
        for dtype in args.dtype or DTYPES:
            for trainable in (True, False):
                case = _case(what, shape, dtype, trainable, args.rounds)
                report["cases"].append(case)
                print("\n" + reporting.terminal_case(case), flush=True)
    report["memory"] = _memory(args.quick)
    print("\n" + reporting.terminal_memory(report["memory"]))
    _write(args.out, "bench.json", report)
    if args.out is not None:
        _draw(report, args.out)
    return 0


def _redraw(path: Path, folder: Path | None) -> int:
    """What ``--report`` does."""
    try:
        report = json.loads(path.read_text())
        said = reporting.terminal(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"--report must be a file that --out wrote, got {path}: {error}", file=sys.stderr)
        return 2
    print(said)
    if folder is not None:
        _draw(report, folder)
    return 0


def _draw(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.csv").write_text(reporting.comma_separated(report))
    (folder / "bench.md").write_text(reporting.markdown(report) + "\n")
    written = [folder / "bench.csv", folder / "bench.md"]
    try:
        written += reporting.pictures(report, folder)
    except ImportError as error:
        print(f'no pictures: {error}; install "fastpref[bench]"', file=sys.stderr)
    for path in written:
        print(f"written to {path}")


def _run_scaling(args: argparse.Namespace) -> int:
    report: dict[str, Any] = {"machine": _machine(), "curves": {}}
    print(f"fastpref bench: growth of forward and backward, float32, {scaling.BASE}")
    for axis in scaling.AXES:
        sizes = scaling.AXES[axis][:2] if args.quick else scaling.AXES[axis]
        rows = scaling.curve(axis, args.rounds, _progress, sizes)
        _progress("")
        report["curves"][axis] = rows
        print("\n" + scaling.table(axis, rows), flush=True)
    _write(args.out, "scaling.json", report)
    return 0


def _run_gpu(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(
            f"--suite {args.suite}: torch {torch.__version__} finds no NVIDIA GPU", file=sys.stderr
        )
        return 1
    machine = gpu_machine()
    print("fastpref bench: " + ", ".join(f"{name} {value}" for name, value in machine.items()))
    if args.suite == "choice":
        major, minor = torch.cuda.get_device_capability()
        wanted = itertools.islice(choice.sizes(), 2 if args.quick else None)
        table = choice.measure(wanted, 10 * major + minor, "cuda", args.rounds, print)
        _write(args.out, "choice.json", table)
        return 0
    shapes = (Shape(4, 256, 512, 32000, masked=0),) if args.quick else gpu.SHAPES
    cases = gpu.suite(shapes, "cuda", args.rounds, lambda line: print(line, flush=True))
    _write(args.out, "gpu.json", {"machine": machine, "cases": cases})
    return 0


def gpu_machine() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "chip": torch.cuda.get_device_name(),
        "driver": driver.strip().splitlines()[0],
        "torch": torch.__version__,
        "triton": _version("triton"),
        "trl": _version("trl"),
        "liger-kernel": _version("liger-kernel"),
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _write(folder: Path | None, name: str, report: Any) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {folder / name}")


def _machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _progress(text: str) -> None:
    """One line that rewrites itself on a terminal; nothing into a file."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _case(what: str, shape: Shape, dtype: str, trainable: bool, rounds: int) -> dict[str, Any]:
    suite = SUITES[what]
    title = reporting.title({"what": what, "dtype": dtype, "trainable": trainable})
    work = make_work(shape, getattr(torch, dtype))
    errors, candidates = {}, {LIMIT: lambda: suite.products(work, trainable)}
    skipped = {}
    exact = _step(_plain(suite), work.to(torch.float64), trainable)
    for one in suite.implementations():
        if one.unavailable is not None:
            skipped[one.name] = one.unavailable
            continue
        _progress(f"{title}: checking {one.name}")
        # A peer's compiler or kernel may fail on this machine; its row then says why.
        try:
            errors[one.name] = _error(_step(one, work, trainable), exact)
        except Exception as error:
            skipped[one.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        candidates[one.name] = _runner(one, work, trainable)
        if one.name == "fastpref" and suite.overflows:
            overflowing = make_work(shape, getattr(torch, dtype), overflowing=0.01)
            candidates[OVERFLOWING] = _runner(one, overflowing, trainable)
            candidates[OVERFLOWING]()
    candidates[LIMIT]()
    timings = interleave(candidates, LIMIT, rounds, lambda text: _progress(f"{title}: {text}"))
    _progress("")
    rows = {name: vars(timing) | {"error": errors.get(name)} for name, timing in timings.items()}
    return {
        "what": what,
        "dtype": dtype,
        "trainable": trainable,
        "timings": rows,
        "skipped": skipped,
    }


def _plain(suite: Suite) -> Implementation:
    return next(one for one in suite.implementations() if one.name == "plain torch")


def _step(one: Implementation, work: Work, trainable: bool) -> list[Tensor]:
    """Gradients of hidden (scored rows) and, if trainable, of the weight."""
    hidden, weight = work.leaves(trainable)
    one.loss(work, hidden, weight).backward()
    grads = [hidden.grad] + ([weight.grad] if trainable else [])
    return [grad for grad in grads if grad is not None]


def _runner(one: Implementation, work: Work, trainable: bool) -> Any:
    def step() -> None:
        _step(one, work, trainable)

    return step


def _error(grads: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative root-mean-square error of a gradient."""
    pairs = zip(grads, exact, strict=True)
    return max(float((got.double() - want).norm() / want.norm()) for got, want in pairs)


def _memory(quick: bool) -> list[dict[str, Any]]:
    length = 128 if quick else 512
    shape = Shape(8, length, 256, 8192 if quick else 32000)
    longer = Shape(8, 2 * length, shape.hidden_size, shape.vocab_size)
    budget = (4 if quick else 32) << 20
    calls: list[tuple[Shape, str, int | None]] = [(shape, "auto", None)]
    calls += [(one, "recompute", budget) for one in (shape, longer)]
    calls += [(one, "batches", 3 * budget) for one in (shape, longer)]
    rows = []
    for one, schedule, limit in calls:
        _progress(f"memory: {schedule}, N={one.scored}")
        row = measure(one, "float32", schedule, limit)
        _progress("")
        rows.append(row | {"budget": None if limit is None else limit >> 20})
    return rows
