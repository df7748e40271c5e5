# SPDX-License-Identifier: Apache-2.0
"""Seconds, memory and traffic of a preference step on many GPUs: a model, not a measurement.

python benchmarks/scaling.py --out PNG           # the table and the picture of the README
python benchmarks/scaling.py --model 70b --gpu H200 --tp 8 --cp 2 --dp 4 64 --length 16384

    products     u 2 N H V / tp flop at the rate of one GPU; u is that of fastpref's own plan
    passes       N V / tp logits that are read and written, at the memory's speed
    collectives  what fastpref sends, to the byte (tests/bench/test_many_gpus.py counts it)
    backbone     6 P D / tp flop at a lower rate; each layer sums (D, H) over tp four times
    travel       P / tp weights gathered twice and their gradient scattered over the dp cp ranks,
                 keys and values passed round cp, while the backbone computes; what takes longer
                 is added

What ranks compare once, at the first of calls that are alike, is no part of a step. A rank has D
positions and N scored ones. A collective takes its bytes of a ring over the slowest link between
its ranks, and a latency. The objective is a sum over pairs, as DPO is, the reference given; a live
one adds 1u and 2 P D flop.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref import ScoringOptions
from fastpref.bench import machine, predictions
from fastpref.scoring.batches import BatchedPlan, choose_for_groups
from fastpref.scoring.plan import Plan, Problem, choose

NODE = 8  # GPUs that NVLink joins
LATENCY = 10e-6  # seconds of a collective of nothing, for each doubling of its ranks: assumed
# Of the backbone, in rates of the head's products: assumed, 45% of the 989 TFLOP/s of data sheets.
BACKBONE_RATE = 0.45 * 989 / 700
# Of full logits in plain torch, a logit in bfloat16: itself, its log-softmax in float32, gradients.
# Measured on a CPU, the peak that bench/memory.py sees at 512 positions of 64000 columns. At 16000
# it is 12 to 16 from one run to the next, as malloc uses freed memory again or does not.
FULL_LOGITS_BYTES = 12
STATE_BYTES = 16  # of a parameter: weight, gradient, and Adam's master copy and moments
LAYER_BYTES = 34  # of a position and hidden dimension, in the one layer that is recomputed
GB = 1e9
STRONG = 2048  # sequences of all ranks together, in the picture


class Model(NamedTuple):
    name: str
    parameters: float  # P, embeddings and head included
    layers: int
    hidden_size: int  # H
    kv_size: int  # of a position's keys, all heads
    vocab_size: int  # V

    def with_vocabulary(self, size: int) -> Model:
        more = 2 * (size - self.vocab_size) * self.hidden_size
        return self._replace(vocab_size=size, parameters=self.parameters + more)


MODELS = {
    "8b": Model("8B", 8.03e9, 32, 4096, 1024, 128256),  # Llama 3's sizes
    "70b": Model("70B", 70.6e9, 80, 8192, 1024, 128256),
}
LAYOUTS = {"8b": (1, 1, (8, 1024)), "70b": (8, 2, (4, 64))}  # tp, cp, dp


class Card(NamedTuple):
    """One GPU. The rates are those that are reached. The links are public figures, in one
    direction: NVLink 900 GB/s in both, a network of 400 Gbit/s a GPU."""

    name: str
    flops: float  # a second, of the head's products
    bytes: float  # a second, of passes over logits
    memory: float  # bytes
    link: float = 450e9  # bytes a second within a node
    network: float = 50e9  # between nodes
    source: str = "assumed"  # of flops and bytes


_MEMORY = {"H100": 80e9, "H200": 141e9}
CARDS = {one.name: Card(*one[:3], _MEMORY[one.name]) for one in predictions.CARDS}


def measured(card: Card, path: Path) -> Card:
    """With the rates of a report of `fastpref bench`: those of the widest trained head in bfloat16.

    Raises:
        ValueError: the report has none.
    """
    report, own = json.loads(path.read_text()), ("fastpref, rows", "fastpref")
    cases = [one for one in report.get("cases", ()) if one["what"] in ("head", "score")]
    for case in sorted(cases, key=lambda one: -one["shape"]["hidden_size"]):
        timings, shape = case["timings"], case["shape"]
        found = [timings[name]["seconds"] for name in own if name in timings]
        if case["mode"] == "trainable head" and case["dtype"] == "bfloat16" and found:
            logits = shape["sequences"] * shape["length"] * (1 - shape["masked"])
            logits, products = logits * shape["vocab_size"], timings["bare products"]["seconds"]
            return card._replace(
                flops=6 * logits * shape["hidden_size"] / products,
                # Where fastpref takes no longer than the products, its passes cost nothing.
                bytes=logits * pass_bytes(1.0) / max(found[0] - products, 1e-9),
                source=f"measured, {path}: {machine.headline(report['machine'])}",
            )
    raise ValueError(f"--measured {path} has no trained head in bfloat16; pass one of `make gpu`")


class Collective(NamedTuple):
    kind: str
    nbytes: int  # of the tensor that a rank hands in
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends on a ring."""
        share = {"all_gather": 1, "reduce_scatter": 1 / self.ranks, "all_reduce": 2 / self.ranks}
        return share[self.kind] * (self.ranks - 1) * self.nbytes

    def seconds(self, speed: float) -> float:
        return self.sent / speed + LATENCY * math.log2(self.ranks)


def agreement(ranks: int) -> list[Collective]:
    """What ranks of any group send once, before the first of calls that are alike."""
    return [Collective("all_gather", 7 * 8, ranks)] if ranks > 1 else []


def vocabulary_collectives(plan: Plan | BatchedPlan, ranks: int) -> list[Collective]:
    """What a call for log-probabilities sends with ``tp_group``, in order; ``plan`` is a rank's."""
    sizes: list[tuple[str, int]] = []
    for part in plan.plans if isinstance(plan, BatchedPlan) else (plan,):
        exact = 8 if part.dtype == torch.float64 else 4
        for chunk in part.chunks:
            rows = chunk.stop - chunk.start
            sizes.append(("all_reduce", 2 * exact * rows))  # the target's product, and its owners
            sizes.append(("all_gather", 3 * 8 * rows))  # anchor, sum, offset
            sizes += [("all_reduce", exact)] * (part.dtype == torch.float16)  # the largest bias
        if part.needs_hidden:
            sizes.append(("all_reduce", part.scored * part.hidden_size * part.itemsize))
    return [Collective(*one, ranks) for one in sizes] if ranks > 1 else []


def sequence_collectives(sequences: int, ranks: int, lengths: bool = False) -> list[Collective]:
    """With ``seq_group``: sums, and lengths where the objective divides by them."""
    sizes = (4, 8) if lengths else (4,)
    return [Collective("all_reduce", one * sequences, ranks) for one in sizes if ranks > 1]


def token_collectives(
    sequences: int, positions: int, ranks: int, size: int = 9
) -> list[Collective]:
    """With ``seq_group``, of objectives of tokens, beside those of ``sequence_collectives``: how
    many positions of a row each rank holds, and ``size`` bytes of each of these. ``positions`` are
    the most of any rank. The size is 5 for the policy, and 4 each for the old policy, the
    reference and advantages of tokens."""
    sizes = (3 * 8, sequences * positions * size)
    return [Collective("all_gather", one, ranks) for one in sizes if ranks > 1]


def mean_collectives(ranks: int) -> list[Collective]:
    """With ``dp_group``, of an objective that takes the mean of its batch, as KTO does."""
    return [Collective("all_reduce", 2 * 4, ranks)] if ranks > 1 else []


def weight_collectives(elements: int, ranks: int, itemsize: int = 2) -> list[Collective]:
    """Of a weight that FSDP shards: gathered forward and backward, its gradient scattered."""
    whole = elements * itemsize
    sizes = [("all_gather", whole // ranks)] * 2 + [("reduce_scatter", whole)]
    return [Collective(*one, ranks) for one in sizes] if ranks > 1 else []


def head_plan(
    hidden_size: int,
    columns: int,
    pairs: Sequence[int],  # scored tokens of each
    memory: float,  # bytes of the device
    *,
    tp: int,
    cp: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device_type: str = "cuda",
    backend: str = "rows",
) -> Plan | BatchedPlan:
    """fastpref's own choice for a trained head of which a rank has that many columns."""
    problem = Problem(
        scored=sum(pairs),
        hidden_size=hidden_size,
        trained_size=hidden_size,
        vocab_size=columns,
        dtype=dtype,
        needs_hidden=True,
        needs_weight=True,
        needs_bias=False,
        only_logp=True,
        copies_weight=False,
        backend=backend,
        device_type=device_type,
        scores_in_tiles=True,
        temporary_bytes=0,  # of the rows tier: sums of rows, a thousandth of the rest
        total_memory=int(memory),
        sharded=tp > 1,
    )
    groups = (lambda: pairs) if cp == 1 else "the tokens of a row lie on several ranks"
    options = ScoringOptions()
    return choose_for_groups(choose(problem, options), options, groups)


def pass_bytes(kept: float) -> float:
    """Of a logit in 16 bits: read and written once where it is kept, else read once more."""
    return 6 - 2 * kept


@dataclass(frozen=True)
class Step:
    """What a rank does and holds in one step; ranks of ``tp`` are neighbours, then those of cp."""

    model: Model
    card: Card
    tp: int
    cp: int
    dp: int
    sequences: int = 8  # B of a data-parallel rank
    length: int = 4096  # T
    scored: float = 0.5  # share of the positions

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def positions(self) -> int:  # D
        return self.sequences * self.length // self.cp

    @property
    def plan(self) -> Plan | BatchedPlan:
        pairs = [round(2 * self.length * self.scored) // self.cp] * (self.sequences // 2)
        model, memory = self.model, self.card.memory
        columns = model.vocab_size // self.tp
        return head_plan(model.hidden_size, columns, pairs, memory, tp=self.tp, cp=self.cp)

    def speed(self, stride: int, ranks: int) -> float:
        """Of the slowest link between ranks that are ``stride`` GPUs apart."""
        return self.card.link if stride * ranks <= NODE else self.card.network

    @property
    def head_products(self) -> float:
        """Seconds, passes over the logits included."""
        plan = self.plan
        kept = 1.0 if isinstance(plan, BatchedPlan) else plan.kept_rows / max(1, plan.scored)
        logits = plan.scored * self.model.vocab_size / self.tp
        flop = plan.units * 2 * logits * self.model.hidden_size
        return flop / self.card.flops + logits * pass_bytes(kept) / self.card.bytes

    def head_sent(self, speed: float | None = None) -> list[tuple[Collective, float]]:
        """What fastpref sends, each with its link, or with links over tp of that ``speed``."""
        over_tp = vocabulary_collectives(self.plan, self.tp)
        over_cp = sequence_collectives(self.sequences, self.cp)
        speeds = speed or self.speed(1, self.tp), self.speed(self.tp, self.cp)
        return [(one, speeds[0]) for one in over_tp] + [(one, speeds[1]) for one in over_cp]

    def head_waits(self, speed: float | None = None) -> float:
        return sum(one.seconds(of) for one, of in self.head_sent(speed))

    @property
    def head(self) -> float:
        return self.head_products + self.head_waits()

    @property
    def backbone(self) -> float:
        within = self.model.parameters - 2 * self.model.vocab_size * self.model.hidden_size
        return 6 * within * self.positions / self.tp / (BACKBONE_RATE * self.card.flops)

    @property
    def layer_sums(self) -> list[Collective]:
        summed = Collective("all_reduce", 2 * self.positions * self.model.hidden_size, self.tp)
        return 4 * self.model.layers * [summed]

    @property
    def travelling(self) -> list[tuple[float, float]]:
        """Bytes that a rank sends while the backbone computes, and the speed of their links."""
        shards = self.dp * self.cp
        weights = weight_collectives(round(self.model.parameters / self.tp), shards)
        # In 16 bits, keys and values forward, and again with their gradients backward.
        ring = 3 * (self.cp - 1) * self.model.layers * self.positions * 4 * self.model.kv_size
        sent = [(one.sent, self.speed(self.tp, shards)) for one in weights]
        return [*sent, (ring / self.tp, self.speed(self.tp, self.cp))]

    @property
    def travel(self) -> float:
        return sum(sent / speed for sent, speed in self.travelling)

    @property
    def seconds(self) -> float:
        layers = sum(one.seconds(self.speed(1, self.tp)) for one in self.layer_sums)
        return self.head + layers + max(self.backbone, self.travel)

    @property
    def sent(self) -> tuple[float, float]:
        """Bytes that a rank sends: of the head by fastpref, and all."""
        head = sum(one.sent for one, _ in self.head_sent())
        rest = sum(one.sent for one in self.layer_sums) + sum(one for one, _ in self.travelling)
        return head, head + rest

    @property
    def head_memory(self) -> tuple[float, float]:
        """Bytes: of full logits at every position, as a model returns them; of fastpref."""
        full = FULL_LOGITS_BYTES * self.positions * self.model.vocab_size / self.tp
        return full, self.plan.workspace_bytes

    @property
    def other_memory(self) -> float:
        """Sharded states; the whole head and its gradient; inputs of checkpointed layers and one
        layer; hidden states and their gradient."""
        model, states = self.model, self.positions * self.model.hidden_size
        head = 4 * model.vocab_size * model.hidden_size / self.tp
        layers = (2 * model.layers + LAYER_BYTES) * states / self.tp + 4 * states
        return STATE_BYTES * model.parameters / self.gpus + head + layers


def communication_bound(step: Step, speed: float) -> int | None:
    """The least power of two of ``tp`` whose collectives of the head, over links of that speed,
    take longer than its products; None where none that divides the vocabulary does."""
    tp = 2
    while step.model.vocab_size % tp == 0:
        one = replace(step, tp=tp)
        if one.head_waits(speed) > one.head_products:
            return tp
        tp *= 2
    return None


HEADER = (
    "| | GPUs: tp x cp x dp | step, s | head in it | collectives in the head "
    "| a rank sends for the head, in all, GB | head: full logits, fastpref, GB "
    "| whole step: full logits, fastpref, GB |\n" + "|---" * 8 + "|"
)


def row(step: Step) -> str:
    whole = [step.other_memory + one for one in step.head_memory]
    cells = (
        f"{step.model.name}, {step.card.name}",
        f"{step.gpus}: {step.tp} x {step.cp} x {step.dp}",
        f"{step.seconds:.2f}",
        f"{step.head / step.seconds:.1%}",
        f"{step.head_waits() / step.head:.1%}",
        ", ".join(f"{one / GB:.3g}" for one in step.sent),
        ", ".join(f"{one / GB:.1f}" for one in step.head_memory),
        ", ".join(f"{one / GB:.0f}{' (too much)' * (one > step.card.memory)}" for one in whole),
    )
    return f"| {' | '.join(cells)} |"


def said(steps: Sequence[Step]) -> Iterator[str]:
    """Below the table: where the head is communication-bound, and what is assumed."""
    for step in {(step.model, step.card): step for step in steps}.values():
        for name, speed in (("NVLink", step.card.link), ("the network", step.card.network)):
            tp = communication_bound(step, speed)
            where = "at no tp that divides V" if tp is None else f"from tp={tp} on"
            if name == "NVLink" and (tp is None or tp > NODE):
                where = f"at no tp of the {NODE} GPUs of a node"
            yield (
                f"{step.model.name}, {step.card.name}: over {name} ({speed / GB:g} GB/s a "
                f"direction) the head waits longer than it computes {where}."
            )
    for card in {step.card: None for step in steps}:
        rates = f"{card.flops / 1e12:.3g} TFLOP/s, {card.bytes / 1e12:.3g} TB/s"
        yield f"{card.name}: {rates} ({card.source}), {card.memory / GB:g} GB."


def draw(steps: Sequence[Step], path: Path) -> None:
    """Of one card: memory and seconds of the head, and whole steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    first = {step.model: step for step in reversed(steps)}
    step, card = steps[0], steps[0].card
    figure = plt.figure(figsize=(10, 9), layout="constrained")
    panels = figure.subplot_mosaic([["memory", "head"], ["step", "step"]])
    figure.suptitle(
        "A model, not a measurement. Lower is better.\n"
        f"Llama 3 in bfloat16, V={step.model.vocab_size}, sequences of {step.length} tokens, "
        f"{step.scored:.0%} scored;\n{card.name}, rates {card.source.split(',')[0]}, NVLink "
        f"{card.link / GB:g} GB/s and network {card.network / GB:g} GB/s a direction",
        fontsize="medium",
    )
    colours, seconds = ("#0072B2", "#D55E00"), "seconds a step"
    for one, colour in zip(reversed(first.values()), colours, strict=False):
        at = _lines(panels, one, colour)
    for limit, style in zip(CARDS.values(), ("--", ":"), strict=True):
        label = f"all of an {limit.name}: {limit.memory / GB:g} GB"
        panels["memory"].axhline(limit.memory / GB, color="black", ls=style, label=label)
    for name, (title, x, y, room) in {
        "memory": ("Memory of the head on a GPU", "sequences of a data-parallel rank", "GB", 0.5),
        "head": (f"The head, cp=1, {step.sequences} sequences", "tp", seconds, 0.5),
        "step": (f"A step of {STRONG} sequences, in one pass of each rank", "GPUs", seconds, 0.3),
    }.items():
        panel = panels[name]
        panel.set(title=title, xlabel=x, ylabel=y, yscale="log")
        panel.set_xscale("log", base=2)
        panel.set_xticks(at[name], [str(one) for one in at[name]])
        low, high = panel.get_ylim()
        panel.set_ylim(low, high * (high / low) ** room)  # for the legend
        panel.legend(fontsize="small", loc="upper left", ncols=1 + (name == "step"))
        panel.grid(axis="y", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(panels: dict[str, Any], step: Step, colour: str) -> dict[str, list[int]]:
    """Of one model; returns where its points lie."""
    at: dict[str, list[int]] = {}

    def line(panel: str, style: str, label: str, points: dict[int, float]) -> None:
        at.setdefault(panel, list(points))
        x, y = zip(*points.items(), strict=True)
        label = f"{step.model.name}{label}"
        panels[panel].plot(x, y, style, color=colour, label=label, markersize=5)

    grown = {n: replace(step, sequences=n).head_memory for n in (2, 4, 8, 16, 32, 64)}
    for place, style, name in ((0, "s--", "full logits"), (1, "o-", "fastpref")):
        points = {n: both[place] / GB for n, both in grown.items()}
        line("memory", style, f", tp={step.tp}, cp={step.cp}: {name}", points)
    spread = {tp: replace(step, tp=tp, cp=1) for tp in (1, 2, 4, 8, 16, 32, 64)}
    line("head", "o-", ": products", {tp: one.head_products for tp, one in spread.items()})
    for speed, style, name, most in (
        (step.card.network, "s--", "network", 64),
        (step.card.link, "^:", "NVLink", NODE),
    ):
        points = {tp: one.head_waits(speed) for tp, one in spread.items() if 1 < tp <= most}
        line("head", style, f": collectives, {name}", points)
    ranks = step.tp * step.cp
    dps = [n // ranks for n in (16, 32, 64, 128, 256, 512, 1024)]
    whole = {n * ranks: replace(step, dp=n, sequences=STRONG // n) for n in dps if n}
    for style, name, seconds in (
        ("o-", "step", lambda one: one.seconds),
        ("s--", "the head in it", lambda one: one.head),
        ("^:", "weights and keys under way", lambda one: one.travel),
    ):
        points = {n: seconds(one) for n, one in whole.items()}
        line("step", style, f", tp={step.tp}, cp={step.cp}: {name}", points)
    return at


def steps_of(asked: argparse.Namespace) -> Iterator[Step]:
    """Raises ValueError where sizes do not fit each other."""
    if asked.measured is not None and len(asked.gpu) > 1:
        raise ValueError("--measured is a report of one GPU; say of which with --gpu")
    for key in asked.model:
        tp, cp, dps = LAYOUTS[key]
        tp, cp, dps = asked.tp or tp, asked.cp or cp, asked.dp or dps
        model = MODELS[key].with_vocabulary(asked.vocab or MODELS[key].vocab_size)
        for what, size, option, parts in (
            ("the vocabulary,", model.vocab_size, "--tp", tp),
            ("the length of a sequence,", asked.length, "--cp", cp),
            ("--batch, as sequences are pairs,", asked.batch, "", 2),
        ):
            if size % parts:
                raise ValueError(f"{option} {parts}".strip() + f" must divide {what} got {size}")
        for name in asked.gpu:
            card = CARDS[name] if asked.measured is None else measured(CARDS[name], asked.measured)
            speeds = {"link": asked.link, "network": asked.network}
            card = card._replace(**{to: one * GB for to, one in speeds.items() if one})
            for dp in dps:
                yield Step(model, card, tp, cp, dp, asked.batch, asked.length, asked.scored)


def _positive(kind: type[float], most: float = math.inf) -> Any:
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value <= most or math.isinf(value):
            what = "a positive whole number" if kind is int else "a positive number"
            upto = f" up to {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} given, {what}{upto} expected")
        return value

    return number


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A model of a preference step on many GPUs.")
    add, whole, real = parser.add_argument, _positive(int), _positive(float)
    add("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--gpu", nargs="+", choices=list(CARDS), default=list(CARDS))
    add("--tp", type=whole, help="ranks that share the vocabulary and each layer")
    add("--cp", type=whole, help="ranks that share the tokens of a sequence")
    add("--dp", type=whole, nargs="+", help="data-parallel ranks, a row each")
    add("--vocab", type=whole, help="V, instead of the model's")
    add("--length", type=whole, default=Step.length, help="tokens of a sequence")
    add("--batch", type=whole, default=Step.sequences, help="sequences of a data-parallel rank")
    add("--scored", type=_positive(float, 1.0), default=Step.scored, help="share of the tokens")
    add("--link", type=real, help="GB/s within a node, in one direction")
    add("--network", type=real, help="GB/s a GPU between nodes, in one direction")
    add("--measured", type=Path, help="report of `make gpu`, for the rates of one GPU")
    add("--out", type=Path, help="PNG of the first --gpu")
    asked = parser.parse_args(arguments)
    try:
        steps = list(steps_of(asked))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join([HEADER, *map(row, steps), "", *said(steps)]))
    if asked.out is not None:
        draw([step for step in steps if step.card.name == asked.gpu[0]], asked.out)
        print(asked.out, file=sys.stderr)


if __name__ == "__main__":
    main()
