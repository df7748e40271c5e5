# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers on fastpref, nothing else changed::

    import fastpref.integrations.trl

    fastpref.integrations.trl.patch()
    DPOTrainer(...).train()

From TRL 1.15 on the trainers get their per-token scores from the model's forward, and that from one
autograd function, which TRL looks up by name at every call. ``patch`` puts an adapter of the same
form there; losses, metrics, PEFT, precomputed reference log-probabilities and distributed wrappers
stay TRL's own. It reaches every trainer that scores through this fused head (DPO, KTO, GRPO, RLOO
and SFT among them), whether made before or after ``patch``.

On a GPU the workspace is what TRL's own head takes where that spares a product, and otherwise
gives way where memory runs out, see ``default_budget``: a batch size tuned on stock TRL still fits.
Logger ``fastpref`` at level DEBUG says the plan of every call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..preference import explain
from ..scoring import (
    BUDGET_SHARE,
    PRODUCT_BYTES,
    Plan,
    ScoringOptions,
    WeightContext,
    linear_logprob,
)

logger = logging.getLogger("fastpref")

MODULE = "trl.trainer.utils"
SYMBOL = "_ChunkedLogProbFunction"
OLDEST = (1, 15)
# What the function in TRL must take for the adapter to mean the same.
PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
# TRL's names of the outputs, in the order of its tuple, and fastpref's.
OUTPUTS = {
    "log_probs": "logp",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}

# Of TRL's tiles: TOKEN_CHUNK_SIZE there, and the width that it hands over.
TILE_ROWS = 4096
TILE_COLS = 32768
BUDGET_FROM = "as TRL's own head, or what holds the exponentials"  # see default_budget

_replaced: Any = None  # what patch() found


def patch() -> None:
    """Let TRL's fused head score on fastpref. Does nothing where it already does.

    Raises:
        ImportError: TRL is missing or does not import.
        RuntimeError: this TRL is older than 1.15, or its fused head is not the one known here. TRL
            is left as it was.
    """
    global _replaced
    utils = _trl_utils()
    found = getattr(utils, SYMBOL, None)
    if found is LogProbAdapter:
        return
    _check_known(found)
    _replaced = found
    setattr(utils, SYMBOL, LogProbAdapter)
    logger.info("TRL %s: the fused head now scores on fastpref", _trl_version())


def unpatch() -> None:
    """Give TRL back what ``patch`` replaced. Does nothing where TRL is not patched.

    Raises:
        ImportError: TRL is missing or does not import.
    """
    utils = _trl_utils()
    if getattr(utils, SYMBOL, None) is LogProbAdapter:
        setattr(utils, SYMBOL, _replaced)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """``with patched():`` TRL scores on fastpref, and afterwards on what it scored on before.

    Raises as ``patch`` does.
    """
    utils = _trl_utils()
    found = getattr(utils, SYMBOL, None)
    patch()
    try:
        yield
    finally:
        setattr(utils, SYMBOL, found)


class LogProbAdapter:
    """Stands where TRL has its autograd function; only ``apply`` is ever used of it."""

    # Packing and schedules are chosen on the host: under torch.compile the graph breaks here.
    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of every row.

        Args:
            hidden: (N, H). Products run in the autocast dtype where autocast is on, else in
                hidden's.
            weight: (V, H), any of the four dtypes.
            bias: (V,), or None.
            targets: (N,) int64 in [0, V). Every row is scored.
            temperature, softcap, logit_scale: the logit is ``softcap * tanh(logit_scale * z /
                softcap) / temperature``, without a cap ``logit_scale * z / temperature``.
            chunk_size: width of TRL's tiles. fastpref chooses its own, in no more memory.
            outputs: what to compute beside ``log_probs``.

        Returns:
            (N,) float32, ``is_top1`` bool (a tie counts for the first of the greatest logits), None
            where not asked for. ``log_probs`` and ``entropy`` are differentiable.

        Raises:
            ValueError: an output that is none of the five, or what ``linear_logprob`` refuses.
        """
        unknown = [name for name in outputs if name not in OUTPUTS]
        if unknown:
            raise ValueError(
                f"outputs must be among {', '.join(OUTPUTS)}; got {', '.join(map(repr, unknown))}. "
                "This TRL may be newer than this fastpref: upgrade fastpref, or call "
                "fastpref.integrations.trl.unpatch()"
            )
        given: dict[str, Any] = {
            "bias": bias,
            "ignore_index": -1,  # no token: TRL has put 0 where it does not score
            "temperature": float(temperature),
            "logit_scale": logit_scale,
            "softcap": softcap,
            "outputs": ("logp", *(OUTPUTS[name] for name in outputs if name != "log_probs")),
            "weight_context": _weight_context(),
        }
        with _products_in_hidden_dtype(hidden, weight):
            options = _options(explain(hidden, weight, targets, **given), weight.dtype, chunk_size)
            given["options"] = options
            if logger.isEnabledFor(logging.DEBUG):
                plan = explain(hidden, weight, targets, **given)
                source = plan.budget_from if options.memory_budget is None else BUDGET_FROM
                logger.debug("TRL's fused head: %s", replace(plan, budget_from=source))
            scores = linear_logprob(hidden, weight, targets, **given)
        values = [getattr(scores, name) for name in OUTPUTS.values()]
        # TRL differentiates no other.
        values = [
            one if one is None or name in ("logp", "entropy") else one.detach()
            for name, one in zip(OUTPUTS.values(), values, strict=True)
        ]
        # float64 products give float64 scores; TRL's are float32 always.
        return tuple(
            value.float() if value is not None and value.is_floating_point() else value
            for value in values
        )


def default_budget(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    *,
    trains_weight: bool,
    keeps: bool,
    device_memory: int,
    tile_cols: int = TILE_COLS,
) -> int:
    """Bytes of workspace that the adapter takes on a GPU.

    TRL's own head takes a tile of at most 4096 rows and ``tile_cols`` columns in ``dtype``, and the
    float32 gradient of a 16-bit weight where it is trained. Where these hold the exponentials of
    all rows, which spare a product, and the copies of rows that fastpref makes and TRL does not,
    the budget is what keeps all exponentials. A quarter of it is free then, for the tile of a
    gradient at the entropy. Where they do not, the budget is what TRL takes less those copies, or
    as much more as holds the exponentials, up to a sixteenth of the device's memory. Where that is
    too much at the time, the call runs again with less.

    A weight of another dtype than the products is copied whole from forward to backward, which TRL
    does tile by tile: with all given back, fastpref needs that copy more than TRL.

    Args:
        rows, hidden_size, vocab_size: N, H and V.
        dtype: of the products.
        weight_dtype: of the weight and its gradient.
        trains_weight: whether the weight needs a gradient.
        keeps: whether a gradient is made from exponentials that are kept: not without one, and not
            where hidden alone needs one, of ``log_probs`` alone.
        device_memory: of the device in all, bytes.
    """
    tile = min(rows, TILE_ROWS) * tile_cols * dtype.itemsize
    if not keeps:
        return max(1, tile)
    theirs, more = tile, 0
    if trains_weight and weight_dtype.itemsize < 4:
        theirs += vocab_size * hidden_size * 4
    if weight_dtype != dtype:
        more = vocab_size * hidden_size * dtype.itemsize
    exponentials, one = rows * vocab_size * dtype.itemsize, rows * hidden_size * dtype.itemsize
    # A quarter of the budget stays free for a tile.
    whole = max(1, -(-4 * exponentials // 3))
    # Of rows TRL has the gradient in float32 and rounded; fastpref packed rows, the same scaled,
    # the gradient, the same in place, and where some are recomputed it in float32 and a product.
    if exponentials + one + more <= theirs:
        return max(tile, whole)
    theirs -= 3 * one + PRODUCT_BYTES + more
    return max(tile, theirs, min(whole, device_memory // BUDGET_SHARE))


def _options(plan: Plan, weight_dtype: torch.dtype, tile_cols: int) -> ScoringOptions:
    """For a call that would run by ``plan`` without any.

    On CPU TRL hands over unscored positions too and drops their scores afterwards. They are known
    by their gradient of 0, hence only in backward: every product with a gradient in it belongs
    there. Elsewhere TRL compacts the batch, and the automatic choice is best.
    """
    if plan.device_type == "cpu":
        return ScoringOptions(schedule="keep")
    budget = default_budget(
        plan.scored,
        plan.hidden_size,
        plan.vocab_size,
        plan.dtype,
        weight_dtype,
        trains_weight=plan.needs_weight,
        keeps=plan.needs_weight or plan.needs_bias or (plan.needs_hidden and not plan.only_logp),
        device_memory=plan.total_memory,
        tile_cols=tile_cols,
    )
    return ScoringOptions(memory_budget=budget)


def _products_in_hidden_dtype(
    hidden: Tensor, weight: Tensor
) -> contextlib.AbstractContextManager[Any]:
    """Without autocast TRL multiplies in hidden's dtype, also when the weight's is wider."""
    device = hidden.device.type
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    if half and weight.dtype != hidden.dtype and not torch.is_autocast_enabled(device):
        return torch.autocast(device, dtype=hidden.dtype)
    return contextlib.nullcontext()


def _weight_context() -> WeightContext | None:
    """Under ZeRO-3 the head is partitioned again before backward and must be gathered there."""
    deepspeed = importlib.import_module("transformers.integrations.deepspeed")
    if not deepspeed.is_deepspeed_zero3_enabled():
        return None
    gather = _trl_utils().maybe_gather_lm_head_ctx

    def context(weight: Tensor, bias: Tensor | None) -> contextlib.AbstractContextManager[Any]:
        # TRL has gathered it around the forward pass, and to leave twice would partition it twice.
        found: contextlib.AbstractContextManager[Any]
        found = contextlib.nullcontext() if weight.numel() else gather(weight, bias)
        return found

    return context


def _trl_utils() -> ModuleType:
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise ImportError(
            f"fastpref.integrations.trl needs TRL 1.15 or newer, and {MODULE} does not import "
            f'({error}); install it with: pip install "fastpref[trl]"'
        ) from error


def _trl_version() -> str:
    return importlib.metadata.version("trl")


def _check_known(function: Any) -> None:
    """Raise RuntimeError unless ``function`` is the fused head of a TRL that is known here."""
    version = _trl_version()
    # packaging is there because TRL needs it.
    release = importlib.import_module("packaging.version").Version(version).release
    forward = getattr(function, "forward", None)
    parameters = None if forward is None else tuple(inspect.signature(forward).parameters)
    if release >= OLDEST and parameters == PARAMETERS:
        return
    if parameters is None:
        found = f"{MODULE} has no {SYMBOL} with a forward"
    else:
        found = f"{MODULE}.{SYMBOL}.forward({', '.join(parameters)})"
    raise RuntimeError(
        f"fastpref does not know the fused head of TRL {version}. Found: {found}. Expected: "
        f"TRL {'.'.join(map(str, OLDEST))} or newer with {MODULE}.{SYMBOL}.forward("
        f"{', '.join(PARAMETERS)}). Nothing was patched. Install a TRL that fastpref knows, "
        'pip install "fastpref[trl]", or upgrade fastpref'
    )
