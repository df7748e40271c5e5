# SPDX-License-Identifier: Apache-2.0
"""What is found out about a model at its first fused call, from runs on a few of its inputs
without gradient, in eval mode, that leave the random number generators where they are.

In the first run the head returns known outputs, and the logits that come out show what the model
makes of any; this depends on no weight and costs no product with the vocabulary. In the second,
the self-check, the head returns its own outputs, and the model's logits are compared with what
fastpref makes of the hidden states.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .head import Head, ShardedHeadError, columns
from .interception import answered, loss_left_out
from .scores import scores_of_hidden, scores_of_logits
from .transform import LogitTransform, fit, known_outputs

logger = logging.getLogger("fastpref")

ROWS, LENGTH = 2, 8  # of the inputs that are run
KNOWN = 4  # rows of known outputs
FLOOR = 1e-4  # difference of log-probabilities that passes in any dtype

Own = Callable[..., Any]


class Measured(NamedTuple):
    """Of a model."""

    transform: LogitTransform | str  # of its head's outputs, or why it is none that can be fused
    takes_loss: bool  # whether its loss comes from its ``loss_function``, given labels


def measure(
    model: nn.Module,
    own: Own,
    head: Head,
    arguments: dict[str, Any],
    labels: Tensor,
    check: bool,
) -> Measured:
    """Of a model whose forward is ``own``, called with ``arguments`` and ``labels``.

    ``check`` compares log-probabilities too, of a head that ``head_supported`` knows.

    Raises:
        ShardedHeadError: it does not hold its weight where it is needed.
    """
    problem = "a forward without input_ids and inputs_embeds cannot be tried"
    takes_loss = False
    with _undisturbed(model):
        for inputs, some in _inputs(arguments, labels):
            for given in ({**inputs, "labels": some}, inputs):
                try:
                    transform, takes = _transform(model, own, head, given, some)
                    if check and isinstance(transform, LogitTransform):
                        transform = _disagreement(own, head, inputs, transform) or transform
                except ShardedHeadError:
                    raise
                except Exception as error:
                    # With labels: a loss of its own on logits of another shape than they had.
                    problem = f"tried on known head outputs it raised {error!r}"
                    logger.debug("%s: %s", type(model).__name__, problem, exc_info=True)
                    continue
                takes_loss |= takes
                if isinstance(transform, LogitTransform):
                    logger.debug("%s: logits are %s of its head's", type(model).__name__, transform)
                    return Measured(transform, takes)
                problem = transform
    return Measured(problem, takes_loss)


def _inputs(arguments: dict[str, Any], labels: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Some of the inputs with labels of that shape; for a model that takes no such all of them."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(arguments.get(name), Tensor):
            some = arguments[name][:ROWS, :LENGTH].detach()
            given = {
                one: arguments[one] for one in arguments if one in ("return_dict", "use_cache")
            }
            given[name] = some
            yield given, labels.new_zeros(some.shape[:2])
    # A cache would be written to.
    if arguments.get("past_key_values") is None:
        yield arguments, labels


def _transform(
    model: nn.Module, own: Own, head: Head, given: dict[str, Any], labels: Tensor
) -> tuple[LogitTransform | str, bool]:
    """From a run on ``given``, and whether that took its loss from ``loss_function``."""
    known: list[Tensor] = []
    shapes: list[torch.Size] = []

    def answer(real: Own, hidden: Tensor) -> Tensor:
        shapes.append(hidden.shape)
        size = columns(head.inner) or real(hidden[:1, :1]).shape[-1]
        known.append(known_outputs(KNOWN, size, hidden.device))
        return known[-1].clone()  # a model may work in place

    with loss_left_out(model) as losses, answered(head, answer, lambda outputs: outputs):
        output = own(**given)
    takes_loss = "labels" in given and len(losses) == 1
    if len(known) != 1:
        return f"its output head is called {len(known)} times in a forward", takes_loss
    if len(shapes[0]) != 3 or shapes[0][0] != labels.shape[0]:
        found, wanted = tuple(shapes[0]), tuple(labels.shape)
        return f"its output head is given hidden states {found} for labels {wanted}", takes_loss
    return fit(known[0], output.logits), takes_loss


def _disagreement(
    own: Own, head: Head, given: dict[str, Any], transform: LogitTransform
) -> str | None:
    """How far log-probabilities of hidden states are from those of the model's logits, where that
    is too far."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def answer(real: Own, hidden: Tensor) -> Tensor:
        hidden = hidden[:ROWS, :LENGTH]
        steps = torch.arange(hidden.shape[:2].numel(), device=hidden.device, dtype=torch.int64)
        target = (steps * transform.size // steps.numel()).view(hidden.shape[:2])
        (fused,) = scores_of_hidden(head.inner, hidden, target, transform)
        outputs: Tensor = real(hidden)
        found.append((target, fused, outputs))
        return outputs

    with answered(head, answer, lambda outputs: outputs):
        logits: Tensor = own(**given).logits
    target, fused, outputs = found[0]
    (whole,) = scores_of_logits(logits, target)
    # Each logit was rounded a few times to the dtype of the head's outputs.
    allowed = FLOOR + 4 * _precision(outputs) * float(logits.abs().amax())
    far = float((fused.to(whole.device) - whole).abs().amax())
    if far <= allowed or not math.isfinite(float(whole.sum())):
        return None
    return f"its log-probabilities are {far:.1e} away from those of its logits"


def _precision(outputs: Tensor) -> float:
    """Relative, of products in their dtype."""
    if outputs.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-10  # TF32, or products of bfloat16
    return torch.finfo(outputs.dtype).eps


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs within it leave the model's mode, the random number generators and the casts that
    autocast keeps as they were."""
    training = [module for module in model.modules() if module.training]
    kept = torch.is_autocast_cache_enabled()
    devices = {one.device for one in model.parameters() if one.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
        # Some versions of torch would give the casts that are made here, without gradient, to the
        # call that comes after.
        torch.set_autocast_cache_enabled(False)
        # Not by eval(), which modules may have given other work.
        for module in training:
            module.training = False
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(kept)
            for module in training:
                module.training = True
