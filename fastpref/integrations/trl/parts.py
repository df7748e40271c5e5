# SPDX-License-Identifier: Apache-2.0
"""The names in TRL that are replaced, found and judged before anything is.

From TRL 1.15 on trainers get their per-token scores from the model's forward, and that from one
autograd function, which ``trl.trainer.utils`` looks up by name at every call; TRL 1.14 has the name
in its trainers too, and 1.13 uses it in AsyncGRPO alone. Its form says which one it is.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .adapters import LogProbAdapter, PairAdapter
from .divergence import DivergenceLoss
from .heads import NoLayer, add_fused_lm_head
from .library import OLDEST, UTILS, said, trl_module, trl_release, trl_utils, trl_version

logger = logging.getLogger("fastpref")

SYMBOL = "_ChunkedLogProbFunction"
DIVERGENCE = "_chunked_divergence_loss"
DISTILLATION = "trl.trainer.distillation_trainer"
FIXABLE = (1, 15)  # the oldest TRL whose trainers put a head on the model
# Those that refuse LoRA on the output head.
TRAINERS = tuple(f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "sft", "grpo", "rloo"))

_HEAD = (
    *("weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale"),
)
_LOSS = (
    *("student_hidden_states", "teacher_hidden_states"),
    *("student_lm_head_weight", "teacher_lm_head_weight", "completion_mask", "beta"),
)
_LOSS_MORE = (
    *("num_items_in_batch", "student_lm_head_bias", "teacher_lm_head_bias"),
    *("student_logit_scale", "teacher_logit_scale"),
    *("student_final_logit_softcapping", "teacher_final_logit_softcapping", "temperature"),
)
Forms = dict[tuple[str, ...], Any]
# What TRL's must take for a stand-in to mean the same.
HEADS: Forms = {
    ("ctx", "hidden", *_HEAD, "outputs"): LogProbAdapter,
    ("ctx", "last_hidden", *_HEAD): PairAdapter,
}
DIVERGENCES: Forms = {
    (*_LOSS, *_LOSS_MORE): DivergenceLoss,
    (*_LOSS, "chunk_size", *_LOSS_MORE): DivergenceLoss,
}
MODEL_HEADS: Forms = {
    ("model", "temperature", "cast_lm_head_to_fp32", "outputs"): add_fused_lm_head
}


@dataclass(frozen=True)
class Part:
    """A name of TRL, and what is put there."""

    name: str
    found: Any
    stand_in: Any
    where: tuple[str, ...] = ("trl",)  # modules and packages that may have it
    fixes_heads: bool = False

    def rebind(self, old: Any, new: Any) -> None:
        """Wherever the name means ``old``, also in modules that were imported since."""
        for name, module in list(sys.modules.items()):
            if any(name == one or name.startswith(one + ".") for one in self.where):
                if getattr(module, "__dict__", {}).get(self.name) is old:
                    setattr(module, self.name, new)


def find_parts(*, fix_heads: bool) -> list[Part]:
    """Those that are not replaced yet.

    Raises:
        ImportError: TRL is missing or does not import.
        RuntimeError: a part is not one known here.
    """
    found = getattr(trl_utils(), SYMBOL, None)
    parts = []
    if found not in HEADS.values():
        parts.append(Part(SYMBOL, found, _known(UTILS, SYMBOL, found, HEADS)))
    parts += _divergence()
    return parts + (_model_heads() if fix_heads else [])


def _divergence() -> list[Part]:
    try:
        module = trl_module(DISTILLATION)
    except ImportError as error:  # of what this trainer alone needs
        logger.debug("Distillation is left as it is: %s", error.__cause__)
        return []
    found = getattr(module, DIVERGENCE, None)
    if isinstance(found, DivergenceLoss):
        return []
    return [Part(DIVERGENCE, found, _known(DISTILLATION, DIVERGENCE, found, DIVERGENCES)(found))]


@contextlib.contextmanager
def heads_put(put: Callable[..., None]) -> Iterator[None]:
    """Within it TRL's trainers call ``put`` in place of their ``add_fused_lm_head``, and take LoRA
    on the output head.

    Raises:
        ImportError, RuntimeError: as ``find_parts``.
    """
    found = getattr(trl_utils(), "add_fused_lm_head", None)
    parts = [Part("add_fused_lm_head", found, put), *_model_heads()[1:]]
    if found is not add_fused_lm_head:
        _known(UTILS, "add_fused_lm_head", found, MODEL_HEADS, oldest=FIXABLE)
    for part in parts:
        part.rebind(part.found, part.stand_in)
    try:
        yield
    finally:
        for part in parts:
            part.rebind(part.stand_in, part.found)


def _model_heads() -> list[Part]:
    found = getattr(trl_utils(), "add_fused_lm_head", None)
    if found is add_fused_lm_head:
        return []
    known = _known(UTILS, "add_fused_lm_head", found, MODEL_HEADS, oldest=FIXABLE)
    layer: Any = None
    for name in TRAINERS:
        layer = getattr(trl_module(name), "BaseTunerLayer", layer)
    parts = [Part("add_fused_lm_head", found, known, fixes_heads=True)]
    if layer is not None:  # PEFT is there
        parts.append(Part("BaseTunerLayer", layer, NoLayer, TRAINERS, fixes_heads=True))
    return parts


def _known(
    module: str,
    name: str,
    found: Any,
    forms: Forms,
    oldest: tuple[int, ...] = OLDEST,
) -> Any:
    """What stands in for ``found``, by the parameters that it takes.

    Raises:
        RuntimeError: it takes others, or TRL is too old.
    """
    function = getattr(found, "forward", found)  # of an autograd function
    parameters = None if function is None else tuple(inspect.signature(function).parameters)
    if trl_release() >= oldest and parameters in forms:
        return forms[parameters]
    came = f"{module} has no {name}"
    if parameters is not None:
        came = f"{module}.{name}({', '.join(parameters)})"
    expected = " or ".join(f"({', '.join(form)})" for form in forms)
    raise RuntimeError(
        f"fastpref does not know this part of TRL {trl_version()}. Found: {came}. Expected: "
        f"TRL {said(oldest)} or newer with {name}{expected}. Nothing was patched. Install a TRL "
        'that fastpref knows, pip install "fastpref[trl]", or upgrade fastpref'
    )
