# SPDX-License-Identifier: Apache-2.0
"""References that move during a training: averages and snapshots of the policy, and pairs and
combinations of LoRA adapters. Plain functions, and callbacks for transformers' Trainer and TRL."""

from .adapters import adapter_tensors
from .callbacks import AdapterPairCallback, ReferenceCallback
from .combination import combine_adapters
from .pair import AdapterPair
from .update import frozen_copy, update_

__all__ = [
    "AdapterPair",
    "AdapterPairCallback",
    "ReferenceCallback",
    "adapter_tensors",
    "combine_adapters",
    "frozen_copy",
    "update_",
]
