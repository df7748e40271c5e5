# SPDX-License-Identifier: Apache-2.0
"""Running statistics that objectives of scope "running" are given as 0-dim tensors."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .batch import mean_and_std, rows_of
from .registry import upcast


class RunningMoments:
    """Exponential moving averages of the mean and the standard deviation of a batch.

        mean <- decay mean + (1 - decay) mean(values),  std likewise

    ``mean`` and ``std`` are 0-dim tensors, to be passed as ``running_mean``, ``running_std`` or
    ``delta``. Before the first update both are 0, which leaves ``bco_pair`` without a shift and
    ``alpha_dpo`` with a fixed margin; the first update takes the moments of its batch as they are.
    (The authors of beta- and alpha-DPO average from 0 instead, so that their first steps see
    moments near 0.) They update with a batch before they use the moments for it.

    Args:
        decay: weight of the past, in [0, 1); 0.9 is that of the authors of beta- and alpha-DPO.
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}")
        self.decay = decay
        self.mean = torch.zeros((), dtype=torch.float32, device="cpu")
        self.std = torch.zeros_like(self.mean)
        self.updates = 0

    def update(self, values: Tensor, dp_group: dist.ProcessGroup | None = None) -> None:
        """Take in a batch of any shape: x_w - x_l of its pairs, say.

        With ``dp_group`` the batch is that of all its ranks, each of which holds any number of
        values, none too, and calls this. All come to the same bits as one process with the whole
        batch; the host waits for their sizes. The standard deviation is that of a sample (n - 1),
        and 0 of a single value. A batch that is empty on all ranks changes nothing.
        """
        own = upcast(values).detach().flatten()
        batch = rows_of(own, dp_group).gather(own)
        if batch.numel() == 0:
            return
        mean, std = mean_and_std(batch)
        if self.updates > 0:
            mean = self.decay * self.mean.to(mean) + (1 - self.decay) * mean
            std = self.decay * self.std.to(std) + (1 - self.decay) * std
        self.mean, self.std, self.updates = mean, std, self.updates + 1

    def state_dict(self) -> dict[str, Any]:
        """Everything but ``decay``: training resumes to the bit with it."""
        return {"mean": self.mean.clone(), "std": self.std.clone(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Args:
            state: what ``state_dict`` returned.
        """
        self.mean, self.std = state["mean"].clone(), state["std"].clone()
        self.updates = int(state["updates"])
