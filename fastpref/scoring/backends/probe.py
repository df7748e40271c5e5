# SPDX-License-Identifier: Apache-2.0
"""A kernel serves a device once it has been seen right there.

Before its first launch on a device each kernel works on a few rows whose products are whole
numbers, so that every backend forms the same ones, and is compared with plain torch. Where it does
not compile, does not run or computes something else, the next tier serves instead, and one warning
names the reason. The comparison is read by the host: once a kernel and device, never while a graph
is being captured.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rows import Scored, TargetLogits
from ..slab import Projection, Slab
from ..statistics import OUTPUTS, RowScores, RowSums, token_scores
from ..types import LogitMap, statistics_dtype
from . import RowBackend, UpstreamGradient, next_tier
from . import torch as torch_backend
from .tiled import Tiled

logger = logging.getLogger("fastpref")

ROWS, WIDTH = 6, 64
PLAIN = Tiled(torch_backend)  # what a kernel is compared with
_lock = threading.Lock()
_reasons: dict[tuple[str, torch.device, Hashable], str | None] = {}


def failures() -> dict[str, str]:
    """Of the kernels tried so far in this process: by tier and device, why they do not serve."""
    with _lock:
        return {f"{tier} on {device}": why for (tier, device, _), why in _reasons.items() if why}


def passes(tier: str, kernel: Hashable, device: torch.device, check: Callable[[], str]) -> bool:
    """Whether ``kernel`` of ``tier`` computes on ``device`` what it should. ``check`` says what is
    wrong, "" where nothing is."""
    key = tier, device, kernel
    with _lock:
        if key in _reasons:
            return _reasons[key] is None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Compiling and reading a result are both forbidden here.
        logger.warning(
            "fastpref's %s kernels were not used before this CUDA graph, which gets torch's "
            "operators instead; run the step once before it is captured",
            tier,
        )
        return False
    try:
        with torch.no_grad():
            wrong = check()
    except torch.OutOfMemoryError:
        # Says nothing of the kernel: the call runs again with less, and so does this.
        raise
    except Exception as error:  # whatever compiler, driver and launch raise
        wrong = f"{type(error).__name__}: {error}"
    with _lock:
        warned = any(why and (one, at) == (tier, device) for (one, at, _), why in _reasons.items())
        _reasons[key] = wrong or None
    if wrong and not warned:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        logger.warning(
            "fastpref's %s kernels do not serve %s (%s); the %s backend does instead, right but "
            "slower. `python -m fastpref env` shows what serves; a newer triton or driver may "
            "help, and ScoringOptions(backend=...) chooses",
            tier,
            name,
            wrong.strip().splitlines()[-1][:300],
            next_tier(tier, device.type)[0],
        )
    return not wrong


@dataclass(frozen=True)
class Probed:
    """A backend whose kernels serve where they pass, and the next tier where not."""

    tier: str
    backend: RowBackend

    def needs_tile(self, dtype: torch.dtype, write: bool) -> bool:
        return self.backend.needs_tile(dtype, write)

    def temporary_bytes(
        self, rows: int, cols: int, device_type: str, dtype: torch.dtype, statistics: bool
    ) -> int:
        return self.backend.temporary_bytes(rows, cols, device_type, dtype, statistics)

    def _serving(
        self, device: torch.device, kernel: Hashable, check: Callable[[RowBackend], str]
    ) -> RowBackend:
        if passes(self.tier, kernel, device, lambda: check(self.backend)):
            return self.backend
        return next_tier(self.tier, device.type)[1]

    def score(
        self, projection: Projection, write: bool, statistics: bool, formed: bool
    ) -> Scored | None:
        return None  # each kernel is tried by itself

    def gradient_factors(self, gradient: Tensor, scale: Tensor, rate: float) -> Tensor:
        return self.backend.gradient_factors(gradient, scale, rate)

    def project(
        self, projection: Projection, anchor: Tensor, write: bool, statistics: bool
    ) -> RowSums:
        serving = self._projecting(projection, write, statistics)
        return serving.project(projection, anchor, write, statistics)

    def exp_rows(
        self, projection: Projection, anchor: Tensor, write: bool, statistics: bool
    ) -> RowSums:
        serving = self._projecting(projection, write, statistics)
        return serving.exp_rows(projection, anchor, write, statistics)

    def _projecting(self, projection: Projection, write: bool, statistics: bool) -> RowBackend:
        hidden, slab = projection[:2]
        return self._serving(
            hidden.device,
            ("project", *_compiled_for(hidden, slab), write, statistics),
            lambda backend: _check_project(backend, _Example.of(hidden, slab), write, statistics),
        )

    def project_gradient(self, projection: Projection, upstream: UpstreamGradient) -> None:
        serving = self._differentiating(projection, upstream)
        serving.project_gradient(projection, upstream)

    def logit_grad(self, projection: Projection, upstream: UpstreamGradient) -> None:
        serving = self._differentiating(projection, upstream)
        serving.logit_grad(projection, upstream)

    def _differentiating(self, projection: Projection, upstream: UpstreamGradient) -> RowBackend:
        hidden, slab = projection[:2]
        given = tuple(one is not None for one in upstream)
        return self._serving(
            hidden.device,
            ("project_gradient", *_compiled_for(hidden, slab), given),
            lambda backend: _check_gradient(backend, _Example.of(hidden, slab), given),
        )

    def target_logits(self, hidden: Tensor, slab: Slab, target: Tensor) -> TargetLogits:
        serving = self._serving(
            hidden.device,
            ("target_logits", *_compiled_for(hidden, slab)),
            lambda backend: _check_target_logits(backend, _Example.of(hidden, slab)),
        )
        return serving.target_logits(hidden, slab, target)

    def settle(
        self, sums: RowSums, own: TargetLogits, exps: Tensor | None, map: LogitMap
    ) -> tuple[RowScores, Tensor]:
        dtype = sums.sum.dtype if exps is None else exps.dtype
        flags = exps is None, sums.best is None, map.cap != 0
        serving = self._serving(
            sums.sum.device,
            ("settle", dtype, *flags),
            lambda backend: _check_settle(backend, sums.sum.device, dtype, map, *flags),
        )
        return serving.settle(sums, own, exps, map)

    def scale_rows(self, rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        serving = self._serving(
            rows.device,
            ("scale_rows", rows.dtype, out.dtype),
            lambda backend: _check_scale(backend, rows.device, rows.dtype, out.dtype, factor.dtype),
        )
        return serving.scale_rows(rows, factor, out)


def _compiled_for(hidden: Tensor, slab: Slab) -> tuple[Hashable, ...]:
    """What kernels are compiled anew for. Among it whether rows, and the columns of a tile, end at
    multiples of 16 elements, as those of the example then do."""
    weight, bias, map = slab
    remainders = hidden.shape[1] % 16 == 0, weight.shape[0] % 16 == 0
    return hidden.dtype, *remainders, bias is None, map.cap != 0, map.factor is not None


@dataclass(frozen=True)
class _Example:
    """Hidden states and weights of -1, 0 and 1: their products are exact in every dtype. Sizes have
    the remainders of those that are to be served."""

    hidden: Tensor
    slab: Slab
    target: Tensor

    @classmethod
    def of(cls, hidden: Tensor, slab: Slab) -> _Example:
        device, dtype, bias = hidden.device, hidden.dtype, slab.bias
        width = WIDTH + hidden.shape[1] % 16
        columns = (4096 if device.type == "cuda" else 256) + slab.weight.shape[0] % 16
        generator = torch.Generator("cpu").manual_seed(0)

        def whole(*shape: int) -> Tensor:
            return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int64, device="cpu")

        states, weights = whole(ROWS, width), whole(columns, width)
        target = torch.randint(
            columns, (ROWS,), generator=generator, device="cpu", dtype=torch.int64
        )
        # As far below the largest as such products go: the anchor will not do.
        weights[target[1]] = -states[1]
        weights[(target[1] + 1) % columns] = states[1]
        if bias is not None:
            random = torch.randn(columns, generator=generator, dtype=torch.float64, device="cpu")
            bias = random.to(device, statistics_dtype(dtype))
        map = slab.map
        if map.factor is not None:
            at = torch.arange(1, ROWS + 1, dtype=map.factor.dtype, device=device)
            map = map._replace(factor=at / 4)
        slab = Slab(weights.to(device, dtype), bias, map)
        return cls(states.to(device, dtype), slab, target.to(device))

    def tile(self) -> Tensor:
        from ..workspace import lease

        shape = self.hidden.shape[0], self.slab.weight.shape[0]
        return lease(shape, self.hidden.dtype, self.hidden.device)

    def own(self) -> TargetLogits:
        return torch_backend.target_logits(self.hidden, self.slab, self.target)


def _check_project(backend: RowBackend, example: _Example, write: bool, statistics: bool) -> str:
    hidden, slab, target = example.hidden, example.slab, example.target
    outputs: tuple[str, ...] = ("logp", "lse")
    if statistics:
        # Mean logits are a statistic under a cap alone.
        outputs = tuple(one for one in OUTPUTS if slab.map.cap != 0 or one != "mean_logits")
    own, found = example.own(), []
    for one in (backend, PLAIN):
        tile = example.tile() if one.needs_tile(hidden.dtype, write) else None
        projection = Projection(hidden, slab, tile, target)
        sums = one.project(projection, own.logit, write, statistics)
        kept = tile if write else None
        rows, scale = torch_backend.settle(sums, own, kept, slab.map)
        scores = token_scores(outputs, sums, rows, target, own.logit, slab.weight.shape[0])
        named = {name: value for name, value in scores._asdict().items() if value is not None}
        if kept is not None:
            named["exponentials"] = kept.to(scale.dtype) * scale[:, None]
        found.append(named)
    return differences(list(found), hidden.dtype)


def _check_gradient(backend: RowBackend, example: _Example, given: tuple[bool, ...]) -> str:
    hidden, slab, target = example.hidden, example.slab, example.target
    own, tile = example.own(), example.tile()
    projection = Projection(hidden, slab, tile, target)
    sums = PLAIN.project(projection, own.logit, write=False, statistics=True)
    rows, _ = torch_backend.settle(sums, own, None, slab.map)
    entropy = token_scores(("entropy",), sums, rows, target, own.logit, 1).entropy
    g = torch.arange(ROWS, dtype=rows.logp.dtype, device=tile.device) / 4 - 1
    values = rows.anchor, rows.norm, rows.logp, g, g + 0.5, 1 - g, entropy
    upstream = UpstreamGradient._make(
        one if there else None for one, there in zip(values, given, strict=True)
    )
    found = []
    for one in (backend, PLAIN):
        tile = example.tile()
        one.project_gradient(Projection(hidden, slab, tile, target), upstream)
        found.append({"gradients": tile.to(rows.logp.dtype)})
    return differences(list(found), hidden.dtype)


def _check_target_logits(backend: RowBackend, example: _Example) -> str:
    arguments = example.hidden, example.slab, example.target
    found = (one.target_logits(*arguments)._asdict() for one in (backend, PLAIN))
    return differences(list(found), torch.float32)


def _check_settle(
    backend: RowBackend,
    device: torch.device,
    dtype: torch.dtype,
    map: LogitMap,
    without_exps: bool,
    without_best: bool,
    *_: bool,
) -> str:
    exact = statistics_dtype(dtype)
    at = torch.arange(ROWS, dtype=exact, device=device)
    raw = at / 2 - 1
    own = TargetLogits(
        torch.arange(ROWS, device=device, dtype=torch.int64) - 1, raw, map.logit(raw)
    )
    anchor = torch.where(at < 3, own.logit, own.logit + 7)
    best = None if without_best else anchor + 1
    sums = RowSums(anchor, (at + 1) / 3, at / 8, best)
    found = []
    for one in (backend, PLAIN):
        exps = None
        if not without_exps:
            exps = torch.zeros((ROWS, 8), dtype=dtype, device=device)
        rows, scale = one.settle(sums, own, exps, map)
        named = {**rows._asdict(), "scale": scale}
        if exps is not None:
            named["exponentials"] = exps.to(exact)
        found.append(named)
    return differences(list(found), dtype)


def _check_scale(
    backend: RowBackend,
    device: torch.device,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    factor_dtype: torch.dtype,
) -> str:
    rows = (
        torch.arange(3 * 1040, device=device, dtype=torch.int64).view(3, 1040).fmod(251).to(dtype)
    )
    factor = torch.tensor([0.75, 0.0, -2.5], dtype=factor_dtype, device=device)
    found = (
        {"rows": one.scale_rows(rows, factor, torch.empty_like(rows, dtype=out_dtype))}
        for one in (backend, PLAIN)
    )
    return differences(list(found), out_dtype)


def differences(both: list[dict[str, Tensor]], dtype: torch.dtype) -> str:
    """Which values lie further apart than rounding to ``dtype`` or float32 sums explain."""
    found, expected = both
    for name, right in expected.items():
        own, right = found[name].double(), right.double()
        spread = 1e-4 if dtype.itemsize > 2 else 8 * torch.finfo(dtype).eps
        allowed = spread * right.abs() + 1e-4
        # Written so that a NaN fails where none is expected.
        fine = ((own - right).abs() <= allowed) | (own == right) | (own.isnan() & right.isnan())
        if not bool(fine.all()):
            worst = (own - right).abs().max().item()
            return f"{name} differ from torch's by up to {worst:.2g}"
    return ""
