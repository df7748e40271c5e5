# SPDX-License-Identifier: Apache-2.0
"""What all tests share: uninitialised memory holds NaN, two threads, a fixed seed, and the
repository root on the path, for helper modules beside the tests."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Read when torch is imported. Threads that spin while they wait make tests on shared cores several
# times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# The same for the subprocesses that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
)

# Kernels run in Triton's interpreter, which is chosen when they are imported; not in the
# subprocesses that tests start.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("fastpref.scoring.backends.triton")
    importlib.import_module("fastpref.scoring.backends.rows")
    importlib.import_module("fastpref.scoring.backends.divergence_launch")
    importlib.import_module("fastpref.diffusion.backends.triton")
    # Triton imports it later on, which fails once the variable is gone.
    importlib.import_module("triton.experimental.gluon")
    del os.environ["TRITON_INTERPRET"]

torch.set_num_threads(min(2, torch.get_num_threads()))


# The garbage collector goes through all that is imported and collected again and again: twenty
# thousand cases, most of which are left out, and what takes a second where a test asks for it.
gc.disable()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="leave out tests marked heavy, and run parametrised ones with each value once, "
        "not with every combination",
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    from tests.sampling import sample, sweep

    # Before -m, which then leaves these out.
    for item in sweep(items):
        item.add_marker("slow")
    result = yield
    # After it, so that what is left has each value.
    if config.getoption("quick"):
        kept = set(sample(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    return result


@pytest.fixture(scope="session")
def two_ranks():
    """``two_ranks(function, *args)``: what ``function(rank, *args)`` returns on each of two."""
    from tests.ranks import Ranks

    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks():
    """``two_ranks``, of four."""
    from tests.ranks import Ranks

    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_kept():
    """What a test replaces must not be hidden by what calls of others left."""
    from fastpref.preference import task
    from fastpref.scoring import api, divergence

    every = api._KEPT, divergence._KEPT, task._KEPT
    for kept in every:
        kept.forget()
    yield
    for kept in every:
        kept.forget()


def _poisoned(allocate):
    """``allocate``, with NaN in what it returns to a module of fastpref."""

    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("fastpref"):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype == torch.uint8:
                tensor.fill_(0xFF)
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that fastpref allocates and does not initialise reads as NaN, also when a buffer is
    lent a second time: bytes of 0xff are a NaN in every floating dtype."""
    from fastpref.scoring import workspace

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    take = workspace._take

    def take_poisoned(nbytes):
        buffer = take(nbytes)
        buffer.memory.fill_(0xFF)
        return buffer

    monkeypatch.setattr(workspace, "_take", take_poisoned)
