# SPDX-License-Identifier: Apache-2.0
"""One fused call: the model's own forward, its head answered by scores."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .head import Head, find_head, head_supported
from .interception import answered, loss_left_out
from .measurement import Measured, measure
from .request import IGNORED, Request, take_request
from .scores import scores_of_hidden, scores_of_logits
from .transform import LogitTransform

logger = logging.getLogger("fastpref")

Own = Callable[..., Any]


@dataclass
class State:
    """Of a fused model; copied with it."""

    check: bool
    function: Own  # of its forward
    forward: Own | None  # the instance's before, None: its class's
    measured: Measured | None = None  # since its first call
    warned: tuple[str, ...] = ()


# The graph breaks here; what the model calls is compiled as ever.
@torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
def fused_call(
    model: nn.Module, own: Own, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """FusedCausalLMOutput of a call with ``args`` and ``kwargs``, ``own`` being the model's
    forward."""
    call = _prepared(model, own, state, args, kwargs)
    with loss_left_out(model), call.head_answered():
        output = own(**call.arguments)
    return _finished(model, call, output)


@dataclass
class _Call:
    request: Request
    head: Head
    transform: LogitTransform | str  # or why full logits are scored
    takes_loss: bool
    arguments: dict[str, Any]  # of the model's forward
    scores: list[tuple[Tensor, ...]] = field(default_factory=list)  # by call of the head

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def head_answered(self) -> contextlib.AbstractContextManager[None]:
        """Within it the head's forward scores what it is given."""
        transform = self.transform
        if isinstance(transform, str):
            return contextlib.nullcontext()
        stand_in: list[Tensor] = []

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def answer(_: Own, hidden: Tensor, **others: Any) -> tuple[Tensor, ...]:
            if others:
                raise ValueError(
                    f"the output head was called with {', '.join(others)} too, expected hidden "
                    "states alone. Score with one set of adapters a call, or without fused_lm_head"
                )
            # The rest of the forward runs on it, for nothing.
            stand_in.append(hidden.new_zeros(*hidden.shape[:-1], 1))
            request = self.request
            asked = (request.target, transform, request.temperature, request.wanted)
            return scores_of_hidden(self.head.inner, request.positions(hidden), *asked)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def leave(scores: tuple[Tensor, ...]) -> Tensor:
            self.scores.append(scores)
            return stand_in[-1]

        return answered(self.head, answer, leave)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _prepared(
    model: nn.Module, own: Own, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Call:
    parameters = inspect.signature(type(model).forward).parameters
    # The first is self.
    arguments = {**dict(zip(list(parameters)[1:], args, strict=False)), **kwargs}
    request = take_request(arguments)
    arguments["return_dict"] = True
    if "use_cache" in parameters:
        arguments["use_cache"] = False
    head = find_head(model)
    refusal = head_supported(head.inner)
    if state.measured is None:
        check = state.check and refusal is None
        state.measured = measure(model, own, head, arguments, request.labels, check)
    transform, takes_loss = state.measured
    if refusal is not None:
        transform = refusal
    if isinstance(transform, str) and transform not in state.warned:
        state.warned += (transform,)
        logger.warning(
            "%s: %s. Scored from full logits: right, in (tokens, vocabulary) memory",
            type(model).__name__,
            transform,
        )
    if takes_loss:
        arguments["labels"] = request.labels
    return _Call(request, head, transform, takes_loss, arguments)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _finished(model: nn.Module, call: _Call, output: Any) -> Any:
    """FusedCausalLMOutput of a call whose forward returned ``output``."""
    from .output import FusedCausalLMOutput

    request = call.request
    if isinstance(call.transform, str):
        logits = request.positions(output.logits)
        asked = (request.target, request.temperature, request.wanted)
        call.scores.append(scores_of_logits(logits, *asked))
    if len(call.scores) != 1:
        raise RuntimeError(
            f"the output head of {type(model).__name__} was called {len(call.scores)} times, "
            "expected once, as when the model was first run. Fuse it anew: "
            "fastpref.unfuse_lm_head(model), fastpref.fuse_lm_head(model)"
        )
    scores = dict(zip(request.names, call.scores[0], strict=True))
    log_probs = scores["log_probs"]
    loss = request.loss(log_probs)
    if call.takes_loss:
        loss = loss + output.loss.to(loss.device)
    return FusedCausalLMOutput(
        loss=loss,
        label_mask=(request.target != IGNORED).to(log_probs.device),
        aux_loss=getattr(output, "aux_loss", None),
        **scores,
    )
