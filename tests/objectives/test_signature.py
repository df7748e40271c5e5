# SPDX-License-Identifier: Apache-2.0
"""Reading an objective's signature: annotations first, defaults where there are none."""

import math
from typing import Annotated, Literal

import pytest
from torch import Tensor

from fastpref.objectives.signature import (
    REQUIRED,
    Domain,
    Extra,
    Filled,
    LabelSmoothing,
    Positive,
    Signature,
)


def test_annotations_decide():
    def fn(
        policy: Tensor,
        ref: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        scores: Extra,
        lengths: Filled | None = None,
        beta: Positive = 0.1,
        cap: Positive | None = None,
        shift: Annotated[float, Domain(0.0, 1.0, includes=(1.0,))],
        variant: Literal["a", "b"] = "a",
        group: object = None,
    ) -> None: ...

    signature = Signature.of(fn, "list")
    assert signature.logps == ("policy", "ref")
    mask, scores, lengths = (signature.extras[name] for name in ("mask", "scores", "lengths"))
    assert (mask.required, mask.aligned, mask.filled) == (False, False, False)
    assert (scores.required, scores.aligned, scores.filled) == (True, True, False)
    assert (lengths.required, lengths.aligned, lengths.filled) == (False, True, True)
    facts = signature.hyperparameters
    assert list(facts) == ["beta", "cap", "shift", "variant", "group"]
    assert facts["shift"].default is REQUIRED and facts["shift"].domain.contains(1.0)
    assert facts["variant"].choices == ("a", "b")
    facts["cap"].check("cap", None)
    with pytest.raises(TypeError):
        facts["beta"].check("beta", None)
    with pytest.raises(ValueError):
        facts["cap"].check("cap", -1.0)
    facts["group"].check("group", object())


def test_defaults_decide_without_annotations():
    def fn(chosen, rejected, beta=1.0, *, margin, scale=2.0, weights=None, **rest): ...

    signature = Signature.of(fn, "pair")
    assert signature.logps == ("chosen", "rejected")
    assert list(signature.extras) == ["margin", "weights"]
    assert list(signature.hyperparameters) == ["beta", "scale"]


def test_unresolvable_annotations_are_ignored():
    def fn(chosen: "NoSuchType", rejected, *, beta=0.1): ...  # noqa: F821

    assert list(Signature.of(fn, "pair").hyperparameters) == ["beta"]


@pytest.mark.parametrize(
    ("domain", "text", "inside", "outside"),
    [
        (Domain(low=0.0), "> 0", [5e-324, 1e308], [0.0, -1.0, math.inf, math.nan]),
        (Domain(low=0.0, includes=(0.0,)), ">= 0", [0.0, 1.0], [-5e-324, math.inf]),
        (Domain(0.0, 0.5, includes=(0.0,)), "in [0, 0.5)", [0, 0.49], [0.5, -0.1]),
        (Domain(0.0, 1.0, includes=(1.0,)), "in (0, 1]", [1], [0, 1.01]),
        (Domain(), "finite", [-1e308, 0], [math.inf, -math.inf, math.nan]),
        (Domain(0.0, math.inf, includes=(math.inf,)), "in (0, inf]", [math.inf], [0.0]),
        (LabelSmoothing.__metadata__[0], "in [0, 0.5)", [0.0], [0.5]),
    ],
)
def test_domain(domain, text, inside, outside):
    assert str(domain) == text
    assert all(domain.contains(value) for value in inside)
    assert not any(domain.contains(value) for value in outside)
