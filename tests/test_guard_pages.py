# SPDX-License-Identifier: Apache-2.0
"""No kernel touches memory beyond its tensors: each runs on tensors that end, and then begin, at a
page that nothing may touch, in a process of its own."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import _extension
from fastpref.scoring.backends import triton as triton_backend
from tests import guard, guarded_launches
from tests.cuda_on_host.kernels import build_library, unavailable_reason
from tests.cuda_on_host.launches import LIBRARIES

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        guard.unavailable_reason() is not None, reason=str(guard.unavailable_reason())
    ),
]
interpreted = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on a GPU: pytest -m gpu")
launches = pytest.mark.parametrize(
    "launches", ["sample", pytest.param("sweep", marks=pytest.mark.slow)]
)
CAPABILITIES = ("baseline", "avx2", "avx512")


def run(family: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.guarded_launches", family, *arguments],
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def check(done: subprocess.CompletedProcess[str]) -> None:
    last = done.stdout.rstrip().rpartition("\n")[2]
    assert done.returncode == 0, f"ended with {done.returncode} in: {last}\n{done.stderr[-5000:]}"


@functools.cache
def capabilities() -> tuple[str, ...]:
    """The instruction sets of this processor."""
    if _extension.ops_unavailable_reason() is not None:
        return ()
    program = "import torch; from fastpref import _extension; "
    program += "_extension.ops_unavailable_reason(); "
    program += "print(torch.ops.fastpref.cpu_capability())"
    environment = {**os.environ, "FASTPREF_CPU_CAPABILITY": ""}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    return CAPABILITIES[: int(found.stdout) + 1]


@launches
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_operators(launches: str, capability: str) -> None:
    if capability not in capabilities():
        pytest.skip(f"no compiled operators for {capability} here")
    check(run("cpu", launches, FASTPREF_CPU_CAPABILITY=capability))


class Launched(TorchDispatchMode):
    """The names of fastpref's operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastpref":
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    _extension.ops_unavailable_reason() is not None, reason="the operators are not built"
)
def test_no_compiled_operator_is_left_out() -> None:
    there = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    with Launched() as launched:
        for launch in guarded_launches.cpu("sample", ""):
            launch.run(None, lambda tensor: tensor)
    assert launched.names == {name for name in there if name.startswith("fastpref::")}


@pytest.mark.slow
@launches
def test_cuda_kernels_on_the_host(launches: str, tmp_path: Path) -> None:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    for name in LIBRARIES:
        build_library(tmp_path, name)
    check(run("cuda", launches, str(tmp_path)))


@interpreted
@launches
@pytest.mark.parametrize(
    "family",
    [
        "glue",
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ("rows", "triton", "divergence_launch")
        ),
    ],
)
def test_triton_kernels(family: str, launches: str) -> None:
    check(run(family, launches, TRITON_INTERPRET="1"))


@interpreted
def test_a_kernel_that_reads_beyond_its_tensors_is_named() -> None:
    done = run("planted", "1", TRITON_INTERPRET="1")
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout.splitlines() == ["0 beyond, after", "0 beyond, before", "1 beyond, after"]
    assert "read_around" in done.stderr


@pytest.mark.parametrize("side", guard.SIDES)
def test_a_guarded_copy_has_the_values_and_strides(side: str) -> None:
    for tensor in (
        torch.randn(3, 7, dtype=torch.float64)[:, 2:6],
        torch.randn(5, 2000).bfloat16(),
        torch.randn(4, 3).t(),
        torch.tensor([True, False, True]),
        torch.empty(0, 5),
        torch.tensor(3),
    ):
        copy = guard.guarded(tensor, side)
        assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
        begin, end = copy.data_ptr(), copy.data_ptr() + copy.element_size() * guard.extent(copy)
        assert (begin if side == "before" else end) % guard.PAGE == 0
