# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref bench``: the same work through fastpref and its alternatives, against the
bare matrix products."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..bench import drive, gpu, machine, memory, pictures, scaling
from ..bench import report as reporting
from ..bench.cases import measure
from ..bench.experiment import MODES, Case
from ..bench.suites import SUITES
from ..bench.trainers import runs as trainings
from ..bench.work import IMAGE_VOCABULARIES, MODELS, Shape
from ..bench.worker import Worker
from ..demo import DemoError
from ..demo.data import load
from ..objectives.checks import hint
from ..scoring.products import slow_reason
from .checks import whole, writable
from .progress import Parts, duration, say
from .progress import clear as _clear

DTYPES = ("float32", "bfloat16", "float16")
USUAL_DTYPES = DTYPES[:2]
MEMORY = "memory"
TRAINERS = "trainers"
IMAGES = "images"
SUITE_NAMES = ("cases", "scaling", "gpu")
CASES = (*SUITES, IMAGES)  # what has a shape, a dtype and a mode
USUAL = ("score", "dpo", "divergence", "low-rank", "heads", "denoising", MEMORY, TRAINERS)
MEMORY_TOKENS = (512, 1024, 2048)
MEMORY_BUDGET = 32  # MiB
MOST_THREADS = 1024
ROUNDS = {"cpu": 3, "cuda": 15}
QUICK = Shape(4, 64, 256, 8192)
# H of what has a vocabulary of images, a fraction of theirs.
IMAGE_WIDTH, QUICK_IMAGE_WIDTH = 256, 64
QUICK_IMAGE_LENGTH = 8  # of the largest a row has 184,622 logits


class Read(NamedTuple):
    """By which suites options are read and, of --suite cases, for which of --what."""

    options: tuple[str, ...]
    suites: tuple[str, ...] = SUITE_NAMES
    what: tuple[str, ...] = (*CASES, MEMORY, TRAINERS)
    named: str = ""  # what, in words


# --out is read by all, --report too.
READ = (
    Read(("suite", "device")),
    Read(("seconds", "more"), ("gpu",)),
    Read(("quick", "threads"), ("cases", "scaling")),
    Read(("rounds",), what=CASES, named="but memory and trainers"),
    Read(("what",), ("cases",)),
    Read(("implementation",), ("cases",), (*CASES, MEMORY), "but trainers"),
    Read(
        ("dtype", "mode", "model", "length", "masked", "logits"),
        ("cases",),
        CASES,
        "but memory and trainers",
    ),
    Read(("pairs",), ("cases",), (TRAINERS,), "trainers"),
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench", help="measure fastpref against the alternatives", description=__doc__
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small shape, whatever --model and --length, nothing that compiles and no dtype "
        "that the processor multiplies slowly; under a minute",
    )
    parser.add_argument(
        "--suite",
        choices=SUITE_NAMES,
        default="cases",
        help="cases: what the options below name (default); the others take --rounds, --device, "
        "--out and, but for gpu, --quick and --threads alone. scaling: growth with N, V and H. "
        "gpu: what `make gpu` does, with --device cpu the same on tiny sizes, to try it",
    )
    parser.add_argument(
        "--what",
        choices=(*SUITES, IMAGES, MEMORY, TRAINERS),
        action="append",
        help=f"default: {', '.join(USUAL)} (with --quick not the last); may be repeated, as those "
        f"below. images: ddo at the vocabularies of {', '.join(IMAGE_VOCABULARIES)}, whatever "
        f"--model and --masked, with H={IMAGE_WIDTH}",
    )
    parser.add_argument(
        "--implementation",
        action="append",
        metavar="NAME",
        help='as a table names it, such as "plain torch"; default: all',
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        help="default: the first two, with --quick less what it leaves out",
    )
    parser.add_argument(
        "--mode",
        choices=tuple(MODES),
        action="append",
        help="no gradient, backward to hidden states, backward to both; default: all",
    )
    parser.add_argument(
        "--model", choices=tuple(MODELS), default="small", help="whose head (default: small)"
    )
    parser.add_argument(
        "--length", type=int, default=256, help="positions of each of 8 sequences (default 256)"
    )
    parser.add_argument(
        "--masked",
        type=float,
        default=0.5,
        help="share of positions that are prompt or padding (default 0.5)",
    )
    parser.add_argument(
        "--logits",
        choices=("trained", "random"),
        default="trained",
        help="a softmax with the entropy of a trained model's (default), or of random logits",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="default: cpu; of --suite gpu, cuda"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=None,
        help=f"interleaved rounds (default {ROUNDS['cpu']}, on a GPU {ROUNDS['cuda']})",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        default=None,
        metavar="FILE.jsonl",
        help='of --what trainers: "prompt", "chosen" and "rejected" a line (default: arithmetic)',
    )
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument(
        "--out", type=Path, default=None, help="also write JSON, CSV, Markdown and PNG there"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=None,
        help=f"of --suite gpu: the time that it may take (default {gpu.SECONDS:.0f}, with --more "
        f"{gpu.MORE_SECONDS:.0f})",
    )
    parser.add_argument(
        "--more",
        type=Path,
        default=None,
        metavar="DIR",
        help="of --suite gpu: run what an earlier one left, and add to the report that it wrote",
    )
    parser.add_argument(
        "--report", type=Path, default=None, metavar="FILE.json", help="measure nothing, redraw"
    )
    # By which it is known whether an option was given.
    parser.set_defaults(default_of=parser.get_default)


def run(args: argparse.Namespace) -> int:
    try:
        _check(args)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 2
    if args.report is not None:
        return _redraw(args.report, args.out)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = _device(args)
    if device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no NVIDIA GPU", file=sys.stderr)
        return 1
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    run = _Run(args, device)
    print(machine.headline(run.report["machine"]), flush=True)
    if args.suite == "gpu":
        return run.gpu()
    {"cases": run.cases, "scaling": run.scaling}[args.suite]()
    return 0


def _device(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if args.suite == "gpu" else "cpu")


def _check(args: argparse.Namespace) -> None:
    """All that can be told before anything is measured.

    Raises:
        DemoError: what was given is wrong, and how.
    """
    _check_places(args)
    if args.rounds is not None:
        whole("--rounds", args.rounds, 1)
    if args.threads is not None:
        whole("--threads", args.threads, 1, MOST_THREADS)
    if args.seconds is not None and not args.seconds > 0:
        raise DemoError(f"--seconds must be positive, got {args.seconds}")
    if args.more is not None:
        try:
            drive.earlier(args.more)
        except ValueError as error:
            raise DemoError(str(error)) from None
    if not 0 <= args.masked < 1:
        raise DemoError(f"--masked must be in [0, 1), got {args.masked}")
    whole("--length", args.length, 2)
    shape = _shape(args)
    if shape.completion < 1:
        raise DemoError(
            f"--length must leave a scored position at --masked {args.masked}, got {shape.length}"
        )
    if args.out is not None:
        writable(args.out)
    if args.report is None and args.suite == "cases":
        _check_cases(args)


def _check_places(args: argparse.Namespace) -> None:
    """That every option that was given is read where it was given."""
    chosen = _what(args)
    for read in READ:
        given = [one for one in read.options if getattr(args, one) != args.default_of(one)]
        if not given:
            continue
        subject = " and ".join(f"--{one}" for one in given) + (" is" if len(given) == 1 else " are")
        if args.report is not None:
            raise DemoError(f"{subject} not of --report, which measures nothing and takes --out")
        if args.suite not in read.suites:
            raise DemoError(f"{subject} of --suite {' and '.join(read.suites)}")
        if args.suite == "cases" and not set(chosen) & set(read.what):
            raise DemoError(f"{subject} of --what {read.named}")


def _check_cases(args: argparse.Namespace) -> None:
    if TRAINERS in _what(args):
        try:
            load(args.pairs)
        except DemoError as error:
            raise DemoError(
                '--pairs must be a file of pairs, JSON with "prompt", "chosen" and "rejected" a '
                f"line, got {error}"
            ) from None
    nothing = _nothing(args)
    if nothing is not None:
        raise DemoError(nothing)


def _shape(args: argparse.Namespace) -> Shape:
    if args.quick:
        return replace(QUICK, masked=args.masked)
    width, vocab = MODELS[args.model]
    return Shape(8, args.length, width, vocab, args.masked)


def _nothing(args: argparse.Namespace) -> str | None:
    """Why nothing, or less than was asked for, would be measured."""
    cases = list(_chosen(args))
    memory_too = MEMORY in _what(args)
    if not cases and not memory_too and TRAINERS not in _what(args):
        return f"there is nothing to measure: {', '.join(args.what)} has no such --mode"
    known: set[str] = set()
    for what, mode in {(case.what, case.mode) for case in cases}:
        if SUITES[what].unavailable is None:
            tiny = Case(what, mode, shape=Shape(4, 4, 8, 16))
            known |= {one.name for one in SUITES[what].experiment(tiny).candidates}
    if memory_too:
        known |= set(memory.names(Case("score", memory.MODE), MEMORY_BUDGET, compiling=True))
    unknown = set(args.implementation or ()) - known
    if unknown and known:
        name = sorted(unknown)[0]
        nearest = hint(name, sorted(known))
        names = "; ".join(sorted(known))
        return f"--implementation {name!r} is not known{nearest or '.'} Choose from: {names}"
    return None


@dataclass
class _Run:
    """One run of the command and its report."""

    args: argparse.Namespace
    device: str

    def __post_init__(self) -> None:
        self.rounds: int = self.args.rounds or ROUNDS[self.device]
        self.report: dict[str, Any] = {"machine": machine.describe(self.device)}

    def cases(self) -> None:
        what, compiling = _what(self.args), not self.args.quick
        cases = [(case, compiling) for case in _chosen(self.args)]
        slow = _slow(self.args) if cases else {}
        if slow:
            self.report["left_out"] = slow
            print("\n" + reporting.terminal_left_out(slow), flush=True)
        of_memory = list(self._memory_parts()) if MEMORY in what else []
        to_train = self._to_train() if TRAINERS in what else []
        parts = Parts(len(cases) + len(of_memory) + len(to_train))
        self._measure(cases, parts)
        if MEMORY in what:
            self._memory(of_memory, parts)
        if TRAINERS in what:
            self._trainings(to_train, parts)
        self._write()

    def _memory_parts(self) -> Iterator[tuple[Case, str]]:
        """With the name of what is measured."""
        shape = replace(QUICK, sequences=8) if self.args.quick else Shape(hidden_size=256)
        tokens = MEMORY_TOKENS[:1] if self.args.quick else MEMORY_TOKENS
        for scored in tokens:
            one = replace(shape, length=scored // 4)
            case = Case("score", "trainable head", "float32", one, device=self.device)
            known = memory.names(case, MEMORY_BUDGET, not self.args.quick)
            wanted = self.args.implementation or (memory.QUICK if self.args.quick else known)
            yield from ((case, name) for name in known if name in wanted)

    def _to_train(self) -> list[trainings.Training]:
        if trainings.unavailable() is not None:
            return []
        return list(trainings.trainings(trainings.QUICK if self.args.quick else {}))

    def gpu(self) -> int:
        """0 unless something that was checked is wrong."""
        only, usual = None, gpu.SECONDS
        if self.args.more is not None:
            before, left = drive.earlier(self.args.more)
            only, usual = left, gpu.MORE_SECONDS
            own = self.report["machine"]
            if all(before["machine"].get(key) == own.get(key) for key in ("chip", "torch")):
                self.report = before
            else:
                print(f"a report of its own: {self.args.more} is of {before['machine']['chip']}")
        end = time.monotonic() + (self.args.seconds or usual) - drive.age()
        run = drive.Drive(self.report, self.args.out, end, only)
        rounds = self.args.rounds or gpu.ROUNDS[self.device]

        def progress(text: str) -> None:
            say(f"at most {duration(end - time.monotonic())} left: {text}")

        run.run(gpu.Run(run, self.device, rounds, progress).parts())
        _clear()
        print("\n" + reporting.terminal_summary(self.report))
        for name, why in run.left.items():
            print(f"left: {name}: {why}")
        for path in _tables(self.report, self.args.out) if self.args.out is not None else ():
            print(f"written to {path}")
        return 0 if gpu.passed(self.report) else 1

    def scaling(self) -> None:
        self.report["curves"] = {}
        print(f"growth of forward and backward, float32, from {scaling.BASE}")
        axes = {
            axis: sizes[:2] if self.args.quick else sizes for axis, sizes in scaling.AXES.items()
        }
        parts = Parts(sum(map(len, axes.values())))
        for axis, sizes in axes.items():
            rows = self.report["curves"][axis] = []
            for size in sizes:
                parts.begin(f"{axis}={size}")
                rows.append(scaling.point(axis, size, self.rounds, self.device, parts.detail))
                self._save()
            _clear()
            print("\n" + reporting.terminal_curve(axis, rows), flush=True)
        self._write()

    def _measure(self, cases: Iterable[tuple[Case, bool]], parts: Parts) -> None:
        """The cases, and of each whether to run candidates that compile themselves first."""
        found = self.report["cases"] = []
        worker = Worker()
        run = measure if self.device == "cpu" else worker.measure
        for case, compiling in cases:
            name = f"{case.what}, {case.dtype}, {case.mode}"
            parts.begin(name)
            reason = SUITES[case.what].unavailable
            if reason is not None:
                _clear()
                print(f"\n{name}: not measured, {reason}")
                continue
            # A case that fails, for want of memory above all, must not cost the others.
            try:
                only = self.args.implementation or ()
                row = run(case, self.rounds, parts.detail, only, compiling)
            except Exception as error:
                _clear()
                print(f"\n{name}: not measured, {type(error).__name__}: {error}", flush=True)
                continue
            _clear()
            found.append(row)
            print("\n" + reporting.terminal_case(row), flush=True)
            self._save()
        worker.close()

    def _memory(self, of_memory: Iterable[tuple[Case, str]], parts: Parts) -> None:
        rows = self.report["memory"] = []
        for case, implementation in of_memory:
            name = f"memory of {implementation}, N={case.shape.scored}"
            parts.begin(name)
            try:
                rows.append(memory.measure(case, implementation, MEMORY_BUDGET))
            except Exception as error:
                _clear()
                print(f"{name}: not measured, {error}")
            self._save()
        _clear()
        if rows:
            print("\n" + reporting.terminal_memory(rows), flush=True)

    def _trainings(self, to_train: Iterable[trainings.Training], parts: Parts) -> None:
        rows = self.report["trainings"] = []
        reason = trainings.unavailable()
        if reason is not None:
            print(f"\ntrainers: not measured, {reason}")
            return
        for training in to_train:
            name = f"training of {training.name}"
            parts.begin(name)
            try:
                rows.append(trainings.measure(training, self.args.pairs))
            except RuntimeError as error:
                _clear()
                print(f"{name}: not measured, {error}")
            self._save()
        _clear()
        if rows:
            print("\n" + reporting.terminal_trainings(rows), flush=True)

    def _save(self) -> None:
        """What there is, so that a run that is cut short loses nothing."""
        if self.args.out is not None:
            drive.write(self.args.out / drive.REPORT, self.report)

    def _write(self) -> None:
        self._save()
        if self.args.out is not None:
            print(f"\nwritten to {self.args.out / 'bench.json'}")
            _draw(self.report, self.args.out)


def _what(args: argparse.Namespace) -> Sequence[str]:
    if args.what is not None:
        return list(args.what)
    return [what for what in USUAL if what != TRAINERS or not args.quick]


def _dtypes(args: argparse.Namespace) -> list[str]:
    slow = _slow(args)
    return args.dtype or [name for name in USUAL_DTYPES if name not in slow]


def _slow(args: argparse.Namespace) -> dict[str, str]:
    """The usual dtypes whose products alone would make --quick long, and why."""
    if not args.quick or args.dtype:
        return {}
    device = torch.device(_device(args))
    reasons = {name: slow_reason(getattr(torch, name), device) for name in USUAL_DTYPES}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _chosen(args: argparse.Namespace) -> Iterator[Case]:
    shape = _shape(args)
    suites = [what for what in _what(args) if what in SUITES]
    for what, dtype in itertools.product(suites, _dtypes(args)):
        for mode in args.mode or MODES:
            if mode in SUITES[what].modes:
                yield Case(what, mode, dtype, shape, args.logits, _device(args))
    if IMAGES in _what(args):
        yield from _of_images(args)


def _of_images(args: argparse.Namespace) -> Iterator[Case]:
    """Every token is scored: a class, or a prompt that the head never sees, comes before."""
    rows = Shape(8, args.length, IMAGE_WIDTH, masked=0.0)
    if args.quick:
        rows = replace(rows, sequences=4, length=QUICK_IMAGE_LENGTH, hidden_size=QUICK_IMAGE_WIDTH)
    for vocabulary, dtype in itertools.product(IMAGE_VOCABULARIES.values(), _dtypes(args)):
        shape = replace(rows, vocab_size=vocabulary)
        for mode in args.mode or MODES:
            yield Case("ddo", mode, dtype, shape, args.logits, _device(args))


def _redraw(path: Path, folder: Path | None) -> int:
    """What ``--report`` does."""
    try:
        report = json.loads(path.read_text())
        print(reporting.terminal(report))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _draw(report, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        print(
            f"--report must be a file that --out wrote, got {path}: "
            f"{type(error).__name__}: {error}",
            file=sys.stderr,
        )
        return 2
    return 0


def _draw(report: dict[str, Any], folder: Path) -> None:
    written = _tables(report, folder)
    try:
        written += pictures.draw(report, folder)
    except ImportError as error:
        print(f'no pictures: {error}; install "fastpref[bench]"', file=sys.stderr)
    for path in written:
        print(f"written to {path}")


def _tables(report: dict[str, Any], folder: Path) -> list[Path]:
    if not report.get("cases"):
        return []
    (folder / "bench.csv").write_text(reporting.comma_separated(report))
    (folder / "bench.md").write_text(reporting.markdown(report) + "\n")
    return [folder / "bench.csv", folder / "bench.md"]
