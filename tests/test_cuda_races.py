# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the host under ThreadSanitizer: every access to memory of every CUDA thread,
ordered by barriers alone. Clusters and the memory that their blocks share are there too.

A race is found whatever the order in which the threads run: they take turns, and turns order
nothing (tests/cuda_on_host/coroutines.h).
"""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_on_host.kernels import Change, build_library, changed_sources, unavailable_reason
from tests.cuda_on_host.launches import LIBRARIES

pytestmark = pytest.mark.heavy

RACE = 66  # the exit code of a process in which a race was found
WATCHED = ("-fsanitize=thread", "-g")
# Fewer warps than on a device, and still several.
NARROW = Change("elements.cuh", "kThreads = 512;", "kThreads = 64;")


@functools.cache
def sanitizer_command() -> list[str]:
    """What runs a command under ThreadSanitizer, or an empty list where g++ has none."""
    path = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True)
    if not Path(library := path.stdout.strip()).is_absolute():
        return []
    environment = [f"LD_PRELOAD={library}", f"TSAN_OPTIONS=halt_on_error=1:exitcode={RACE}"]
    command = ["env", *environment, "OMP_NUM_THREADS=1"]
    # Where memory is laid out more at random than it expects, it does not start.
    started = subprocess.run([*command, "true"], capture_output=True)
    return command if started.returncode == 0 else ["setarch", "-R", *command]


@pytest.fixture(scope="module", autouse=True)
def sanitizer() -> list[str]:
    reason = unavailable_reason()
    if reason is None and not sanitizer_command():
        reason = "g++ has no libtsan"
    if reason is not None:
        pytest.skip(reason)
    return sanitizer_command()


def build(directory: Path, libraries: tuple[str, ...], watched: bool, *changes: Change) -> Path:
    csrc = changed_sources(directory, changes)
    for name in libraries:
        build_library(directory, name, csrc, WATCHED if watched else ())
    return directory


def launch(
    command: list[str], directory: Path, launches: str, prefix: str
) -> subprocess.CompletedProcess[str]:
    module = [sys.executable, "-m", "tests.cuda_on_host.launches"]
    command = [*command, *module, str(directory), str(directory / "results.pt"), launches, prefix]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def check_no_races(
    tmp_path: Path,
    sanitizer: list[str],
    libraries: tuple[str, ...],
    launches: str,
    prefix: str,
    *changes: Change,
) -> None:
    """And the same bits as without the sanitizer."""
    results = []
    for name, command in (("ordinary", []), ("watched", sanitizer)):
        (directory := tmp_path / name).mkdir()
        build(directory, libraries, name == "watched", *changes)
        done = launch(command, directory, launches, prefix)
        assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr[:6000]}"
        results.append(torch.load(directory / "results.pt"))
    ordinary, watched = results
    assert ordinary and ordinary.keys() == watched.keys()
    for launched, tensors in ordinary.items():
        for one, other in zip(tensors, watched[launched], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=launched)


@pytest.mark.slow
def test_no_kernel_has_a_race(tmp_path: Path, sanitizer: list[str]) -> None:
    check_no_races(tmp_path, sanitizer, LIBRARIES, "sample", "", NARROW)


@pytest.mark.slow
def test_no_map_and_order_of_warps_has_a_race(tmp_path: Path, sanitizer: list[str]) -> None:
    check_no_races(tmp_path, sanitizer, LIBRARIES[:1], "sweep", "", NARROW)


@pytest.mark.slow
def test_as_many_threads_as_on_a_device_have_no_race(tmp_path: Path, sanitizer: list[str]) -> None:
    prefix = "exp_rows-torch.float16-capped"
    check_no_races(tmp_path, sanitizer, LIBRARIES[:1], "sample", prefix)


REDUCED = ("pair_head", "pair_head-torch.float64")
CLUSTERED = ("row_kernels", "exp_rows-torch.float32-capped-1001-statistics-4")
FAULTS = {
    "a reduction overwrites what an earlier one still reads": (
        REDUCED,
        Change(
            "teams.cuh",
            "  __syncthreads();\n  if (threadIdx.x % kWarp == 0)",
            "  if (threadIdx.x % kWarp == 0)",
        ),
    ),
    "a reduction reads what another warp has not written": (
        REDUCED,
        Change("teams.cuh", "= value;\n  __syncthreads();\n  // Lanes", "= value;\n  // Lanes"),
    ),
    "a block overwrites what another still reads": (
        CLUSTERED,
        Change("teams.cuh", "    cluster_.sync();\n    return all;", "    return all;"),
    ),
    "a block reads what another has not written": (
        CLUSTERED,
        Change("teams.cuh", "of_block = value;\n    cluster_.sync();", "of_block = value;"),
    ),
    "two blocks of a grid write the same number": (
        ("row_kernels", "exp_rows-torch.float32-plain-1001-sums"),
        Change("row_kernels.cuh", "    sums[cpu::kAnchor * rows] =", "    sums[-i] ="),
    ),
}


# Of barriers of a block and of a cluster; one of none between blocks is run always.
SWEPT = list(FAULTS)[:-1]


@pytest.mark.parametrize(
    "fault",
    [pytest.param(one, marks=pytest.mark.slow) if one in SWEPT else one for one in FAULTS],
)
@pytest.mark.slow
def test_a_race_is_found(tmp_path: Path, sanitizer: list[str], fault: str) -> None:
    (library, prefix), change = FAULTS[fault]
    build(tmp_path, (library,), True, NARROW, change)
    done = launch(sanitizer, tmp_path, "sample", prefix)
    assert done.returncode == RACE, done.stderr[-3000:]
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
