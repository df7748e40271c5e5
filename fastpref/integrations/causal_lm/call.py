# SPDX-License-Identifier: Apache-2.0
"""One fused call: the model's own forward, its head answered by scores."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
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
    from .output import FusedCausalLMOutput

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
    with loss_left_out(model):
        output, scores = _run(model, own, head, arguments, request, transform)
    by_name = dict(zip(request.names, scores, strict=True))
    log_probs = by_name["log_probs"]
    loss = request.loss(log_probs)
    if takes_loss:
        loss = loss + output.loss.to(loss.device)
    return FusedCausalLMOutput(
        loss=loss,
        label_mask=(request.target != IGNORED).to(log_probs.device),
        aux_loss=getattr(output, "aux_loss", None),
        **by_name,
    )


def _run(
    model: nn.Module,
    own: Own,
    head: Head,
    arguments: dict[str, Any],
    request: Request,
    transform: LogitTransform | str,
) -> tuple[Any, tuple[Tensor, ...]]:
    """The model's output, and the scores in the order of ``request.names``."""
    if isinstance(transform, str):
        output = own(**arguments)
        logits = request.positions(output.logits)
        asked = (request.target, request.temperature, request.wanted)
        return output, scores_of_logits(logits, *asked)
    answers: list[tuple[Tensor, ...]] = []
    stand_in: list[Tensor] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def answer(_: Own, hidden: Tensor) -> tuple[Tensor, ...]:
        # The rest of the forward runs on it, for nothing.
        stand_in.append(hidden.new_zeros(*hidden.shape[:-1], 1))
        states, target = request.positions(hidden), request.target
        asked = (transform, request.temperature, request.wanted)
        return scores_of_hidden(head.inner, states, target, *asked)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(scores: tuple[Tensor, ...]) -> Tensor:
        answers.append(scores)
        return stand_in[-1]

    with answered(head, answer, leave):
        output = own(**arguments)
    if len(answers) != 1:
        raise RuntimeError(
            f"the output head of {type(model).__name__} was called {len(answers)} times, expected "
            "once, as when the model was first run. Fuse it anew: fastpref.unfuse_lm_head(model), "
            "fastpref.fuse_lm_head(model)"
        )
    return output, answers[0]
