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
from typing import Any

from ..demo import DemoError, quiet, require_libraries, stay_offline
from ..demo.console import Console
from ..demo.data import MIN_EXAMPLES, Example, Preferences, load, named, split
from ..demo.recipe import MAX_LENGTH, Recipe, plan
from ..objectives import Objective
from .checks import SEEDS, whole, writable

SAMPLES = 3


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small model on preferences with TRL and fastpref, and compare",
        description=(
            "Trains a small language model on preferences: a warm-up on both completions, then "
            "preference training with TRL's DPOTrainer scoring with fastpref, or FastDPOTrainer "
            "for objectives that it has no loss for, measured before and after on held-out pairs. "
            "Then compares fastpref with TRL's own head under a loss of TRL's: the objective, or "
            "DPO where TRL has not the objective. With --compare instead several objectives with "
            "each other; with --visual, a flow that makes images, and a picture before and after."
        ),
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help='one JSON object a line: pairs with "prompt", "chosen" and "rejected", or lists with '
        '"prompt", "completions" and "rewards"; what an objective needs of a pair, such as '
        '"reward_margin", is a further field '
        "(default: arithmetic problems that come with fastpref)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="start from the transformers model and tokenizer in this directory "
        "(default: a small Llama, built and warmed up here)",
    )
    objective = parser.add_mutually_exclusive_group()
    objective.add_argument(
        "--objective",
        metavar="NAME",
        help="an objective of fastpref.objectives (default: dpo)",
    )
    objective.add_argument(
        "--compare",
        metavar="NAME,NAME,...",
        help="train with each of these objectives from the same model and show what became of it",
    )
    objective.add_argument(
        "--visual",
        action="store_true",
        help="train a small flow to make images that are preferred instead, with Flow-DPO; needs "
        "neither transformers nor TRL",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where the model, results.json and loss.png go; with --compare results.json alone "
        "and the model they all start from, with --visual results.json and samples.png "
        "(default: demo-output)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps of preference training (default: by the length of the texts, or of images 50)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if it went through, 2 if the input has to be put right first."""
    try:
        if args.steps is not None:
            whole("--steps", args.steps, 1)
        whole("--seed", args.seed, 0, SEEDS)
        writable(args.out)
        (_visual if args.visual else _demo)(args, Console(sys.stdout))
    except DemoError as error:
        print(f"fastpref demo: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the preference training starts from."""

    model: Any
    tokenizer: Any
    start: Path  # where the same model and tokenizer are saved
    recipe: Recipe
    train: list[Example]
    held_out: list[Example]


def _what_happens(args: argparse.Namespace) -> str:
    """What is done and how long it takes, of the demo as it comes."""
    if args.compare is not None:
        return "a training in TRL with each objective, from the same model"
    if args.model is not None or args.data is not None or args.steps is not None:
        return "a preference training in TRL, then its head beside fastpref's"
    return (
        "a small model learns to write answers (half of the time), then in TRL which are "
        "preferred, then TRL's head beside fastpref's: about three minutes on two cores"
    )


def _demo(args: argparse.Namespace, console: Console) -> None:
    chosen, preferences = _checked(args)
    console.say("start", _what_happens(args))
    quiet()
    from ..demo import measure, settings, training

    with training.scored_by("fastpref"):
        prepared = _prepare(args, preferences, console)
        if args.compare is None:
            found = _train_one(args, chosen[0], prepared, console)
        else:
            found = _train_each(args, chosen, prepared, console)
    results = {
        "data": named(args.data),
        "model": args.model and str(args.model),
        "device": str(settings.device()),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "examples": {
            "trained_on": len(prepared.train),
            "held_out": len(prepared.held_out),
            "of_equal_rewards": preferences.undecided,
        },
        "recipe": asdict(prepared.recipe),
        **found,
        "seconds": round(console.seconds, 1),
        "memory_peak": measure.memory("VmHWM"),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    made = "the model, results.json and loss.png are" if args.compare is None else "results.json is"
    console.say("done", f"{made} in {args.out}")


def _visual(args: argparse.Namespace, console: Console) -> None:
    from ..demo import visual

    for name in ("data", "model"):
        given = getattr(args, name)
        if given is not None:
            raise DemoError(f"--{name} {given}: --visual makes its own; leave one of the two out")
    visual.require_matplotlib()
    recipe = visual.Recipe() if args.steps is None else visual.Recipe(steps=args.steps)
    visual.run(args.out, recipe, args.seed, console)


def _checked(args: argparse.Namespace) -> tuple[list[Objective], Preferences]:
    """The objectives and the data, once all that can be checked before the libraries are loaded
    is in order."""
    require_libraries()
    stay_offline()
    from ..demo.objective import columns, find

    chosen = [find(name) for name in _names(args)]
    preferences = load(args.data, columns(*chosen))
    lists = any(objective.unit == "list" for objective in chosen)
    return chosen, preferences if lists else preferences.pairs()


def _names(args: argparse.Namespace) -> list[str]:
    """Of the objectives, as they were given."""
    if args.compare is None:
        option, names = "--objective", ["dpo" if args.objective is None else args.objective.strip()]
    else:
        option, names = "--compare", [name.strip() for name in args.compare.split(",")]
    if "" in names:
        raise DemoError(f"{option} has an empty name, got {getattr(args, option[2:])!r}")
    if args.compare is not None and len(names) < 2:
        raise DemoError(
            f"--compare must be two names or more, got {names[0]!r} alone; --objective trains with "
            "one"
        )
    if len(set(names)) < len(names):
        raise DemoError(f"--compare must name each objective once, got {args.compare!r}")
    return names


def _prepare(args: argparse.Namespace, preferences: Preferences, console: Console) -> Prepared:
    """Load the model, or build one and warm it up."""
    import torch

    from ..demo import model as models
    from ..demo import settings, training
    from ..demo.tokens import sequence_lengths

    torch.manual_seed(args.seed)
    examples = preferences.examples
    if args.model is None:
        tokenizer = models.train_tokenizer(examples, models.VOCABULARY)
        model = models.build_model(tokenizer, models.ModelSize())
    else:
        model, tokenizer = models.load_model(args.model)
    model.to(settings.device())
    lengths = sequence_lengths(tokenizer, examples)
    fitting = [(e, n) for e, n in zip(examples, lengths, strict=True) if n <= MAX_LENGTH]
    kind = "lists" if any(len(example.completions) > 2 for example in examples) else "pairs"
    if len(fitting) < MIN_EXAMPLES:
        raise DemoError(
            f"{named(args.data)}: only {len(fitting)} of {len(examples)} {kind} have at most "
            f"{MAX_LENGTH} tokens, expected at least {MIN_EXAMPLES}"
        )
    train, held_out = split([example for example, _ in fitting], args.seed)
    recipe = plan(
        [n for _, n in fitting], built=args.model is None, steps=args.steps, seed=args.seed
    )
    left_out = {
        "lists of equal rewards": preferences.undecided,
        f"longer than {MAX_LENGTH} tokens": len(examples) - len(fitting),
    }
    console.say(
        "data",
        f"{named(args.data)}: {len(train)} {kind} to train on, {len(held_out)} held out"
        + "".join(f", {count} {what} left out" for what, count in left_out.items() if count),
    )
    console.say(
        "model",
        f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, vocabulary "
        f"{model.get_output_embeddings().weight.shape[0]}, on {settings.device()}"
        + (f", threads: {torch.get_num_threads()}" if settings.device().type == "cpu" else ""),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model is not None:
        return Prepared(model, tokenizer, args.model, recipe, train, held_out)
    training.warm_up(model, tokenizer, train, recipe, console.progress("warm-up"))
    models.save(model, tokenizer, args.out / "warmed-up")
    return Prepared(model, tokenizer, args.out / "warmed-up", recipe, train, held_out)


def _train_one(
    args: argparse.Namespace, objective: Objective, prepared: Prepared, console: Console
) -> dict[str, Any]:
    """Train with one objective, show what changed, and compare the two heads."""
    from ..demo import model as models
    from ..demo.objective import trainer_name

    held_out = prepared.held_out
    before = _measure(prepared, "before", console)
    losses = _train(objective, prepared.model, prepared, args.out, console)
    models.save(prepared.model, prepared.tokenizer, args.out / "model")
    after = _measure(prepared, "after", console)
    _show_samples(held_out, before["completions"], after["completions"], console)
    return {
        "objective": objective.name,
        "trainer": trainer_name(objective),
        "before": before,
        "after": after,
        "losses": losses,
        "comparison": _compare_heads(args, objective, prepared, console),
    }


def _measure(prepared: Prepared, label: str, console: Console) -> dict[str, Any]:
    """The share of held-out pairs in the right order, and some completions."""
    from ..demo.training import complete

    model, tokenizer, held_out = prepared.model, prepared.tokenizer, prepared.held_out
    share, _ = _held_out(model, prepared, label, console)
    written = [complete(model, tokenizer, example) for example in held_out[:SAMPLES]]
    return {"preferred_share": share, "completions": written}


def _held_out(
    model: Any, prepared: Prepared, label: str, console: Console
) -> tuple[float, list[float]]:
    """The share of held-out pairs in the right order, and the gap of every pair."""
    from ..demo.training import preference_gaps, preferred_share

    gaps = preference_gaps(model, prepared.tokenizer, prepared.held_out)
    share = preferred_share(gaps)
    console.say(
        label,
        f"the chosen completion is the likelier one in {share:.1%} of {len(gaps)} held-out pairs",
    )
    return share, gaps


def _train(
    objective: Objective, model: Any, prepared: Prepared, directory: Path, console: Console
) -> list[float]:
    """Train `model` on the preferences and return the losses."""
    from ..demo.model import load_model
    from ..demo.objective import trainer_name
    from ..demo.training import preference_trainer

    console.say(objective.name, f"training with {trainer_name(objective)}")
    progress = console.progress(objective.name)
    reference, _ = load_model(prepared.start)
    trainer = preference_trainer(
        model,
        reference,
        prepared.tokenizer,
        prepared.train,
        objective,
        prepared.recipe,
        directory=directory,
        progress=progress,
    )
    trainer.train()
    return progress.losses


def _train_each(
    args: argparse.Namespace, chosen: Sequence[Objective], prepared: Prepared, console: Console
) -> dict[str, Any]:
    """Train with each objective from the same model, and show what became of it."""
    from ..demo.model import load_model
    from ..demo.objective import trainer_name
    from ..demo.variants import Outcome, table

    share, before = _held_out(prepared.model, prepared, "before", console)
    outcomes = {}
    for objective in chosen:
        model, _ = load_model(prepared.start)
        began = time.monotonic()
        losses = _train(objective, model, prepared, args.out, console)
        seconds = round(time.monotonic() - began, 1)
        _, after = _held_out(model, prepared, "after", console)
        outcomes[objective.name] = Outcome.of(before, after, losses, seconds)
    console.block(
        [
            f"{prepared.recipe.steps} steps from the same weights with each objective; log-ratio "
            "margin in nats, the mean of held-out pairs:",
            *table(share, outcomes),
        ]
    )
    return {
        "before": {"preferred_share": share},
        "objectives": {
            objective.name: {
                "trainer": trainer_name(objective),
                **asdict(outcomes[objective.name]),
            }
            for objective in chosen
        },
    }


def _show_samples(
    held_out: Sequence[Example], before: Sequence[str], after: Sequence[str], console: Console
) -> None:
    lines: list[str] = []
    for example, first, second in zip(held_out, before, after, strict=False):
        texts = {
            "held-out prompt": example.prompt,
            "chosen": example.chosen,
            "model before": first,
            "model after": second,
        }
        lines += [
            f"{name:16}{' '.join(text.split()) or '(nothing)'}" for name, text in texts.items()
        ]
        lines.append("")
    console.block(lines[:-1])


def _compare_heads(
    args: argparse.Namespace, objective: Objective, prepared: Prepared, console: Console
) -> dict[str, Any]:
    """Run both heads under a loss of TRL's, show the table, draw the losses, and return all that
    was measured."""
    from ..demo import compare
    from ..demo.objective import config_arguments, for_both_heads
    from ..demo.training import batch_size

    recipe = prepared.recipe.to_compare()
    compared = for_both_heads(objective)
    needed = recipe.steps * batch_size(compared, prepared.train, recipe)
    (loss_type,) = config_arguments(compared)["loss_type"]
    title = f"the two heads under TRL's own {compared.name} loss"
    if compared is not objective:
        title += " on the best against the worst completion"
        console.say(
            "compare",
            f"TRL's DPOTrainer has no loss for {objective.name}; what follows is under its "
            f"{compared.name} loss",
        )
    names = {"stock": f"TRL {version('trl')}", "fastpref": "fastpref"}
    results = compare.run(
        prepared.start,
        prepared.train[:needed],
        compared.name,
        recipe,
        lambda head: console.progress(names[head]),
    )
    console.block(
        [
            f"{title[0].upper()}{title[1:]}:",
            f"{recipe.steps} steps of about {recipe.batch} completions from the same weights, each "
            "side in a process of its own; times of the fastest step.",
            *compare.table(results, names["stock"]),
        ]
    )
    compare.picture(results, names["stock"], title, args.out / "loss.png")
    return {
        "objective": compared.name,
        "loss_type": loss_type,
        "recipe": asdict(recipe),
        "largest_loss_difference": compare.largest_difference(results),
        **{head: asdict(measured) for head, measured in results.items()},
    }
