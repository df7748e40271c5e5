# SPDX-License-Identifier: Apache-2.0
"""The losses as modules that take what Liger-Kernel 0.8.5's ``LigerFusedLinear*Loss`` classes take.

Each has their constructor and ``forward``, argument by argument, and returns the same tuple, so
that only the import changes: ``from fastpref.nn import FusedLinearDPOLoss``.

``compiled`` and ``chunk_size`` are taken and have no effect. In all of them: what is not scored is
never computed, but for the mean logits (sums in KTO), which like Liger's are over all positions and
cost no product; a row without scored tokens counts as 0 and never gives NaN; log-probabilities in
the returned tuple carry their gradient; a setting that the chosen loss has not is refused. Every
call reads the attributes, so that ``loss.beta = 0.3`` counts from then on.
"""

from .cosine_similarity import FusedLinearCosineSimilarityLoss
from .cpo import FusedLinearCPOLoss
from .dpo import FusedLinearDPOLoss
from .grpo import FusedLinearGRPOLoss
from .jsd import FusedLinearJSDLoss
from .kto import FusedLinearKTOLoss
from .orpo import FusedLinearORPOLoss
from .simpo import FusedLinearSimPOLoss

__all__ = [
    "FusedLinearCPOLoss",
    "FusedLinearCosineSimilarityLoss",
    "FusedLinearDPOLoss",
    "FusedLinearGRPOLoss",
    "FusedLinearJSDLoss",
    "FusedLinearKTOLoss",
    "FusedLinearORPOLoss",
    "FusedLinearSimPOLoss",
]
