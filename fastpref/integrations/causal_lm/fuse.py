# SPDX-License-Identifier: Apache-2.0
"""``fuse_lm_head``: puts a forward on a model that knows ``fused_lm_head=True``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from .call import State, fused_call
from .head import find_head

Model = TypeVar("Model", bound=nn.Module)

STATE = "_fastpref_fused_lm_head"  # the attribute of a fused model


def fuse_lm_head(model: Model, *, check: bool = True) -> Model:
    """Let ``model(..., labels=labels, fused_lm_head=True)`` score labels without logits.

    Such a call takes, beside what the model's forward takes:

    - ``labels``: (B, T) int64, -100 where nothing is scored; the label at t + 1 is what position t
      predicts. Or ``shift_labels``, where it is the one at t; or ``fused_labels``, for trainers
      that take ``labels`` out of the inputs: used where ``labels`` are not given.
    - ``outputs``: names of statistics to compute beside ``log_probs``: "entropy",
      "log_sum_sq_probs", "mean_logits", "is_top1".
    - ``temperature``: a number, or a tensor that broadcasts to ``log_probs``.
    - ``num_items_in_batch``: what the sum of losses is divided by, in place of their number.

    It returns a ``FusedCausalLMOutput`` with TRL's keys: ``loss``, ``log_probs`` and the statistics
    (B, T - 1), ``label_mask``, and ``aux_loss`` of a mixture of experts, whose share ``loss``
    includes as the model's own does. Prompt tuning has PEFT lengthen ``labels``, and so the result,
    by the prompt; ``fused_labels`` stay as they are.

    Without the keyword, in ``generate`` and in ``save_pretrained`` nothing changes. A deep copy is
    a fused model of its own. Wrap the model as ever afterwards (PEFT, DDP, FSDP, ZeRO) and call the
    wrapper. Where transformers' tensor parallelism has sharded the head, each rank multiplies by
    its own rows.

    The first such call runs the model on a few of its inputs, to measure what it makes of its
    head's outputs. A model that makes anything else of them than a scale, a cap and fewer entries,
    or whose head is neither linear nor a LoRA update of a linear one, is scored from full logits,
    with one warning by logger ``fastpref``.

    Args:
        model: transformers' causal language model, or PEFT's model of one. Fusing it again does
            nothing.
        check: at the first such call compare a few log-probabilities with those of full logits,
            which then serve where the two disagree.

    Returns:
        ``model``.

    Raises:
        ImportError: transformers is missing.
        TypeError: ``model`` is none of transformers'.
        ValueError: it is an encoder-decoder, has no output head, or a quantised one. A call raises
            where labels are missing, or an output is unknown.
    """
    owner = _owner(model)
    if getattr(owner.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model is an encoder-decoder ({type(owner).__name__}), whose labels belong to the "
            "decoder; expected a decoder alone. Load a causal language model"
        )
    find_head(owner)
    if STATE not in vars(owner):
        function = _forward_of(type(owner))  # type: ignore[arg-type]
        setattr(owner, STATE, State(check, function, vars(owner).get("forward")))
        owner.forward = MethodType(function, owner)
    return model


def unfuse_lm_head(model: Model) -> Model:
    """Take back what ``fuse_lm_head`` did. Does nothing where it did nothing.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is none of transformers'.
        RuntimeError: since then something else has replaced the model's forward.
    """
    owner = _owner(model)
    state: State | None = vars(owner).get(STATE)
    if state is None:
        return model
    forward = vars(owner).get("forward")
    if getattr(forward, "__func__", None) is not state.function:
        raise RuntimeError(
            f"the forward of {type(owner).__name__} was replaced after fuse_lm_head, by "
            f"{forward!r}; expected fastpref's. Take that back first (for accelerate: "
            "accelerate.hooks.remove_hook_from_module, or unwrap_model)"
        )
    if state.forward is None:
        del owner.forward
    else:
        owner.forward = state.forward
    delattr(owner, STATE)
    return model


def _owner(model: nn.Module) -> Any:
    """The transformers model whose forward it is."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            "fuse_lm_head needs transformers 5 or newer; install it with: "
            'pip install "transformers>=5"'
        ) from error
    base = getattr(model, "get_base_model", None)  # PEFT's
    owner = base() if callable(base) else model
    if isinstance(owner, transformers.PreTrainedModel):
        return owner
    raise TypeError(
        f"model must be a transformers PreTrainedModel or PEFT's model of one; got "
        f"{type(model).__name__}. Fuse a model before it is wrapped (DDP, torch.compile), or pass "
        "what is wrapped (model.module)"
    )


@functools.cache
def _forward_of(kind: type[Any]) -> Callable[..., Any]:
    """A function, not of one instance, so that copies have a method of their own. It keeps the
    signature of the class's, by which ``generate`` and Trainer judge what the model takes."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        state: State = getattr(self, STATE)
        own = functools.partial(kind.forward, self) if state.forward is None else state.forward
        if not fused_lm_head:
            return own(*args, **kwargs)
        return fused_call(self, own, state, args, kwargs)

    return forward
