# SPDX-License-Identifier: Apache-2.0
"""What ``help`` shows of the public functions: plain types, and every argument where it is."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pydoc
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastpref
from fastpref import objectives
from fastpref.objectives import documentation, registry
from fastpref.objectives.signature import Beta

PUBLIC = (
    "fastpref",
    "fastpref.objectives",
    "fastpref.sequences",
    "fastpref.diffusion",
    "fastpref.optim",
    "fastpref.reference",
    "fastpref.curriculum",
    "fastpref.diagnostics",
)

# What they return and take; the functions beside them are for the package itself.
CLASSES = ("fastpref.scoring", "fastpref.units")

# Their fields are no arguments; tuples aside.
RESULTS = {
    f"fastpref.diagnostics.{name}"
    for name in ("Displacement", "LengthBias", "Likelihoods", "SpinalTrace")
}


def test_help_shows_plain_types_and_a_table() -> None:
    shown = pydoc.plain(pydoc.render_doc(objectives.simpo))
    assert "beta: float = 2.5, gamma: float = 1.0, label_smoothing: float = 0.0" in shown
    assert "chosen_lengths: torch.Tensor, rejected_lengths" in shown and "Annotated" not in shown
    assert re.search(r"hyperparameter +default +domain +meaning", shown)
    assert re.search(r"beta +2.5 +> 0 \* +scale of the rewards, mean log-probabilities", shown)
    assert re.search(r"ref_chosen_logps +\(P,\) +not used ", shown)
    assert re.search(r"chosen_lengths +\(P,\) +needed ° +number of scored tokens", shown)
    assert "or a tensor of one value a pair, (P,)" in shown


@pytest.mark.parametrize("declared", registry.catalogue(), ids=lambda one: one.name)
def test_every_argument_of_an_objective_has_its_row(declared: objectives.Objective) -> None:
    shown = inspect.getdoc(declared.function) or ""
    signature = declared.signature
    names = (*signature.logps, *signature.extras, *signature.hyperparameters)
    assert names == tuple(inspect.signature(declared.function).parameters) or set(names) == set(
        inspect.signature(declared.function).parameters
    )
    for name in names:
        assert documentation.meaning(declared.name, name), name
        assert re.search(rf"^{name}  +\S", shown, re.MULTILINE), name
    for name, parameter in signature.hyperparameters.items():
        row = re.search(rf"^{name}  +(\S+)  +(.*)$", shown, re.MULTILINE)
        assert row is not None
        if isinstance(parameter.default, float):
            assert float(row[1]) == parameter.default
        if parameter.domain is not None:
            assert row[2].startswith(str(parameter.domain))
    assert max(map(len, shown.splitlines())) <= 100


def test_meanings_are_of_arguments_that_exist() -> None:
    known = {
        (one.name, name)
        for one in registry.catalogue()
        for name in (*one.signature.logps, *one.extras, *one.signature.hyperparameters)
    }
    own = {(name, key) for name, keys in documentation.OWN_MEANINGS.items() for key in keys}
    assert own <= known
    assert set(documentation.MEANINGS) <= {name for _, name in known}


def test_an_annotation_is_shown_as_what_a_caller_gives() -> None:
    def function(logps, *, beta=0.1, tau=None): ...

    hints = {"logps": torch.Tensor, "beta": Beta, "tau": Beta | None}
    function.__annotations__ = hints
    shown = str(documentation.readable_signature(function))
    assert shown == "(logps: torch.Tensor, *, beta: float = 0.1, tau: float | None = None)"


def public(modules: tuple[str, ...] = PUBLIC) -> Iterator[tuple[str, Callable[..., Any]]]:
    seen = set()
    for name in modules:
        module = importlib.import_module(name)
        for key in module.__all__:
            value = getattr(module, key)
            if callable(value) and id(value) not in seen:
                seen.add(id(value))
                yield f"{name}.{key}", value


def fields(kind: type[Any]) -> list[str]:
    """Of a named tuple or a dataclass."""
    if issubclass(kind, tuple):
        return list(getattr(kind, "_fields", ()))
    if not dataclasses.is_dataclass(kind):
        return []
    return [one.name for one in dataclasses.fields(kind) if one.name != "_"]


def test_every_field_of_a_public_result_is_documented() -> None:
    missing, seen = [], 0
    for name, value in public(PUBLIC + CLASSES):
        if not inspect.isclass(value):
            continue
        kinds = [one for one in value.__mro__ if one.__module__.startswith("fastpref")]
        documented = "\n".join(inspect.cleandoc(one.__doc__ or "") for one in kinds)
        for field in fields(value):
            seen += 1
            listed = rf"^(- .*``{field}``.*|    {field}): \S"
            if not re.search(listed, documented, re.MULTILINE):
                missing.append(f"{name}.{field}")
    assert missing == []
    assert seen > 100


def test_every_argument_of_a_public_method_is_documented() -> None:
    missing = []
    for name, value in public():
        if not inspect.isclass(value):
            continue
        for key, method in vars(value).items():
            # Events of transformers' callbacks are called by its Trainer alone.
            if key.startswith(("_", "on_")) or not inspect.isfunction(method):
                continue
            documented = inspect.getdoc(method) or ""
            for parameter in list(inspect.signature(method).parameters)[1:]:
                if not re.search(rf"\b{parameter}\b", documented):
                    missing.append(f"{name}.{key}: {parameter}")
    assert missing == []


def test_every_argument_of_a_public_function_is_documented_where_it_is() -> None:
    missing = []
    for name, value in public():
        documented = inspect.getdoc(value) or ""
        if name in RESULTS or (inspect.isclass(value) and issubclass(value, tuple)):
            continue
        for parameter in inspect.signature(value).parameters:
            if parameter not in ("_", "self") and not re.search(rf"\b{parameter}\b", documented):
                missing.append(f"{name}: {parameter}")
        if re.search(r"(?<!examples/)\b\w+\.py\b", documented):
            missing.append(f"{name} points to a source file")
    assert missing == []
    assert "linear_logprob" in dir(fastpref)
