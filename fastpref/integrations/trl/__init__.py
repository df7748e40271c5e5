# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers on fastpref, nothing else changed::

    import fastpref.integrations.trl

    fastpref.integrations.trl.patch()
    DPOTrainer(...).train()

``patch`` puts an adapter where TRL's trainers look up their fused head, and one where its
distillation looks up its divergence; losses, metrics, PEFT, precomputed reference
log-probabilities and distributed wrappers stay TRL's own. On a GPU the workspace is what TRL's own
head takes where that spares a product, and otherwise gives way where memory runs out, see
``default_budget``: a batch size tuned on stock TRL still fits. Logger ``fastpref`` at level DEBUG
says the plan of every call.

Trainers that a patch cannot reach, because in TRL they make the logits, are subclasses here with
the same arguments, losses and metrics: ``FastORPOTrainer``, ``FastCPOTrainer`` (SimPO and AlphaPO
too), ``FastTPOTrainer``, ``FastOnlineDPOTrainer``. ``FastDPOTrainer`` trains with any objective.

``patching`` is what one calls, ``parts`` finds what is replaced, ``adapters``, ``divergence`` and
``heads`` stand in for it, ``reach`` says which trainers that is. TRL is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .adapters import OUTPUTS, LogProbAdapter, PairAdapter
from .budget import default_budget
from .library import trl_utils
from .patching import patch, patched, unpatch, would_reach

if TYPE_CHECKING:
    from .cpo import FastCPOTrainer
    from .dpo import FastDPOTrainer
    from .online_dpo import FastOnlineDPOTrainer
    from .orpo import FastORPOTrainer
    from .tpo import FastTPOTrainer

__all__ = [
    "OUTPUTS",
    "FastCPOTrainer",
    "FastDPOTrainer",
    "FastORPOTrainer",
    "FastOnlineDPOTrainer",
    "FastTPOTrainer",
    "LogProbAdapter",
    "PairAdapter",
    "default_budget",
    "patch",
    "patched",
    "unpatch",
    "would_reach",
]

# Subclasses of TRL's, hence made when they are asked for.
_TRAINERS = {
    "FastCPOTrainer": "cpo",
    "FastDPOTrainer": "dpo",
    "FastORPOTrainer": "orpo",
    "FastOnlineDPOTrainer": "online_dpo",
    "FastTPOTrainer": "tpo",
}


def __getattr__(name: str) -> Any:
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trl_utils()  # an error with the remedy where TRL is missing
    return getattr(importlib.import_module(f".{_TRAINERS[name]}", __name__), name)
