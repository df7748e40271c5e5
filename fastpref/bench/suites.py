# SPDX-License-Identifier: Apache-2.0
"""What is measured: implementations of the same work beside its bare matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .divergences import divergence_implementations
from .implementations import Implementation, bare_products, implementations
from .losses import KINDS, loss_implementations
from .work import Work

LIMIT = "bare products"
OVERFLOWING = "fastpref, 1% overflowing"


class Suite(NamedTuple):
    title: str
    implementations: Callable[[], list[Implementation]]
    products: Callable[[Work, bool], None]
    overflows: bool = False  # whether overflowing rows are measured too
    usual: bool = True  # whether it is measured when none is asked for


def two_model_products(work: Work, trainable: bool) -> None:
    """And that of the other model."""
    torch.mm(work.ref_hidden[work.scored], work.ref_weight.t())
    bare_products(work, trainable)


def _of_losses() -> dict[str, Suite]:
    suites = {}
    for name, kind in KINDS.items():
        title = f"preference_loss, {name}" + (", live reference" if kind.reference else "")
        products = two_model_products if kind.reference else bare_products
        made = functools.partial(loss_implementations, kind)
        suites[name] = Suite(title, made, products, usual=name == "dpo")
    return suites


SUITES = {
    "score": Suite("scores and DPO", implementations, bare_products, overflows=True),
    **_of_losses(),
    "divergence": Suite(
        "linear_divergence, forward KL", divergence_implementations, two_model_products
    ),
}
