# SPDX-License-Identifier: Apache-2.0
"""The names of the package, each of which is imported when it is first asked for."""

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import fastpref


@pytest.mark.parametrize("name", fastpref.__all__)
def test_every_name_leads_somewhere(name: str) -> None:
    found = getattr(fastpref, name)
    assert getattr(fastpref, name) is found and name in dir(fastpref)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert found.__name__ == name and found.__module__.startswith("fastpref.")
    elif name != "__version__":
        assert isinstance(found, ModuleType) and found.__name__ == f"fastpref.{name}"


def test_another_name() -> None:
    with pytest.raises(AttributeError, match="module 'fastpref' has no attribute 'preference_los'"):
        fastpref.preference_los  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'linear_logprobs'"):
        from fastpref import linear_logprobs  # noqa: F401


def test_all_of_them_at_once() -> None:
    names: dict[str, object] = {}
    exec("from fastpref import *", names)
    assert set(fastpref.__all__) <= set(names)


def test_the_package_alone_imports_no_torch() -> None:
    code = (
        "import fastpref, sys; print('torch' in sys.modules); fastpref.nn; print(fastpref.scoring)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "False" and "fastpref.scoring" in second and done.stderr == ""
