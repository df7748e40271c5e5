# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref env``: what this installation can do, and why it cannot do the rest.

Every probe is guarded: a broken part is reported and the others still print. Libraries are asked
for their version without being imported, except torch, which fastpref needs anyway.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..scoring.types import Backend

PACKAGES = (
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "liger-kernel",
)
BACKENDS: tuple[Backend, ...] = ("torch", "cpp", "rows", "triton", "cuda")
ON_GPUS, NO_GPU = ("rows", "triton", "cuda"), "no GPU"
# Name, when it is read, meaning.
VARIABLES = (
    ("FASTPREF_CPU_CAPABILITY", "run", "baseline, avx2 or avx512: lowers the CPU instruction set"),
    ("FASTPREF_CACHE_DIR", "run", "where verdicts of `tune` lie; otherwise fastpref/ in ~/.cache"),
    ("FASTPREF_SKIP_EXT", "build", "1: build no compiled library"),
    ("FASTPREF_FORCE_EXT", "build", "1: fail where the compiled library cannot be built"),
    ("FASTPREF_BUILD_CUDA", "build", "0, auto or 1: CUDA sources never, where nvcc works, always"),
    ("TORCH_CUDA_ARCH_LIST", "build", "CUDA architectures, such as 8.0;9.0a;10.0+PTX"),
    ("CUDA_HOME", "build", "CUDA toolkit; otherwise the one of the nvcc on PATH"),
    ("CXX", "build", "C++ compiler; otherwise g++"),
    ("CXXFLAGS", "build", "added to the C++ compiler's flags"),
    ("LDFLAGS", "build", "added to the linker's flags"),
    ("MAX_JOBS", "build", "compilers at work at the same time; otherwise one a core"),
)
# Largest error of a float32 score of the self-check's head, whose logits are of order 1.
# Largest error of a log-probability by dtype of the inputs; products are rounded to it.
SELF_CHECK_BOUNDS = {"float32": 1e-5, "bfloat16": 5e-2}
# On a GPU each dtype has kernels of its own, which may not serve.
SELF_CHECK_DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}

Report = dict[str, Any]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of ``env``."""
    parser = subparsers.add_parser("env", help=__doc__, description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 1 when the self-check fails, else 0."""
    report = collect()
    print(json.dumps(report, indent=2, default=str) if args.json else render(report))
    return 0 if report["self_check"].get("ok") else 1


def collect() -> Report:
    """Every section of the report by name; a section whose probe failed is ``{"error": ...}``."""
    probes: dict[str, Callable[[], Report]] = {
        "versions": _versions,
        "libraries": _libraries,
        "build": _build,
        "cpu": _cpu,
        "gpus": _gpus,
        "backends": _backends,
        "tiers": _tiers,
        "tuning": _tuning,
        "trl": _trl,
        "environment": _environment,
        "self_check": _self_check,
    }
    # First, for what its launches show of the kernels.
    checked = _guarded(probes.pop("self_check"))
    return {name: _guarded(probe) for name, probe in probes.items()} | {"self_check": checked}


def _guarded(probe: Callable[[], Report]) -> Report:
    try:
        return probe()
    except Exception as error:  # a report must come out of any installation
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> Report:
    import torch

    from .. import __version__

    versions = {"python": platform.python_version(), "fastpref": __version__}
    versions["torch"] = torch.__version__
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _libraries() -> Report:
    from .. import _extension

    module = _extension.native_module()
    return {
        "_ops": _extension.ops_unavailable_reason() or str(_extension.OPS_LIBRARY),
        "_C": _extension.native_module_unavailable_reason() or str(module and module.__file__),
    }


def _build() -> Report:
    from .. import _extension

    return _extension.build_info() or {"built": "no: a checkout that was never built"}


def _cpu() -> Report:
    import torch

    from .. import _extension
    from ..scoring.products import slow_reason

    report: Report = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    for name in ("bfloat16", "float16"):
        reason = slow_reason(getattr(torch, name), torch.device("cpu"))
        report[f"{name} products"] = f"in float32 blocks: {reason}" if reason else f"in {name}"
    module = _extension.native_module()
    if module is None:
        return report
    report["features"] = module.cpu_features()
    report["capability"] = module.cpu_capability()
    if module.cpu_capability_note():
        report["note"] = module.cpu_capability_note()
    return report


def _gpus() -> Report:
    import torch

    if not torch.cuda.is_available():
        return {}
    gpus = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return {
        f"cuda:{i}": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        for i, gpu in enumerate(gpus)
    }


def _device_types() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _backends() -> Report:
    from ..scoring.backends import unavailable_reason

    report: Report = {
        device: {name: unavailable_reason(name, device) or "available" for name in BACKENDS}
        for device in _device_types()
    }
    if "cuda" not in report:
        for name in ON_GPUS:
            if report["cpu"][name] != "available":  # as under Triton's interpreter
                report["cpu"][name] = NO_GPU
    return report


def _tiers() -> Report:
    """What ``backend="auto"`` takes on each GPU, and why not what comes before it."""
    import torch

    from ..scoring.backends import TIERS, choose, unavailable_reason
    from ..scoring.backends.choice import Size
    from ..scoring.backends.probe import failures

    report: Report = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device, failed = torch.device("cuda", index), failures()
        size = Size(torch.bfloat16, 8192, 4096, 128256)
        tier = choose("auto", device, size)
        reasons = {name: unavailable_reason(name, "cuda") for name in TIERS}
        reasons |= {
            name: failed[f"{name} on {device}"] for name in TIERS if f"{name} on {device}" in failed
        }
        if reasons.get(tier) is not None:
            tier = next(name for name in TIERS[TIERS.index(tier) :] if reasons[name] is None)
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        report[str(device)] = tier + (f" ({why})" if why else "")
    return report


def _tuning() -> Report:
    from ..scoring.backends import verdict

    return {"verdicts": verdict.describe()}


def _trl() -> Report:
    """What ``fastpref.integrations.trl.patch`` lets score on fastpref. Asks TRL, where it is."""
    from ..integrations.trl import would_reach

    try:
        importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return {"patch()": "TRL is not installed"}
    return dict(would_reach())


def _environment() -> Report:
    return {
        name: {"value": os.environ.get(name), "read": when, "meaning": meaning}
        for name, when, meaning in VARIABLES
    }


def _self_check() -> Report:
    import torch

    from .. import ScoringOptions, linear_logprob
    from ..scoring.backends import unavailable_reason

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 32, generator=generator, dtype=torch.float64, device="cpu")
    weight = torch.randn(999, 32, generator=generator, dtype=torch.float64, device="cpu") / 32**0.5
    target = torch.randint(999, (48,), generator=generator, dtype=torch.int64, device="cpu")
    errors: dict[str, float] = {}
    fine = True
    wanted = (
        one
        for device in _device_types()
        for one in itertools.product([device], BACKENDS, SELF_CHECK_DTYPES[device])
    )
    for device, name, dtype in wanted:
        if unavailable_reason(name, device) is not None:
            continue
        trained, head = (
            one.to(device, getattr(torch, dtype)).requires_grad_(dtype == "bfloat16")
            for one in (hidden, weight)
        )
        got = linear_logprob(
            trained, head, target.to(device), options=ScoringOptions(backend=name)
        ).logp
        if got is None:
            continue
        if dtype == "bfloat16":  # what training takes
            got.sum().backward()
        exact = trained.detach().cpu().double() @ head.detach().cpu().double().T
        expected = exact.log_softmax(-1).gather(1, target[:, None])[:, 0]
        error = (got.detach().cpu().double() - expected).abs().max().item()
        errors[f"{name} on {device}" + " in bfloat16" * (dtype == "bfloat16")] = error
        # Written so that a NaN fails.
        fine = fine and error <= SELF_CHECK_BOUNDS[dtype]
    return {"ok": bool(errors) and fine, "max_error": errors}


def render(report: Report) -> str:
    """The report as text, a section a paragraph."""
    lines: list[str] = []
    for section, entries in report.items():
        if section in ("environment", "self_check"):
            continue
        lines += [section, *_render_entries(entries), ""]
    lines += ["environment", *_render_environment(report["environment"]), ""]
    lines.append(_render_self_check(report["self_check"]))
    return "\n".join(lines)


def _render_entries(entries: Report, indent: str = "  ") -> list[str]:
    lines = [] if entries else [f"{indent}{NO_GPU}"]  # what may be empty is about GPUs
    for name, value in entries.items():
        if isinstance(value, dict) and all(isinstance(one, bool) for one in value.values()):
            value = " ".join(key for key, present in value.items() if present) or "none"
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_render_entries(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<20} {value}")
    return lines


def _render_environment(variables: Report) -> list[str]:
    if "error" in variables:
        return _render_entries(variables)
    return [
        f"  {name:<24} {entry['value'] or 'not set':<12} {entry['read'] + ' time:':<11} "
        f"{entry['meaning']}"
        for name, entry in variables.items()
    ]


def _render_self_check(check: Report) -> str:
    if "error" in check:
        return f"self-check: FAILED, {check['error']}"
    found = ", ".join(f"{name} {error:.1e}" for name, error in check["max_error"].items())
    return f"self-check: {'OK' if check['ok'] else 'FAILED'}, largest error against fp64: {found}"
