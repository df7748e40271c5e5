# SPDX-License-Identifier: Apache-2.0
"""Through architectures one by one, in a process of its own: some take long to build, and native
code of some may end it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection

import torch

from .. import isolation
from ..isolation import Isolated, Lost, Say
from .comparison import Result, compare

PATIENCE = 120.0  # seconds for one architecture


def names() -> tuple[str, ...]:
    """The keys of transformers' causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def sweep(wanted: Iterable[str], say: Say) -> Iterator[Result]:
    """The result of each; ``say`` is told which comes next."""
    process = Isolated(_serve, PATIENCE)
    try:
        for name in wanted:
            say(name)
            try:
                yield process.ask(name, lambda doing: None)
            except Lost as lost:
                yield Result(name, "cannot be run", lost.reason)
    finally:
        process.close()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)  # of models this small
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    isolation.serve(connection, lambda name, say: compare(name))
