# SPDX-License-Identifier: Apache-2.0
"""benchmarks/scaling.py: what its model says a rank sends against the collectives of real calls on
two ranks, its plan against that of a call, its rates against predictions and reports, and the
README."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref import ScoringOptions, explain, preference_loss
from fastpref.bench import memory
from fastpref.bench.experiment import Case
from fastpref.bench.timing import MEBIBYTE
from fastpref.bench.work import Shape
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
B, T, H, V = 4, 96, 24, 4096


@functools.cache
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = found  # where dataclasses look their types up
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def scaling() -> ModuleType:
    return module()


# Operators of torch.distributed: the kind of collective, and the argument that a rank hands in.
COLLECTIVES = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allgather_": ("all_gather", 1),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    # Operators within an operator are not seen.
    "fastpref::sum_over_ranks": ("all_reduce", 0),
}


class Counted(TorchDispatchMode):
    """The kind of each collective and the bytes that this rank hands in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) or name in COLLECTIVES:
            kind, place = COLLECTIVES[name]
            tensors = [one for one in tree_leaves(args[place]) if isinstance(one, Tensor)]
            self.found.append((kind, sum(one.nbytes for one in tensors)))
        return func(*args, **(kwargs or {}))


def counted(run: Any, group: Any = None) -> list[list[tuple[str, int]]]:
    """Of the collectives of a first call of ``run`` and of one more, over ``group``."""
    backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
    found = []
    for _ in range(2):
        before = backend._get_sequence_number_for_group()
        with Counted() as seen:
            run()
        # Gloo numbers its collectives: none went unseen.
        assert backend._get_sequence_number_for_group() - before == len(seen.found), seen.found
        found.append(seen.found)
    return found


def sizes(collectives: Any) -> list[tuple[str, int]]:
    return [(one.kind, one.nbytes) for one in collectives]


def batch(dtype: torch.dtype, length: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(B, length, H, generator=generator, dtype=torch.float32)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float32)
    target = torch.randint(V, (B, length), generator=generator)
    target[:, ::3] = -100
    return hidden.to(dtype), weight.to(dtype), target


# Products' dtype, T, rows of bfloat16 exponentials in the budget, and the schedule that follows.
VOCABULARY: dict[str, tuple[torch.dtype, int, float | None, str]] = {
    "kept": (torch.bfloat16, T, None, "keep"),
    "float32": (torch.float32, T, None, "keep"),
    "float64": (torch.float64, T, None, "keep"),
    "float16": (torch.float16, T, None, "keep"),
    "chunks": (torch.bfloat16, T, 150, "keep/recompute"),
    "slabs": (torch.bfloat16, T, 32, "recompute"),
    "batches": (torch.bfloat16, 15 * T, 2600, "batches"),
}


def with_vocabulary(rank: int, name: str) -> tuple[list[list[tuple[str, int]]], Any]:
    """What calls send, and their plan."""
    dtype, length, rows, _ = VOCABULARY[name]
    hidden, weight, target = batch(dtype, length)
    leaves = hidden.requires_grad_(), weight.chunk(2)[rank].clone().requires_grad_()
    budget = None if rows is None else int(rows * V // 2 * 2)
    asked: dict[str, Any] = {
        "ref_logps": torch.zeros(B, dtype=torch.float32),
        "tp_group": dist.group.WORLD,
        "options": ScoringOptions(memory_budget=budget),
    }
    found = counted(lambda: preference_loss(*leaves, target, "dpo", **asked).loss.backward())
    plan: Any = explain(*leaves, target, "dpo", **asked)
    return found, plan.policy


@pytest.mark.heavy
@pytest.mark.parametrize("name", VOCABULARY)
def test_bytes_over_the_vocabulary(two_ranks: Ranks, scaling: ModuleType, name: str) -> None:
    dtype, length, _, schedule = VOCABULARY[name]
    found, called = two_ranks(with_vocabulary, name)[0]
    one = called.largest if schedule == "batches" else called
    pairs = [2 * (length - -(-length // 3))] * 2
    memory = 16 * one.memory_budget  # of which the budget is a sixteenth
    plan = scaling.head_plan(
        H, V // 2, pairs, memory, tp=2, dtype=dtype, device_type="cpu", backend=one.backend
    )
    wanted = sizes(scaling.vocabulary_collectives(plan, 2))
    assert found == [sizes(scaling.agreement(2)) + wanted, wanted]
    assert (plan.schedule, plan.units) == (called.schedule, called.units)
    assert plan.schedule == schedule
    assert scaling.vocabulary_collectives(plan, 1) == []


def of_sequences(rank: int, objective: str) -> list[list[tuple[str, int]]]:
    hidden, weight, target = batch(torch.bfloat16)
    part = slice(rank * T // 2, (rank + 1) * T // 2)
    leaves = hidden[:, part].clone().requires_grad_(), weight.requires_grad_()
    asked: dict[str, Any] = {"seq_group": dist.group.WORLD}
    if objective == "dpo":
        asked["ref_logps"] = torch.zeros(B, dtype=torch.float32)
    if objective == "grpo":
        old = torch.zeros(target[:, part].shape, dtype=torch.float32)
        asked["extras"] = {"advantages": torch.ones(B), "old_token_logp": old}
    return counted(
        lambda: preference_loss(*leaves, target[:, part], objective, **asked).loss.backward()
    )


@pytest.mark.heavy
@pytest.mark.parametrize("objective", ["dpo", "simpo", "grpo"])
def test_bytes_over_sequences(two_ranks: Ranks, scaling: ModuleType, objective: str) -> None:
    wanted = sizes(scaling.sequence_collectives(B, 2, lengths=objective != "dpo"))
    if objective == "grpo":
        wanted = sizes(scaling.token_collectives(B, T // 2, 2)) + wanted
    for first, later in two_ranks(of_sequences, objective):
        # Other tests may have made the first call.
        assert first in (wanted, sizes(scaling.agreement(2)) + wanted)
        assert later == wanted
    assert scaling.sequence_collectives(B, 1) == scaling.token_collectives(B, T, 1) == []


def of_batches(rank: int, objective: str) -> list[list[tuple[str, int]]]:
    hidden, weight, target = batch(torch.bfloat16)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    extras = {"labels": torch.arange(B, dtype=torch.int64) % 2 == 0}
    asked: dict[str, Any] = {
        "ref_logps": torch.zeros(B, dtype=torch.float32),
        "dp_group": dist.group.WORLD,
        "extras": extras if objective == "kto" else None,
    }
    return counted(lambda: preference_loss(*leaves, target, objective, **asked).loss.backward())


@pytest.mark.heavy
def test_bytes_over_batches(two_ranks: Ranks, scaling: ModuleType) -> None:
    for objective, wanted in (("kto", sizes(scaling.mean_collectives(2))), ("dpo", [])):
        for first, later in two_ranks(of_batches, objective):
            # Other tests may have made the first call.
            assert first in (wanted, sizes(scaling.agreement(2)) + wanted)
            assert later == wanted


class Head(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        reference = torch.zeros(B, dtype=torch.float32)
        return preference_loss(hidden, self.weight, target, "dpo", ref_logps=reference).loss


def of_a_sharded_head(rank: int) -> list[list[tuple[str, int]]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hidden, weight, target = batch(torch.bfloat16)
    mesh = init_device_mesh("cpu", (2,))
    head = fully_shard(Head(weight), mesh=mesh, reshard_after_forward=True)
    return counted(lambda: head(hidden.requires_grad_(), target).backward(), mesh.get_group())


@pytest.mark.heavy
def test_bytes_of_a_sharded_weight(two_ranks: Ranks, scaling: ModuleType) -> None:
    wanted = scaling.weight_collectives(V * H, 2)
    for found in two_ranks(of_a_sharded_head):
        assert found == [sizes(wanted)] * 2


def test_bytes_on_a_ring(scaling: ModuleType) -> None:
    """What each rank passes on, counted by its pieces."""
    for ranks in (1, 2, 5):
        pieces = {"all_gather": ranks, "reduce_scatter": 1, "all_reduce": 2}
        for kind, of in pieces.items():
            one = scaling.Collective(kind, 300, ranks)
            assert one.sent == pytest.approx((ranks - 1) * of * 300 / ranks)
    assert scaling.Collective("all_reduce", 100, 4).seconds(50.0) == pytest.approx(3.0, rel=1e-4)


def step(scaling: ModuleType, key: str = "8b", **changes: Any) -> Any:
    sizes = {"tp": 2, "cp": 1, "dp": 4} | changes
    return scaling.Step(scaling.MODELS[key], scaling.CARDS["H200"], **sizes)


def test_a_step_by_hand(scaling: ModuleType) -> None:
    one = step(scaling)  # 2 x 4 GPUs: one node
    columns, positions, wide = 128256 / 2, 8 * 4096, 4096
    scored = positions / 2
    assert (one.plan.schedule, one.plan.scored, one.gpus) == ("keep", scored, 8)
    products = 3 * 2 * scored * wide * columns / 700e12 + scored * columns * 4 / 4.3e12
    assert one.head_products == pytest.approx(products)
    of_tokens = scored * (8 + 3 * 8 + 2 * wide)  # two ranks: each sends what it hands in
    assert one.sent[0] == of_tokens
    assert one.head_waits() == pytest.approx(of_tokens / 450e9 + 3 * 10e-6)
    backbone = 6 * (8.03e9 - 2 * 128256 * wide) * positions / 2 / (0.45 * 989e12)
    assert one.backbone == pytest.approx(backbone)
    layers = 4 * 32 * (2 * positions * wide / 450e9 + 10e-6)
    assert one.seconds == pytest.approx(products + one.head_waits() + backbone + layers)
    weights = 3 * (8.03e9 / 2) * 2 * 3 / 4
    assert one.travel == pytest.approx(weights / 450e9)
    assert one.sent[1] == pytest.approx(one.sent[0] + 4 * 32 * 2 * positions * wide + weights)
    full, own = one.head_memory
    assert full == 12 * positions * columns and own == one.plan.workspace_bytes
    # What is kept, and no less than the exponentials.
    assert 2 * scored * columns < own < 3 * scored * columns


def test_the_slowest_link_and_what_comes_late(scaling: ModuleType) -> None:
    across = step(scaling, tp=16, dp=1)
    waits = [one.sent / 50e9 + 4 * 10e-6 for one, _ in across.head_sent()]
    assert across.head_waits() == pytest.approx(sum(waits))
    # tp=4 in a node, cp=4 over four of them: keys and values of 3 others, forward, and twice back.
    ring = step(scaling, tp=4, cp=4, dp=1)
    keys = 3 * 3 * 32 * (8 * 4096 / 4) * 2 * 2 * 1024 / 4
    weights = 3 * (8.03e9 / 4) * 2 * 3 / 4
    assert ring.travel == pytest.approx((keys + weights) / 50e9)
    assert ring.plan.scored == 8 * 4096 / 2 / 4
    late = step(scaling, tp=1, dp=1024, sequences=2)
    assert late.travel > late.backbone
    assert late.seconds == pytest.approx(late.head + late.travel)


@pytest.mark.parametrize("speed", [5e9, 50e9, 450e9])
def test_where_collectives_outweigh_products(scaling: ModuleType, speed: float) -> None:
    """By seconds a token, without latencies."""
    one = step(scaling, "70b", dp=1, sequences=64)
    wide, columns = 8192, 128256

    def outweighs(tp: int) -> bool:
        products = (6 * wide / 700e12 + 4 / 4.3e12) * columns / tp
        sent = 2 * (tp - 1) / tp * (8 + 2 * wide) + (tp - 1) * 24
        return sent / speed > products

    wanted = next((tp for tp in (2, 4, 8, 16, 32, 64, 128, 256) if outweighs(tp)), None)
    assert scaling.communication_bound(one, speed) == wanted
    odd = step(scaling).model.with_vocabulary(128255)
    assert scaling.communication_bound(scaling.replace(one, model=odd), speed) is None


def test_rates_as_predicted(scaling: ModuleType) -> None:
    """Ratios to the bare products, beside those of predictions.json."""
    predictions = json.loads((ROOT / "benchmarks" / "predictions.json").read_text())
    ranges = {
        (one["hidden_size"], one["vocab_size"]): [float(x) for x in one["predicted"].split(" to ")]
        for one in predictions
        if (one["implementation"], one["what"], one["mode"])
        == ("fastpref, rows", "head", "trainable head")
    }
    assert len(ranges) == 3
    for (wide, columns), (low, high) in ranges.items():
        for card in scaling.CARDS.values():
            model = scaling.Model("", 0, 0, wide, 0, columns)
            one = scaling.Step(model, card, 1, 1, 1, sequences=4)
            assert one.plan.scored == 8192 and one.plan.units == 3
            ratio = one.head_products / (6 * 8192 * wide * columns / card.flops)
            assert low - 0.03 < ratio < high + 0.01


def report(tmp_path: Path, **changes: Any) -> Path:
    timing = {"bare products": {"seconds": 0.5}, "fastpref, rows": {"seconds": 0.6}}
    shape = {"sequences": 8, "length": 256, "hidden_size": 64, "vocab_size": 1000, "masked": 0.5}
    case = {"what": "head", "mode": "trainable head", "dtype": "bfloat16", "shape": shape}
    machine = {"chip": "A chip", "torch": "1.2.3"}
    path = tmp_path / "report.json"
    cases = [case | {"timings": timing} | changes]
    path.write_text(json.dumps({"machine": machine, "cases": cases}))
    return path


def test_measured_rates(scaling: ModuleType, tmp_path: Path) -> None:
    card = scaling.measured(scaling.CARDS["H100"], report(tmp_path))
    assert card.flops == pytest.approx(6 * 1024 * 64 * 1000 / 0.5)
    assert card.bytes == pytest.approx(1024 * 1000 * 4 / 0.1)
    assert card.memory == 80e9 and card.source.startswith("measured") and "A chip" in card.source
    with pytest.raises(ValueError, match=r"no trained head in bfloat16; pass one of `make gpu`"):
        scaling.measured(card, report(tmp_path, mode="forward"))


@pytest.mark.slow
def test_full_logits_in_plain_torch(scaling: ModuleType) -> None:
    """Of tensors too large for malloc's heap, whose reuse differs from run to run."""
    shape = Shape(sequences=8, length=64, hidden_size=64, vocab_size=64000)
    case = Case("score", "trainable head", "bfloat16", shape, device="cpu")
    peak = memory.measure(case, "plain torch", 64)["peak"] * MEBIBYTE
    assert peak / (8 * 64 * 64000) == pytest.approx(scaling.FULL_LOGITS_BYTES, rel=0.03)


@pytest.mark.parametrize(
    "given, message",
    [
        ("--tp 7", "--tp 7 must divide the vocabulary, got 128256"),
        ("--vocab 1000 --model 8b --tp 16", "--tp 16 must divide the vocabulary, got 1000"),
        ("--cp 3", "--cp 3 must divide the length of a sequence, got 4096"),
        ("--batch 3", "2 must divide --batch, as sequences are pairs, got 3"),
        ("--dp 4 -2", "'-2' given, a positive whole number expected"),
        ("--length 1.5", "'1.5' given, a positive whole number expected"),
        ("--link nan", "'nan' given, a positive number expected"),
        ("--network inf", "'inf' given, a positive number expected"),
        ("--scored 1.5", "'1.5' given, a positive number up to 1 expected"),
        ("--measured no.json --gpu H100", "No such file or directory: 'no.json'"),
        ("--measured no.json", "--measured is a report of one GPU; say of which with --gpu"),
    ],
)
def test_bad_input(
    scaling: ModuleType, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        scaling.main(given.split())
    assert message in capsys.readouterr().err


def test_the_table_and_the_readme(
    scaling: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The page shows what the script prints, and the script draws."""
    picture = tmp_path / "deeper" / "one.png"
    scaling.main(["--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    table, below = capsys.readouterr().out.split("\n\n")
    assert table in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 2 + 8 and "(too much)" in table
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    small, large = (
        next(line for line in cells if line[1] == f"{size}, H200" and "1024: " in line[2])
        for size in ("8B", "70B")
    )
    said = (ROOT / "README.md").read_text(encoding="utf-8")
    assert large[2] == "1024: 8 x 2 x 64"
    for wanted in (
        "a model](benchmarks/README.md#many-gpus-on-paper), not a measurement",
        f"the head is {small[4]} of a DPO step of an 8B model on 1024 H200s and",
        f"{large[4]} of a 70B one's, {large[5]} of it spent waiting for collectives",
    ):
        assert wanted in said
    (exchange,) = scaling.agreement(2)
    bench = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert f"calls that are alike, {exchange.nbytes:.0f} bytes, is left out" in bench
    assert "70B, H200: over the network (50 GB/s a direction) the head waits longer" in below
    assert "H100: 700 TFLOP/s, 3 TB/s (assumed), 80 GB." in below


def test_options_reach_the_table(
    scaling: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = "--model 8b --gpu H200 --tp 4 --cp 2 --dp 2 8 --length 1024 --batch 4 --scored 0.25"
    speeds = f"--vocab 64000 --link 100 --network 25 --measured {report(tmp_path)}"
    scaling.main([*given.split(), *speeds.split()])
    table, below = capsys.readouterr().out.split("\n\n")
    rows = table.splitlines()[2:]
    model = scaling.MODELS["8b"]._replace(
        vocab_size=64000, parameters=8.03e9 - 2 * (128256 - 64000) * 4096
    )
    card = scaling.measured(scaling.CARDS["H200"], report(tmp_path))
    card = card._replace(link=100e9, network=25e9)
    steps = [scaling.Step(model, card, 4, 2, dp, 4, 1024, 0.25) for dp in (2, 8)]
    assert rows == [scaling.row(one) for one in steps]
    assert "over NVLink (100 GB/s a direction)" in below and "measured, " in below
