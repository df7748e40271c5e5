# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref demo``: a preference training from end to end, and what fastpref adds."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from ..demo import DemoError, quiet, require_libraries, stay_offline
from ..demo.arithmetic import SHIPPED
from ..demo.data import MIN_PAIRS, Pair, load_pairs, split
from ..demo.recipe import MAX_LENGTH, Recipe, plan

SAMPLES = 3


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small model on preferences with TRL and fastpref, and compare",
        description=(
            "Trains a small language model on preference pairs: a warm-up on both completions, "
            "then preference training through TRL's DPOTrainer scoring with fastpref, measured "
            "before and after on held-out pairs. Then compares fastpref with TRL's own head."
        ),
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help='pairs, one JSON object with "prompt", "chosen" and "rejected" a line '
        "(default: arithmetic problems that come with fastpref)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="start from the transformers model and tokenizer in this directory "
        "(default: a small Llama, built and warmed up here)",
    )
    parser.add_argument(
        "--objective",
        default="dpo",
        metavar="NAME",
        help="an objective of fastpref.objectives (default: dpo)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where the model, results.json and loss.png go (default: demo-output)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps of preference training (default: by the length of the texts)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if it went through, 2 if the input has to be put right first."""
    try:
        _demo(args, Console(sys.stdout))
    except DemoError as error:
        print(f"fastpref demo: {error}", file=sys.stderr)
        return 2
    return 0


class Console:
    """Lines of progress with the time since the start; rewritten in place on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def say(self, label: str, text: str, end: str = "\n") -> None:
        """One line under a label."""
        minutes, seconds = divmod(int(self.seconds), 60)
        print(
            f"{minutes:2}:{seconds:02}  {label:<10} {text}", end=end, file=self.stream, flush=True
        )

    def block(self, lines: Sequence[str]) -> None:
        """Indented lines between blank ones."""
        print("", *(f"  {line}" for line in lines), "", sep="\n", file=self.stream, flush=True)

    def progress(self, label: str) -> "Steps":
        """What a training calls after every step."""
        return Steps(self, label)


class Steps:
    """Shows every step on a terminal, about ten of them in a log, and keeps the losses."""

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label = console, label
        self.losses: list[float] = []

    def __call__(self, step: int, steps: int, loss: float) -> None:
        self.losses.append(loss)
        text = f"step {step:{len(str(steps))}} of {steps}   loss {loss:.4f}"
        last = step == steps
        if self.console.stream.isatty():
            print("\r", end="", file=self.console.stream)
            self.console.say(self.label, text, end="\n" if last else "")
        elif last or step == 1 or step % -(-steps // 10) == 0:
            self.console.say(self.label, text)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the preference training starts from."""

    model: Any
    tokenizer: Any
    start: Path  # where the same model and tokenizer are saved
    recipe: Recipe
    train: list[Pair]
    held_out: list[Pair]


def _demo(args: argparse.Namespace, console: Console) -> None:
    pairs = _checked(args)
    console.say("start", "loading PyTorch, transformers and TRL")
    quiet()
    from ..demo import measure, training

    with training.scored_by("fastpref"):
        prepared = _prepare(args, pairs, console)
        before = _measure(prepared, "before", console)
        losses = _train(args, prepared, console)
        after = _measure(prepared, "after", console)
    _show_samples(prepared.held_out, before["completions"], after["completions"], console)
    results = {
        "data": str(args.data or SHIPPED.name),
        "model": args.model and str(args.model),
        "objective": args.objective,
        "device": str(training.device()),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "pairs": {"trained_on": len(prepared.train), "held_out": len(prepared.held_out)},
        "recipe": asdict(prepared.recipe),
        "before": before,
        "after": after,
        "losses": losses,
        "comparison": _compare(args, prepared, console),
        "seconds": round(console.seconds, 1),
        "memory_peak": measure.memory("VmHWM"),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.say("done", f"the model, results.json and loss.png are in {args.out}")


def _checked(args: argparse.Namespace) -> list[Pair]:
    """The pairs, once all that can be checked before the libraries are loaded is in order."""
    require_libraries()
    stay_offline()
    from ..demo.objective import columns, find

    if args.steps is not None and args.steps < 1:
        raise DemoError(f"--steps {args.steps}: expected at least 1")
    return load_pairs(args.data or SHIPPED, columns(find(args.objective)))


def _prepare(args: argparse.Namespace, pairs: list[Pair], console: Console) -> Prepared:
    """Load the model, or build one and warm it up."""
    import torch

    from ..demo import model as models
    from ..demo import training

    torch.manual_seed(args.seed)
    if args.model is None:
        tokenizer = models.train_tokenizer(pairs, models.VOCABULARY)
        model = models.build_model(tokenizer, models.ModelSize())
    else:
        model, tokenizer = models.load_model(args.model)
    model.to(training.device())
    lengths = training.sequence_lengths(tokenizer, pairs)
    fitting = [(pair, n) for pair, n in zip(pairs, lengths, strict=True) if n <= MAX_LENGTH]
    if len(fitting) < MIN_PAIRS:
        raise DemoError(
            f"{args.data}: only {len(fitting)} of {len(pairs)} pairs have at most {MAX_LENGTH} "
            f"tokens, expected at least {MIN_PAIRS}"
        )
    train, held_out = split([pair for pair, _ in fitting], args.seed)
    recipe = plan(
        [n for _, n in fitting], built=args.model is None, steps=args.steps, seed=args.seed
    )
    left_out = len(pairs) - len(fitting)
    console.say(
        "data",
        f"{args.data or SHIPPED.name}: {len(train)} pairs to train on, {len(held_out)} held out"
        + (f", {left_out} longer than {MAX_LENGTH} tokens left out" if left_out else ""),
    )
    console.say(
        "model",
        f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, vocabulary "
        f"{model.get_output_embeddings().weight.shape[0]}, on {training.device()}"
        + (f", threads: {torch.get_num_threads()}" if training.device().type == "cpu" else ""),
    )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {args.out}: cannot be made: {error.strerror}") from None
    if args.model is not None:
        return Prepared(model, tokenizer, args.model, recipe, train, held_out)
    training.warm_up(model, tokenizer, train, recipe, console.progress("warm-up"))
    models.save(model, tokenizer, args.out / "warmed-up")
    return Prepared(model, tokenizer, args.out / "warmed-up", recipe, train, held_out)


def _measure(prepared: Prepared, label: str, console: Console) -> dict[str, Any]:
    """The share of held-out pairs in the right order, and some completions."""
    from ..demo.training import complete, preferred_share

    model, tokenizer, held_out = prepared.model, prepared.tokenizer, prepared.held_out
    share = preferred_share(model, tokenizer, held_out)
    console.say(
        label,
        f"the chosen completion is the likelier one in {share:.1%} of {len(held_out)} "
        "held-out pairs",
    )
    written = [complete(model, tokenizer, pair) for pair in held_out[:SAMPLES]]
    return {"preferred_share": share, "completions": written}


def _train(args: argparse.Namespace, prepared: Prepared, console: Console) -> list[float]:
    """Train on the preferences, save the model, and return the losses."""
    from ..demo import model as models
    from ..demo.objective import find
    from ..demo.training import preference_trainer

    progress = console.progress(args.objective)
    reference, _ = models.load_model(prepared.start)
    trainer = preference_trainer(
        prepared.model,
        reference,
        prepared.tokenizer,
        prepared.train,
        find(args.objective),
        prepared.recipe,
        directory=args.out,
        progress=progress,
    )
    trainer.train()
    models.save(prepared.model, prepared.tokenizer, args.out / "model")
    return progress.losses


def _show_samples(
    held_out: Sequence[Pair], before: Sequence[str], after: Sequence[str], console: Console
) -> None:
    lines: list[str] = []
    for pair, first, second in zip(held_out, before, after, strict=False):
        texts = {
            "held-out prompt": pair.prompt,
            "chosen": pair.chosen,
            "model before": first,
            "model after": second,
        }
        lines += [
            f"{name:16}{' '.join(text.split()) or '(nothing)'}" for name, text in texts.items()
        ]
        lines.append("")
    console.block(lines[:-1])


def _compare(args: argparse.Namespace, prepared: Prepared, console: Console) -> dict[str, Any]:
    """Run both heads, show the table, draw the losses, and return all that was measured."""
    from ..demo import compare

    recipe = prepared.recipe.to_compare()
    names = {"stock": f"TRL {version('trl')}", "fastpref": "fastpref"}
    results = compare.run(
        prepared.start,
        prepared.train[: recipe.steps * recipe.batch],
        args.objective,
        recipe,
        lambda head: console.progress(names[head]),
    )
    console.block(
        [
            f"{recipe.steps} steps of {recipe.batch} pairs from the same weights, each side in a "
            "process of its own; times of the fastest step:",
            *compare.table(results, names["stock"]),
        ]
    )
    compare.picture(results, names["stock"], args.out / "loss.png")
    return {
        "recipe": asdict(recipe),
        "largest_loss_difference": compare.largest_difference(results),
        **{head: asdict(measured) for head, measured in results.items()},
    }
