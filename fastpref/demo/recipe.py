# SPDX-License-Identifier: Apache-2.0
"""How long the demo trains: about the same number of tokens, whatever the length of the texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

MAX_LENGTH = 256  # tokens of a prompt with its completion

_WARM_UP_TOKENS, _WARM_UP_STEPS = 480_000, (110, 800)
_PREFERENCE_TOKENS, _PREFERENCE_STEPS = 128_000, (30, 100)
_COMPARED_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The sizes of a training; batches in completions."""

    warm_up_steps: int
    warm_up_batch: int = 16
    warm_up_rate: float = 2e-3
    steps: int
    batch: int = 32
    rate: float
    max_length: int = MAX_LENGTH
    seed: int = 0

    def to_compare(self) -> "Recipe":
        """A few steps of twice the batch, where the head's work shows above the overhead."""
        return replace(self, steps=min(_COMPARED_STEPS, self.steps), batch=2 * self.batch)


def plan(lengths: Sequence[int], *, built: bool, steps: int | None, seed: int) -> Recipe:
    """The recipe for sequences of these lengths (at least one).

    Args:
        built: whether the model is built here. One that was trained before is not warmed up, and
            takes smaller steps.
        steps: of the preference training; None to choose.
    """
    recipe = Recipe(warm_up_steps=0, steps=1, rate=1e-4 if built else 1e-5, seed=seed)
    length = mean(lengths)
    chosen = _within(_PREFERENCE_TOKENS / (recipe.batch * length), _PREFERENCE_STEPS)
    warm_up = _within(_WARM_UP_TOKENS / (recipe.warm_up_batch * length), _WARM_UP_STEPS)
    return replace(recipe, steps=steps or chosen, warm_up_steps=warm_up if built else 0)


def _within(steps: float, limits: tuple[int, int]) -> int:
    return max(limits[0], min(limits[1], round(steps)))
