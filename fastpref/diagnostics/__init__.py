# SPDX-License-Identifier: Apache-2.0
"""What a preference training does to a model, measured.

``information`` and ``likelihood`` are of log-probabilities of responses, ``similarity`` and
``layers`` of hidden states, ``credit`` of tokens, ``lengths`` of lengths; ``responses`` scores with
a model of transformers, on which ``monitor`` (in a training) and ``report`` (two models, side by
side; ``python -m fastpref diagnose``) are built. ``pictures`` and ``pages`` draw.
"""

from typing import TYPE_CHECKING, Any

from .credit import credit_map
from .information import did_entropy, log_margin_order
from .layers import SpinalTrace, layer_contraction, layer_transport, spinal
from .lengths import LengthBias, length_bias
from .likelihood import Displacement, Likelihoods, displacement
from .similarity import ches

if TYPE_CHECKING:
    from .monitor import PreferenceMonitorCallback

__all__ = [
    "Displacement",
    "LengthBias",
    "Likelihoods",
    "PreferenceMonitorCallback",
    "SpinalTrace",
    "ches",
    "credit_map",
    "did_entropy",
    "displacement",
    "layer_contraction",
    "layer_transport",
    "length_bias",
    "log_margin_order",
    "spinal",
]


def __getattr__(name: str) -> Any:
    # Its base class is one of transformers'.
    if name == "PreferenceMonitorCallback":
        from .monitor import PreferenceMonitorCallback

        return PreferenceMonitorCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
