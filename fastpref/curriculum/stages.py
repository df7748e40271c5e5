# SPDX-License-Identifier: Apache-2.0
"""The order of training: from easy to hard, in stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..objectives.checks import flag, is_integer
from .checks import count, numbers


class StageSampler(Sampler[int]):
    """All pairs once an epoch, easy ones first: in stages, each in an order of its own.

    The curriculum of Curry-DPO (Pattnaik et al. 2024, arXiv:2403.07230), which trains on one set of
    pairs after the other, for easiness by the gap of scores (``-ranked_pairs(...).gap`` is a
    difficulty) or of log-probabilities; ``ReferenceCallback(..., every=sampler.last_steps(n))``
    makes the policy after each stage the reference of the next, as there.

    The order follows from ``seed`` and the epoch alone, so that it is the same on all processes:
    accelerate deals the batches of it out to them. ``set_epoch``, which accelerate and
    transformers' Trainer call, gives the next epoch another one. In the Trainer::

        trainer._get_train_sampler = lambda *_: sampler

    Args:
        difficulty: (P,), lower is easier; of equal ones the first come first.
        stages: how many, of sizes that differ by one at most; or the sizes, easy ones first, which
            sum to P.
        seed: of the order within stages.
        shuffle: False keeps each stage in the order of difficulty.
    """

    def __init__(
        self,
        difficulty: Tensor,
        stages: int | Sequence[int],
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        values = numbers("difficulty", difficulty, "(P,)").cpu()
        if not len(values):
            raise ValueError("difficulty must be of at least 1 pair, got (0,)")
        self.seed, self.shuffle = count("seed", seed, 0), flag("shuffle", shuffle)
        self.sizes = _sizes(stages, len(values))
        self._order = values.argsort(stable=True)
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator(device="cpu")
        generator.manual_seed(self.seed + self._epoch)
        for stage in self._order.split(self.sizes):
            if self.shuffle:
                places = torch.randperm(
                    len(stage), generator=generator, dtype=torch.int64, device="cpu"
                )
                stage = stage[places]
            yield from stage.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Another order within the stages.

        Args:
            epoch: counted from 0; equal ones have equal orders.
        """
        self._epoch = count("epoch", epoch, 0)

    def last_steps(self, pairs_per_step: int) -> list[int]:
        """Optimizer steps of the first epoch, from 1, that see the last pair of a stage.

        Args:
            pairs_per_step: of all processes and accumulated batches together.
        """
        pairs_per_step = count("pairs_per_step", pairs_per_step, 1)
        ends = torch.tensor(self.sizes, dtype=torch.int64, device="cpu").cumsum(0).tolist()
        return [-(-end // pairs_per_step) for end in ends]


def _sizes(stages: int | Sequence[int], pairs: int) -> list[int]:
    if is_integer(stages):
        number = count("stages", stages, 1)
        if number > pairs:
            raise ValueError(f"stages must be at most the {pairs} pairs, got {number}")
        return [pairs // number + (place < pairs % number) for place in range(number)]
    if isinstance(stages, str) or not isinstance(stages, Sequence):
        raise TypeError(f"stages must be a number or sizes, got {type(stages).__name__}")
    sizes = [count("stages", one, 1) for one in stages]
    if sum(sizes) != pairs:
        raise ValueError(f"stages must be sizes that sum to the {pairs} pairs, got {sizes}")
    return sizes
