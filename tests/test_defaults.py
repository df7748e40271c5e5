# SPDX-License-Identifier: Apache-2.0
"""The default device and dtype of the user's change no result, and nothing of them stays."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten

import fastpref
from fastpref import diffusion, nn, objectives, sequences
from fastpref.scoring import workspace
from tests.default_calls import every_call


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    found = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(found)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """In the place of the one that puts functions of its own where torch's constructors are: torch
    knows them by identity, looked up once, and would let ours make what they like."""
    _device_constructors.cache_clear()
    yield
    _device_constructors.cache_clear()


DEFAULTS = {
    "with meta": lambda: torch.device("meta"),
    "set meta": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


def assert_same(found: Any, expected: Any) -> None:
    """Bit by bit, of the same dtypes and on the same devices."""
    (ours, form), (theirs, other) = tree_flatten(found), tree_flatten(expected)
    # As text: each call's index layout has a class of its own.
    assert str(form) == str(other)
    for one, two in zip(ours, theirs, strict=True):
        if isinstance(two, Tensor):
            assert (one.dtype, one.device) == (two.dtype, two.device)
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == two


@pytest.mark.parametrize("name", every_call())
def test_no_default_changes_a_result(name: str) -> None:
    call = every_call()[name]
    expected = call()
    workspace.release_workspace()  # what is lent is made here
    for default in DEFAULTS.values():
        with default():
            found = call()
        assert_same(found, expected)
    assert_same(call(), expected)


@pytest.mark.parametrize("default", DEFAULTS)
def test_buffers_lent_are_where_they_are_asked_for(default: str) -> None:
    cpu = torch.device("cpu")
    workspace.release_workspace()
    with DEFAULTS[default]():
        lent = [workspace.lease(shape, torch.bfloat16, cpu) for shape in ((3, 5), (0, 5), (7,))]
        given_back = workspace.lease((3, 5), torch.float32, cpu)
        workspace.give_back(given_back)
    for one in (*lent, given_back):
        assert one.device == cpu
    assert {one.dtype for one in lent} == {torch.bfloat16}
    lent[0].fill_(1)
    del lent, one
    assert all(buffer.memory.device == cpu for buffer in workspace._idle())


def test_every_public_function_is_called() -> None:
    """Of classes, those that compute."""
    called = {name.split()[0].split(".")[-1] for name in every_call()}
    results = {"PreferenceOutput", "ScoringOptions", "TokenScores", "Objective"}
    results |= {"ListLosses", "PairLosses", "TokenLosses", "UnitLosses"}
    results |= {"PredictionTarget", "Preset"}
    results |= {"fuse_lm_head", "unfuse_lm_head"}  # which compute nothing
    for module in (fastpref, nn, objectives, sequences, diffusion):
        public = {name for name in module.__all__ if callable(getattr(module, name))}
        assert public - results <= called, module.__name__
        assert not any(inspect.ismodule(getattr(module, name)) for name in public)
