# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels, and what the build registers, without a GPU."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastpref import _extension
from fastpref.scoring.backends import cuda

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"


def from_setup(name: str) -> list[str]:
    """A literal of setup.py, which cannot be imported: it would start a build."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    return list(ast.literal_eval(values[0]))


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def compile_kernels(source: Path, directory: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """What ptxas says of every kernel for every architecture, and their PTX for Hopper."""
    # All architectures in one call, so that the sources are parsed for the host once.
    numbers = [re.sub(r"\.", "", name) for name in from_setup("CUDA_ARCHITECTURES")]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    command = [str(find_nvcc()), *from_setup("NVCC"), *targets, f"-I{ROOT / 'csrc'}"]
    command += ["-fatbin", "-Xptxas=-v", "--keep", f"--keep-dir={directory}", str(source)]
    done = subprocess.run(
        [*command, "-o", "kernels.fatbin"], cwd=directory, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compiled = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    (listing,) = directory.glob("*90a.ptx")
    entries = listing.read_text().split(".visible .entry ")[1:]
    assert len({(entry, target) for entry, target, *_ in compiled}) == len(entries) * len(numbers)
    return compiled, entries


needs_nvcc = pytest.mark.skipif(
    find_nvcc() is None or not SOURCES.exists(), reason="needs nvcc and a checkout"
)


@needs_nvcc
@pytest.mark.slow
def test_kernels_keep_to_registers_and_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    compiled, entries = compile_kernels(SOURCES / "row_kernels.cu", tmp_path)
    # Four kernels of exp_rows and one of each other operator, for every element type.
    assert len(entries) == 32
    for entry, target, stack, stores, loads, registers in compiled:
        assert (stack, stores, loads) == ("0", "0", "0"), (entry, target)
        # Two blocks of 512 threads a multiprocessor; one for float64.
        assert int(registers) <= (128 if re.search("kernelId", entry) else 64), (entry, target)
    wide_load = r"ld\.global\.(v4|v2\.[fbu]64)|cp\.async\.c[ag]\.shared\.global .*, 16"
    for text in entries:
        name = text.split("(")[0]
        if "settle_rows" in name:  # a thread a row, and few rows
            continue
        assert re.search(wide_load, text), name
        assert ("barrier.cluster" in text) == ("cluster_kernel" in name), name
        if "target_logits" not in name:
            assert re.search(r"st\.global\.(v4|v2\.[fbu]64)", text), name


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernels", "most_registers"),
    [("sequence_sums", 4, 64), ("pair_head", 2, 128)],  # 512 threads, two blocks and one
)
def test_kernels_after_the_tokens_keep_to_registers(
    tmp_path: Path, name: str, kernels: int, most_registers: int
) -> None:
    compiled, entries = compile_kernels(SOURCES / f"{name}.cu", tmp_path)
    assert len(entries) == kernels
    for entry, target, stack, stores, loads, registers in compiled:
        assert (stack, stores, loads) == ("0", "0", "0"), (entry, target)
        assert int(registers) <= most_registers, (entry, target)


@pytest.mark.skipif(not _extension.OPS_LIBRARY.exists(), reason="fastpref/_ops.so is not built")
def test_cuda_kernels_are_registered_exactly_where_the_build_says_so() -> None:
    built = _extension.build_info().get("cuda")
    if built is None:
        pytest.skip("the build left no facts about CUDA")
    assert _extension.ops_unavailable_reason() is None
    rows = ("exp_rows_", "logit_grad_", "target_logits", "settle_rows_", "scale_rows_")
    for name in (*rows, "sequence_sums", "pair_head"):
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpref::{name}", "CUDA")
        assert has == (not built.startswith("not built")), name


def test_backend_says_why_it_cannot_serve() -> None:
    assert "runs on CUDA tensors, got cpu" in str(cuda.unavailable_reason("cpu"))
    if not torch.cuda.is_available():
        assert cuda.unavailable_reason("cuda") is not None


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_kernels_loaded_beside_a_torch_without_cuda_say_so() -> None:
    if _extension.ops_unavailable_reason() is not None:
        pytest.skip("fastpref/_ops.so is not built")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastpref::exp_rows_", "CUDA"):
        pytest.skip("built without CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    row, target = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="names no CUDA stream to fastpref; use backend='torch'"):
        torch.ops.fastpref.exp_rows_.default.redispatch(
            keys, row[:, None], target, row, None, 1.0, 0.0, None, False, False
        )
