# SPDX-License-Identifier: Apache-2.0
"""The Triton launches of scoring calls, recorded and not made: CPU tensors stand for a GPU's.

Run as a program of its own, outside Triton's interpreter: ``python -m tests.kernels.launches
NUMBER``, of the capability; prints JSON, for each case of ``CASES`` and number of rows the launches
of a forward and a backward pass. What the kernels would have computed is arbitrary.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import JITFunction
from triton.runtime.jit import create_function_from_signature

from fastpref import ScoringOptions, linear_divergence, linear_logprob
from fastpref.diffusion import backends as diffusion_backends
from fastpref.diffusion import log_ratio, step_log_prob
from fastpref.diffusion.backends import triton as diffusion_triton
from fastpref.kernels import resources, variants
from fastpref.scoring import backward, forward, workspace
from fastpref.scoring.backends import probe, tiled
from fastpref.scoring.backends import rows as rows_backend
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.statistics import OUTPUTS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64)
Launch = tuple[Any, ...]


def key_of_variant(variant: variants.Variant) -> Launch:
    """What a compiled kernel is looked up by."""
    said = {
        name: f"{type_}{'!' if aligned else ''}"
        for name, (type_, aligned) in resources.signature(variant).items()
        if name not in variant.constants
    }
    said |= {name: f"={value}" for name, value in variant.constants.items()}
    said |= {"num_warps": str(variant.warps), "num_stages": str(variant.stages)}
    said["maxnreg"] = str(variant.registers)
    return (variant.kernel.__name__, tuple(sorted(said.items())))


class Recorder:
    """Launches since ``take`` was last called, on a chip of some capability."""

    def __init__(self, capability: int) -> None:
        self.backend = make_backend(GPUTarget("cuda", capability, 32))
        self.binders: dict[str, Callable[..., Any]] = {}
        self.launches: list[Launch] = []
        properties = SimpleNamespace(
            major=capability // 10, minor=capability % 10, multi_processor_count=132
        )
        triton_backend._properties = lambda device: properties
        for backend in (triton_backend, rows_backend):
            backend.unavailable_reason = lambda device_type: None
        rows_backend._processors = lambda device: properties.multi_processor_count
        # What is tried is arbitrary here, and the same kernels once more.
        probe.passes = lambda tier, kernel, device, check: True
        diffusion_backends.of = lambda *tensors: diffusion_triton
        torch.cuda.current_device = lambda: 0
        for module in (workspace, forward, backward, tiled):
            for name, stand_in in (("lease", _lease), ("row_stride", _row_stride)):
                if hasattr(module, name):
                    setattr(module, name, stand_in)
        triton_backend.row_stride = _row_stride
        recorder = self

        def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            recorder.launches.append(recorder.key(self, args, kwargs))

        JITFunction.run = run

    def key(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
        if kernel.__name__ not in self.binders:
            self.binders[kernel.__name__] = create_function_from_signature(
                kernel.signature, kernel.params, self.backend
            )
        values, specialization, options = self.binders[kernel.__name__](*args, **kwargs)
        said = {"num_warps": "4", "num_stages": "3", "maxnreg": "None"}
        for (name, value), (type_, attribute) in zip(values.items(), specialization, strict=True):
            if type_ == "constexpr":
                said[name] = f"={getattr(value, 'value', value)}"
            else:
                said[name] = type_ + "!" * ("D" in str(attribute or ""))
        said |= {name: str(value) for name, value in options.items() if name in said}
        return (kernel.__name__, tuple(sorted(said.items())))

    def take(self) -> list[Launch]:
        taken, self.launches = self.launches, []
        return taken


def _row_stride(cols: int, dtype: torch.dtype, device: torch.device) -> int:
    aligned = max(1, 16 // dtype.itemsize)
    return -(-cols // aligned) * aligned


def _lease(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    *rows, cols = shape
    stride = _row_stride(cols, dtype, device)
    return torch.empty((*rows, stride), dtype=dtype, device=device)[..., :cols]


def score(rows: int, dtype: torch.dtype, width: int = 64, vocab: int = 512, **changes: Any) -> None:
    """Forward and backward of a call. ``changes``: bias, softcap, outputs, needs, what receives a
    gradient, options."""
    needs = changes.pop("needs", ("hidden", "weight"))
    differentiated = changes.pop("differentiated", ("logp",))
    options = ScoringOptions(backend=changes.pop("backend", "triton"), **changes.pop("options", {}))
    bias = torch.zeros(vocab) if changes.pop("bias", False) else None
    hidden, weight = (
        torch.zeros(n, width, dtype=dtype, requires_grad=name in needs)
        for n, name in ((rows, "hidden"), (vocab, "weight"))
    )
    target = torch.arange(rows) % vocab
    scores = linear_logprob(hidden, weight, target, bias=bias, options=options, **changes)
    if needs:
        sum(getattr(scores, name).sum() for name in differentiated).backward()


def diverge(rows: int, dtype: torch.dtype, vocab: int = 512, **changes: Any) -> None:
    student, teacher = (torch.zeros(rows, 64, dtype=dtype, requires_grad=n == 0) for n in (0, 1))
    weight = torch.zeros(vocab, 64, dtype=dtype)
    options = ScoringOptions(backend=changes.pop("backend", "triton"))
    linear_divergence(
        student, weight, teacher.detach(), weight, options=options, **changes
    ).sum().backward()


def denoise(samples: int, dtype: torch.dtype, *sizes: int, masked: bool = False) -> None:
    model, ref = (torch.zeros(samples, *sizes, dtype=dtype, requires_grad=n == 0) for n in (0, 1))
    mask = torch.ones(samples, *sizes, dtype=torch.bool) if masked else None
    log_ratio(model, ref, ref, mask=mask).sum().backward()


def take_a_step(samples: int, dtype: torch.dtype) -> None:
    mean = torch.zeros(samples, 4, 8, 8, dtype=dtype, requires_grad=True)
    step_log_prob(mean.detach(), mean, std=1.0).sum().backward()


# Calls whose launches must be compiled beforehand and not anew for other numbers of rows. A tier
# of its own adds its calls here.
CASES: dict[str, Callable[[int, torch.dtype], None]] = {
    "keep": score,
    "no gradient": lambda n, dtype: score(n, dtype, needs=()),
    "statistics": lambda n, dtype: score(n, dtype, needs=(), outputs=OUTPUTS),
    "frozen head": lambda n, dtype: score(n, dtype, needs=("hidden",)),
    "recompute": lambda n, dtype: score(n, dtype, options={"schedule": "recompute"}),
    "entropy": lambda n, dtype: score(
        n, dtype, outputs=OUTPUTS, differentiated=("logp", "entropy", "lse")
    ),
    "bias and cap": lambda n, dtype: score(
        n, dtype, bias=True, softcap=30.0, outputs=OUTPUTS, options={"schedule": "recompute"}
    ),
    "ragged": lambda n, dtype: score(n, dtype, vocab=515, options={"schedule": "recompute"}),
    "chunks": lambda n, dtype: score(n, dtype, needs=(), options={"chunk_rows": 7}),
    "small budget": lambda n, dtype: score(
        n, dtype, vocab=5000, options={"schedule": "recompute", "memory_budget": 1 << 17}
    ),
    "odd width": lambda n, dtype: score(n, dtype, width=63, outputs=OUTPUTS),
    "rank 8": lambda n, dtype: score(n, dtype, width=72, outputs=OUTPUTS),
    "rows: keep": lambda n, dtype: score(n, dtype, backend="rows"),
    "rows: no gradient": lambda n, dtype: score(n, dtype, backend="rows", needs=()),
    "rows: long": lambda n, dtype: score(n, dtype, backend="rows", vocab=20_000),
    "rows: statistics": lambda n, dtype: score(
        n, dtype, backend="rows", outputs=OUTPUTS, differentiated=("logp", "entropy", "lse")
    ),
    "rows: bias and cap": lambda n, dtype: score(
        n, dtype, backend="rows", vocab=515, bias=True, softcap=30.0, outputs=OUTPUTS
    ),
    "rows: recompute": lambda n, dtype: score(
        n, dtype, backend="rows", options={"schedule": "recompute"}
    ),
    "rows: temperatures": lambda n, dtype: score(
        n, dtype, backend="rows", outputs=OUTPUTS, temperature=torch.ones(n)
    ),
    "triton: temperatures": lambda n, dtype: score(n, dtype, temperature=torch.ones(n)),
    "divergence": diverge,
    "cosine": lambda n, dtype: diverge(n, dtype, divergence="cosine"),
    "denoising": lambda n, dtype: denoise(n, dtype, 4, 8, 8),
    "denoising, masked": lambda n, dtype: denoise(n, dtype, 4, 8, 8, masked=True),
    "denoising, odd": lambda n, dtype: denoise(n, dtype, 3, 5, 7),
    "a step": take_a_step,
    "denoising, large": lambda n, dtype: denoise(n, dtype, 1 << 14),
}


def all_flags(rows: int, dtype: torch.dtype) -> Iterator[None]:
    """Calls with every combination of what a kernel is compiled for."""
    backends = ("triton", 1.0), ("rows", 1.0), ("rows", torch.ones(rows))
    for (backend, temperature), bias, cap, vocab, outputs in itertools.product(
        backends, (False, True), (None, 30.0), (512, 515), (("logp", "lse"), OUTPUTS)
    ):
        given = {"bias": bias, "softcap": cap, "vocab": vocab, "outputs": outputs}
        given |= {"backend": backend, "temperature": temperature}
        for needs in ((), ("hidden", "weight")):
            yield score(rows, dtype, needs=needs, **given)
        recompute = given | {"options": {"schedule": "recompute"}}
        yield score(rows, dtype, differentiated=("logp", "lse"), **recompute)
        yield score(rows, dtype, **recompute)
        if outputs == OUTPUTS:
            yield score(rows, dtype, differentiated=("logp", "entropy"), **recompute)
            yield score(rows, dtype, differentiated=("logp", "entropy", "lse"), **recompute)


def main() -> None:
    capability, element = int(sys.argv[1]), sys.argv[2]
    dtype = DTYPES[element]
    recorder = Recorder(capability)
    torch.set_num_threads(1)
    compiled = {key_of_variant(one) for one in variants.variants(capability, element)}
    of_case: dict[str, Any] = {}
    for name, case in CASES.items():
        forms: dict[str, set[Launch]] = {}
        for rows in ROWS:
            case(rows, dtype)
            for launch in recorder.take():
                forms.setdefault(launch[0], set()).add(launch)
        of_case[name] = {kernel: sorted(some) for kernel, some in forms.items()}
    for tf32 in (False, True) if element == "fp32" else (False,):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for _ in all_flags(48, dtype):
            pass
    launched = set(recorder.take())
    launched |= {one for forms in of_case.values() for some in forms.values() for one in some}
    found = {
        "forms": of_case,
        "launched": len(launched),
        "not compiled": sorted(launched - compiled),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
