# SPDX-License-Identifier: Apache-2.0
"""Products in a dtype that the processor has or not: the same numbers by both ways, and none in 16
bits where the processor is slow at them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import ScoringOptions, explain, linear_divergence, linear_logprob, preference_loss
from fastpref.objectives import registry
from fastpref.scoring import plan as schedule
from fastpref.scoring import products, request
from fastpref.scoring.backends.divergence_formulas import DIVERGENCES
from fastpref.scoring.statistics import OUTPUTS
from tests.preference.cases import Data, configured, extras_of
from tests.scoring.cases import BACKENDS, make_case, run, upstream_of, verify
from tests.scoring.operations import Operations
from tests.scoring.test_schedule import problem

LOW = (torch.bfloat16, torch.float16)
VOCAB = 2051
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot)
low = pytest.mark.parametrize("dtype", LOW, ids=str)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(monkeypatch, request.param == "float32")
    return str(request.param)


both_ways = pytest.mark.parametrize("way", ["float32", "16 bits"], indirect=True)


def force(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """Whatever this machine has; blocks are small enough for there to be several."""

    def reason(dtype: torch.dtype, device: torch.device) -> str | None:
        return "forced" if slow and dtype in LOW and device.type == "cpu" else None

    monkeypatch.setattr(request, "slow_reason", reason)


class Seen(TorchDispatchMode):
    """Products whose operands have 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.low: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in args if isinstance(one, Tensor)]
        if func.overloadpacket in PRODUCTS and any(one.dtype in LOW for one in given):
            self.low.append(f"{func} {[tuple(one.shape) for one in given]}")
        return func(*args, **(kwargs or {}))


def whole_numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Whose products of up to 2000 summands are exact in float32."""
    return torch.randint(-8, 9, shape, dtype=torch.int64).to(dtype)


@low
@pytest.mark.parametrize(
    "sizes, room",
    [
        ((3, 5, 4), 16),  # a block an element
        *(((17, 200, 31), room) for room in (3000, 1 << 16, 1 << 24)),
        *((sizes, 3000) for sizes in ((1, 1, 1), (5, 2000, 1), (300, 2, 7))),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_rounded_once(
    dtype: torch.dtype, room: int, sizes: tuple[int, int, int], turned: bool
) -> None:
    rows, inner, cols = sizes
    a, b = whole_numbers(rows, inner, dtype=dtype), whole_numbers(inner, cols, dtype=dtype)
    if turned:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    exact = (a.double() @ b.double()).to(dtype)
    # Rows of a wider matrix, as those of a tile are.
    out = torch.full((rows, cols + 3), 77.0, dtype=dtype)
    products.multiply(a, b, out[:, :cols], room)
    assert torch.equal(out[:, :cols], exact) and (out[:, cols:] == 77).all()
    assert torch.equal(products.product(a, b, room), exact)
    total = torch.ones(rows, cols, dtype=torch.float32)
    products.add_product(total, a, b, False, room)
    assert torch.equal(total, 1 + exact.float())
    products.add_product(total, a, b, True, room)
    assert torch.equal(total, exact.float())


@low
@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    rows, inner, cols = sizes
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, cols, dtype=dtype)
    assert torch.equal(products.product(a, b, 1 << 20), torch.zeros(rows, cols, dtype=dtype))


@pytest.mark.parametrize("sizes", [(128, 256, 8192), (1, 4096, 256000), (8192, 1, 3), (2, 2, 2)])
@pytest.mark.parametrize("elements", [4, 1000, 1 << 22])
def test_blocks_fill_the_room(sizes: tuple[int, int, int], elements: int) -> None:
    m, k, n = products.block(sizes, elements)
    assert m * k + k * n + 2 * m * n <= elements
    assert all(1 <= own <= whole for own, whole in zip((m, k, n), sizes, strict=True))
    if sizes != (m, k, n):
        assert 16 * (m * k + k * n + 2 * m * n) > elements


def test_without_room_products_are_torchs_own() -> None:
    a, b = torch.randn(9, 70).bfloat16(), torch.randn(70, 8).bfloat16()
    assert torch.equal(products.product(a, b, 0), torch.mm(a, b))


SCHEDULES: dict[str, dict[str, Any]] = {
    "keep": {"schedule": "keep"},
    "kept in part": {"schedule": "keep", "rows": 100},
    "slabs": {"schedule": "recompute", "rows": 100},
    "least tile": {"rows": 0},
}


def options_of(name: str, dtype: torch.dtype, backend: str = "auto") -> ScoringOptions:
    options = dict(SCHEDULES[name])
    rows = options.pop("rows", None)
    budget = None if rows is None else max(1, rows * VOCAB * dtype.itemsize)
    return ScoringOptions(backend=backend, memory_budget=budget, **options)  # type: ignore[arg-type]


@both_ways
@low
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_error_contract(way: str, dtype: torch.dtype, backend: str, name: str) -> None:
    options = options_of(name, dtype, backend)
    verify(options, dtype, vocab=VOCAB, bias=True, ignored=0.3, below=0.1)
    asked: dict[str, Any] = {"outputs": OUTPUTS, "differentiated": ("logp", "entropy", "lse")}
    verify(options, dtype, vocab=VOCAB, softcap=5.0, **asked)


@both_ways
@low
@pytest.mark.parametrize("budget", [None, 1])
def test_the_error_contract_of_a_frozen_head(
    way: str, dtype: torch.dtype, budget: int | None
) -> None:
    options = ScoringOptions(schedule="direct", memory_budget=budget)
    verify(options, dtype, vocab=VOCAB, needs=("hidden",))


def score(dtype: torch.dtype, options: ScoringOptions, rank: int = 0) -> None:
    hidden = torch.randn(70, 24).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, 24).to(dtype).requires_grad_(not rank)
    lora = None
    if rank:
        parts = [torch.randn(*size).to(dtype) for size in ((rank, 24), (VOCAB, rank))]
        lora = (*(one.requires_grad_() for one in parts), 0.1)
    given = {"outputs": OUTPUTS, "lora": lora, "options": options}
    found = linear_logprob(hidden, weight, torch.arange(70), **given)
    (found.logp.sum() + found.entropy.sum()).backward()
    capped = linear_logprob(hidden, weight, torch.arange(70), softcap=5.0, **given)
    (capped.logp.sum() + capped.mean_logits.sum()).backward()
    linear_logprob(hidden, weight.detach(), torch.arange(70), options=options).logp.sum().backward()
    with torch.no_grad():
        linear_logprob(hidden, weight, torch.arange(70), options=options)


@low
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rank", [0, 3])
def test_scoring_multiplies_in_float32(
    dtype: torch.dtype, name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, True)
    with Seen() as seen:
        score(dtype, options_of(name, dtype), rank)
    assert not seen.low


@low
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_multiply_in_float32(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, True)
    hidden = torch.randn(70, 24).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, 24).to(dtype).requires_grad_()
    teacher = torch.randn(70, 30).to(dtype), torch.randn(VOCAB, 30).to(dtype)
    with Seen() as seen:
        for budget in (None, 1, 100 * VOCAB * 2):
            options = ScoringOptions(memory_budget=budget)
            given = {"divergence": kind, "options": options}
            linear_divergence(hidden, weight, *teacher, **given).sum().backward()
            linear_divergence(hidden, weight.detach(), *teacher, **given).sum().backward()
    assert not seen.low


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", "tdpo", "epsilon_dpo"])
def test_objectives_multiply_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, True)
    objective = next(configured(one) for one in registry.catalogue() if one.name == name)
    data = Data(torch.bfloat16)
    reference = {"ref_hidden": data.ref_hidden, "ref_weight": data.ref_weight}
    given = data.hidden, data.weight, data.target, objective
    schedules: list[Any] = ["auto", "recompute"]
    if objective.scope in ("unit", "pair"):
        schedules.append("batches")
    with Seen() as seen:
        for each in schedules:
            options = ScoringOptions(schedule=each, memory_budget=1 << 12)
            extras = extras_of(objective)
            preference_loss(*given, extras=extras, options=options, **reference).loss.backward()
    assert not seen.low


@low
def test_results_are_of_the_dtypes_of_before(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And alike, to the rounding of what is kept."""
    case = make_case(dtype=dtype, vocab=VOCAB, bias=True)
    found = []
    for slow in (False, True):
        force(monkeypatch, slow)
        found.append(run(case, upstream=upstream_of(case, ("logp",))))
    for name, one in found[0].items():
        other = found[1][name]
        assert one.dtype == other.dtype
        size = float(one.abs().max().clamp(min=1))
        tolerance = 4 * torch.finfo(dtype).eps * size
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, msg=name)


def test_as_many_products_as_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(70, 24).bfloat16().requires_grad_()
    weight, target = torch.randn(VOCAB, 24).bfloat16().requires_grad_(), torch.arange(70)
    for slow in (False, True):
        force(monkeypatch, slow)
        for name in SCHEDULES:
            options = options_of(name, torch.bfloat16)
            plan = explain(hidden, weight, target, options=options)
            with Operations() as operations:
                linear_logprob(hidden, weight, target, options=options).logp.sum().backward()
            assert operations.flop / (2 * 70 * 24 * VOCAB) == pytest.approx(plan.units, rel=0.02)


@both_ways
def test_explain_says_so(way: str) -> None:
    hidden, weight = torch.randn(70, 24).bfloat16(), torch.randn(VOCAB, 24).bfloat16()
    calls = {
        "scores": explain(hidden, weight, torch.arange(70)),
        "float32": explain(hidden.float(), weight.float(), torch.arange(70)),
    }
    assert calls["scores"].widens == (way == "float32")
    assert (calls["scores"].product_room > 0) == (way == "float32")
    said = ", bfloat16 products in float32 blocks" in str(calls["scores"])
    assert said == (way == "float32")
    assert not calls["float32"].widens and "blocks" not in str(calls["float32"])
    data = Data(torch.bfloat16)
    options = ScoringOptions(schedule="batches", memory_budget=1 << 12)
    given = {"ref_logps": torch.zeros(8), "options": options}
    batches = explain(data.hidden, data.weight, data.target, "dpo", **given)
    assert ("products in float32 blocks" in str(batches)) == (way == "float32")


@pytest.mark.parametrize("budget", [1 << 21, 1 << 24, 1 << 26, 1 << 28, 1 << 34])
def test_blocks_take_of_the_budget(budget: int) -> None:
    options = ScoringOptions(memory_budget=budget)

    def plan(**changes: Any) -> schedule.Plan:
        return schedule.choose(problem(device_type="cpu", **changes), options)

    plain, wide = plan(), plan(widens=True)
    assert plain.product_room == 0
    assert wide.product_room == min(products.MOST_ROOM, max(products.LEAST_ROOM, budget // 4))
    taken = wide.kept_rows * wide.kept_row_bytes + wide.product_room
    assert taken <= budget
    tiles = [tile for tile in wide.sizes[1:] if isinstance(tile, schedule.Tile)]
    for tile in tiles if wide.schedule != "keep" else ():
        assert tile.rows == schedule.LEAST_ROWS or taken + tile.nbytes(2) <= budget
    assert wide.workspace_bytes <= plain.workspace_bytes + wide.product_room
    # Ranks cut their rows alike, whatever processors they have.
    ranks = [plan(widens=one, sharded=True) for one in (False, True)]
    assert ranks[0].sizes == ranks[1].sizes and ranks[0].kept_rows == plain.kept_rows
    assert ranks[1].workspace_bytes == ranks[0].workspace_bytes + wide.product_room


@pytest.fixture
def asked_anew():
    products._slow_on_this_processor.cache_clear()
    yield
    products._slow_on_this_processor.cache_clear()


CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, multiplies: bool, native: bool) -> None:
    """An x86 processor on which torch has a 16-bit product, and which has the instructions."""
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: multiplies)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("asked_anew")
@low
def test_what_the_processor_says_decides(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(dtype: torch.dtype) -> float:
        raise AssertionError("timed")

    monkeypatch.setattr(products, "_slower_than_float32", never)
    pretend(monkeypatch, multiplies=False, native=False)
    name = str(dtype).removeprefix("torch.")
    assert products.slow_reason(dtype, CPU) == f"this processor has no {name} instructions"
    products._slow_on_this_processor.cache_clear()
    pretend(monkeypatch, multiplies=True, native=True)
    assert products.slow_reason(dtype, CPU) is None


@pytest.mark.usefixtures("asked_anew")
@low
@pytest.mark.parametrize("unknown", ["emulated", "limited", "another machine"])
@pytest.mark.parametrize("times", [1.2, 3.14])
def test_elsewhere_a_product_is_timed_once(
    dtype: torch.dtype, unknown: str, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, multiplies=True, native=unknown == "limited")
    if unknown == "limited":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    if unknown == "another machine":
        monkeypatch.setattr(products.platform, "machine", lambda: "arm64")
    calls: list[torch.dtype] = []
    monkeypatch.setattr(products, "_slower_than_float32", lambda one: calls.append(one) or times)
    found = [products.slow_reason(dtype, CPU) for _ in range(3)]
    assert calls == [dtype]
    assert found == [found[0]] * 3
    if times < products.SLOWER:
        assert found[0] is None
    else:
        assert found[0] is not None and "3.1 times as long" in found[0]


@low
def test_others_are_not_asked_about(dtype: torch.dtype) -> None:
    assert products.slow_reason(torch.float32, CPU) is None
    assert products.slow_reason(torch.float64, CPU) is None
    assert products.slow_reason(dtype, torch.device("cuda", 0)) is None
    assert products.slow_reason(dtype, torch.device("meta")) is None


@low
def test_the_timed_product_is_seen_by_nobody(dtype: torch.dtype) -> None:
    with Operations() as operations, torch.autocast("cpu", dtype=torch.bfloat16):
        assert products._slower_than_float32(dtype) > 0
    assert operations.flop == 0
    with FakeTensorMode(), torch.device("meta"):
        assert products._slower_than_float32(dtype) > 0


TIMING = """
import time, torch
from fastpref import linear_logprob
torch.set_num_threads(1)
def step(dtype):
    hidden = torch.randn(128, 256).to(dtype).requires_grad_()
    weight = (torch.randn(8192, 256) / 16).to(dtype).requires_grad_()
    target = torch.arange(128)
    return lambda: linear_logprob(hidden, weight, target).logp.sum().backward()
steps = [step(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
best = [float("inf")] * 3
for _ in range(6):
    for at, one in enumerate(steps):
        start = time.process_time()
        one()
        best[at] = min(best[at], time.process_time() - start)
print(best[1] / best[0], best[2] / best[0])
"""


@pytest.mark.heavy
def test_time_without_16_bit_instructions() -> None:
    """Torch's own products would take some 30 times as long."""
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", TIMING],
        env=os.environ | limits | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert max(map(float, done.stdout.split())) < 2
