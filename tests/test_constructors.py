# SPDX-License-Identifier: Apache-2.0
"""Every tensor that the package makes names its device and dtype: under another default device or
dtype of the user's it would be made there, and wrongly."""

import ast
from pathlib import Path

import pytest

import fastpref

ROOT = Path(fastpref.__file__).resolve().parent
# Symbolic links are not followed.
SOURCES = sorted(path for folder in (ROOT, ROOT / "kernels") for path in folder.rglob("*.py"))
CONSTRUCTORS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full"),
    *("hann_window", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn"),
    *("randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
    *("sparse_coo_tensor", "sparse_csr_tensor"),
}
MODULES = {"Linear", "Embedding", "LayerNorm", "RMSNorm", "Conv1d", "Bilinear"}
# Of the default dtype and device, whatever they are given.
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "LongTensor"}
NAMED = {"device", "dtype"}


def problems(source: str) -> list[str]:
    """Line and call of each constructor that does not say where it makes what."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = {alias.name for alias in node.names}
            if names & (CONSTRUCTORS | MODULES):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call) and not _says_where(node):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def _says_where(call: ast.Call) -> bool:
    called = ast.unparse(call.func)
    prefix, _, name = called.rpartition(".")
    given = {keyword.arg for keyword in call.keywords}
    if called in LEGACY or (prefix == "torch" and name in LEGACY):
        return False
    if prefix == "torch" and name == "where":
        # Of two numbers the result has the default dtype.
        return len(call.args) < 3 or not all(_is_number(one) for one in call.args[1:])
    makes = (prefix == "torch" and name in CONSTRUCTORS) or (
        prefix in ("nn", "torch.nn") and name in MODULES
    )
    # ``**host`` names them once for several.
    return not makes or None in given or given >= NAMED


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant) or ast.unparse(node) in ("math.inf", "torch.inf")


def test_there_are_sources() -> None:
    names = {path.name for path in SOURCES}
    assert {"workspace.py", "exp_rows.py", "moments.py"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_constructor_without_device_and_dtype(path: Path) -> None:
    found = problems(path.read_text())
    assert not found, f"{path}: name device and dtype\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "torch.empty(3)",
        "torch.zeros(3, device='cpu')",
        "torch.arange(3, dtype=torch.int64)",
        "torch.as_tensor(0.5, dtype=torch.float32)",
        "x = [torch.tensor([1.0])]",
        "torch.nn.Linear(2, 3)",
        "torch.Tensor(3)",
        "torch.where(mask, 1.0, -1.0)",
        "torch.where(mask, 0.0, -math.inf)",
        "from torch import zeros",
    ],
)
def test_what_is_found(source: str) -> None:
    assert problems(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.empty(3, device=x.device, dtype=x.dtype)",
        "torch.tensor(1, **host)",
        "torch.empty_like(x)",
        "x.new_zeros(3)",
        "torch.where(mask, x, 0.0)",
        "torch.where(mask)",
        "torch.frombuffer(memory, dtype=torch.uint8)",  # of the memory it is given
        "from torch import Tensor",
    ],
)
def test_what_is_not(source: str) -> None:
    assert not problems(source)
