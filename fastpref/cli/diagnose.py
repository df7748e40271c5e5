# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref diagnose``: a policy beside its reference on pairs, as a report."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..demo import DemoError, stay_offline
from ..demo.console import Console
from .checks import whole, writable

LIBRARIES = ("transformers", "matplotlib")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "diagnose",
        help="what a preference training has done to a model, as a report",
        description=(
            "Scores pairs with a policy and with the model it was trained from, and writes a "
            "folder: report.json, pictures, and index.html with the responses coloured by credit. "
            "Likelihood displacement, CHES, order of margins, length bias, contraction and "
            "transport by layer; with --samples entropy of the differential information too."
        ),
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the policy")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="DIR", help="what it was trained from"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='one JSON object a line, with the texts "prompt", "chosen" and "rejected"',
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("diagnosis"),
        metavar="DIR",
        help="the report's folder (default: diagnosis)",
    )
    parser.add_argument("--limit", type=int, default=256, metavar="N", help="pairs (default: 256)")
    parser.add_argument("--beta", type=float, default=0.1, help="of rewards (default: 0.1)")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="responses at a time (default: 8)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="K",
        help="sample K responses of the policy to each of the first eight prompts (default: none)",
    )


def run(args: argparse.Namespace) -> int:
    """0 if the report is written, 2 if the input has to be put right first."""
    try:
        _diagnose(args, Console(sys.stdout))
    except DemoError as error:
        print(f"fastpref diagnose: {error}", file=sys.stderr)
        return 2
    return 0


def _diagnose(args: argparse.Namespace, console: Console) -> None:
    _check(args)
    stay_offline()
    from ..demo.data import load

    console.say("data", f"reading {args.data}")
    examples = load(args.data, least=1).pairs().examples[: args.limit]
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    from ..demo.model import check_directory, load_model
    from ..demo.tokens import encode
    from ..diagnostics.report import NotFinite, Pair, Settings, diagnose

    check_directory(args.model)
    check_directory(args.reference, "--reference")
    console.say("models", "loading both")
    policy, tokenizer = load_model(args.model)
    reference, _ = load_model(args.reference, "--reference")
    sizes = [one.get_output_embeddings().weight.shape[0] for one in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise DemoError(
            f"--reference {args.reference}: a vocabulary of {sizes[1]}, expected that of --model, "
            f"{sizes[0]}: the model that it was trained from"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = [Pair(one.prompt, *one.completions) for one in encode(tokenizer, examples)]
    settings = Settings(beta=args.beta, batch_size=args.batch_size, samples=args.samples)
    given = policy.to(device), reference.to(device), tokenizer, pairs, args.out, settings
    try:
        found = diagnose(*given, _Progress(console))
    except NotFinite as error:
        raise DemoError(str(error)) from None
    moved = found["displacement"]
    console.say(
        "found",
        f"accuracy {found['accuracy']:.1%}; log-probability of chosen responses "
        f"{-moved['chosen_drop']:+.3g} nats, of rejected ones {-moved['rejected_drop']:+.3g}",
    )
    console.say("done", f"open {args.out / 'index.html'}")


class _Progress:
    """Every batch on a terminal, the end of each part in a log."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, what: str, done: int, total: int) -> None:
        terminal, last = self.console.stream.isatty(), done == total
        if terminal:
            print("\r\033[K", end="", file=self.console.stream)
        if terminal or last:
            text = f"{what}: {done} of {total}" if total > 1 else what
            self.console.say("measuring", text, end="\n" if last else "")


def _check(args: argparse.Namespace) -> None:
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise DemoError(f'needs {", ".join(missing)}: pip install "fastpref[demo]"')
    whole("--limit", args.limit, 1)
    whole("--batch-size", args.batch_size, 1)
    whole("--samples", args.samples, 0)
    if not 0 < args.beta < float("inf"):
        raise DemoError(f"--beta {args.beta}: expected a number greater than 0")
    writable(args.out)
