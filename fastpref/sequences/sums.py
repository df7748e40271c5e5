# SPDX-License-Identifier: Apache-2.0
"""Per-token log-probabilities to per-sequence ones: padded rows, packed segments or explicit ids.

    sum:   s[b] = sum over the scored tokens t of b of  token_weights[t] * logp[t]
    mean:  s[b] / number of scored tokens of b, and 0 for a sequence without any

A weight of exactly 0 takes its token out of the sum, a score of NaN or -inf too.

Accumulation is in fp64 and rounded once, so the layouts agree with each other and a long response
costs no precision. Nothing here uses atomics, and on CUDA nothing reads a value back to the host.

On CUDA a compiled operator adds up (csrc/cuda/sequence_sums.cuh); everything else, and what traces
or transforms the call, gets the same from plain torch, which on a CPU is as quick.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._extension import operators_serve
from ..objectives.checks import hint, is_integer, no_tensor
from ..objectives.reading import readable

# Of the operator; others it is given in float64.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Layout(NamedTuple):
    """Where the sequences are: padded rows, or packed by either of boundaries and ids."""

    mask: Tensor | None = None  # (B, T), bool
    boundaries: Tensor | None = None  # (B + 1,), int64
    ids: Tensor | None = None  # (N,), int64
    num_sequences: int = 0  # of ids

    def scored(self) -> Tensor | None:
        """Shaped like the tokens; None: all are."""
        return self.mask if self.ids is None else self.ids >= 0


def sequence_logp(
    logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    token_weights: Tensor | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Reduce per-token log-probabilities to one number per sequence.

    Args:
        logp: ``(B, T)`` padded, or packed ``(N,)`` or ``(1, N)``; any floating dtype.
        mask: ``(B, T)``, bool or integer, nonzero = scored. Padded only; a padded mean needs it.
        cu_seqlens: ``(B + 1,)`` integer boundaries of packed sequences, from 0 to N: sequence b is
            ``logp[cu_seqlens[b]:cu_seqlens[b + 1]]``, every token of it scored.
        sequence_ids: like ``logp``, integer, the sequence of each packed token in any order;
            negative = not scored. Needs ``num_sequences``.
        num_sequences: B, for ``sequence_ids`` only.
        token_weights: shaped like ``logp``; differentiable. A token of weight 0 contributes nothing
            to sum and gradients, whatever its score, and counts as scored in a mean; the gradient
            of its weight is its score where that is finite, else 0.
        reduction: "sum", or "mean" = weighted sum over the number of scored tokens.

    Returns:
        ``(B,)``, fp64 if ``logp`` is fp64 and fp32 otherwise; 0 for an empty sequence.
        Differentiable. A token that is not scored is not read: NaN there reaches nothing.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape or combination of arguments. The values of
            ``cu_seqlens`` and ``sequence_ids`` are checked on CPU only; elsewhere that would wait
            for the device.
    """
    if reduction not in ("sum", "mean"):
        known = hint(reduction, ("sum", "mean"))
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}{known}")
    _check_kinds(logp, mask, cu_seqlens, sequence_ids, token_weights, num_sequences)
    _check_per_token(logp, mask, sequence_ids, token_weights)
    packed = cu_seqlens is not None or sequence_ids is not None
    if packed and logp.dim() == 2 and logp.shape[0] == 1:
        logp = logp[0]
        sequence_ids = None if sequence_ids is None else sequence_ids[0]
        token_weights = None if token_weights is None else token_weights[0]
    if logp.dim() == 2:
        _check_padded(mask, cu_seqlens, sequence_ids, num_sequences, reduction)
        layout = _Layout(mask=None if mask is None else mask.bool())
    elif cu_seqlens is not None:
        boundaries = _check_boundaries(logp, cu_seqlens, mask, sequence_ids, num_sequences)
        layout = _Layout(boundaries=boundaries)
    else:
        ids, count = _check_ids(sequence_ids, mask, num_sequences)
        layout = _Layout(ids=ids, num_sequences=count)
    mean = reduction == "mean"
    if _operator_serves(logp, token_weights, layout):
        sums: Tensor = _OperatorSums.apply(logp, token_weights, layout, mean)  # type: ignore[no-untyped-call]
    else:
        sums = _torch_sums(logp, token_weights, layout, mean)
    return sums if logp.dtype == torch.float64 else sums.float()


def _operator_serves(logp: Tensor, token_weights: Tensor | None, layout: _Layout) -> bool:
    return logp.is_cuda and operators_serve(logp, token_weights, *layout[:3])


def _torch_sums(logp: Tensor, token_weights: Tensor | None, layout: _Layout, mean: bool) -> Tensor:
    """(B,) in fp64."""
    scored = layout.scored()
    values = _keep(logp, scored)
    if token_weights is not None:
        weights = _keep(token_weights, scored)
        values = _finite_at_zero(values, weights) * weights
    sums = _total(values, layout)
    if mean:
        ones = torch.ones_like(values, requires_grad=False)
        sums = sums / _total(_keep(ones, scored), layout).clamp(min=1)
    return sums


def _keep(values: Tensor, scored: Tensor | None) -> Tensor:
    """``values`` in fp64, 0 where not scored; a product with 0 would let NaN through."""
    return (values if scored is None else torch.where(scored, values, 0)).double()


def _finite_at_zero(values: Tensor, weights: Tensor) -> Tensor:
    """``values``; where the weight is 0 a constant, 0 for NaN and infinities."""
    constant = torch.nan_to_num(values.detach(), nan=0.0, posinf=0.0, neginf=0.0)
    return torch.where(weights == 0, constant, values)


def _total(values: Tensor, layout: _Layout) -> Tensor:
    if layout.boundaries is not None:
        return _sum_segments(values, layout.boundaries)
    if layout.ids is not None:
        return _sum_by_id(values, layout.ids.clamp(min=0), layout.num_sequences)
    return values.sum(-1)


def _sum_segments(values: Tensor, boundaries: Tensor) -> Tensor:
    if values.numel() == 0 or boundaries.numel() == 1:
        # Nothing to launch on a GPU; the sum of nothing keeps the graph connected.
        return values.new_zeros(boundaries.numel() - 1) + values.sum()
    if values.device.type == "cpu" and _is_transformed():
        # To torch.func and forward mode, which know little of segment_reduce.
        tokens = torch.arange(values.shape[0], dtype=torch.int64, device=values.device)
        place = torch.searchsorted(boundaries, tokens, right=True)
        return values.new_zeros(boundaries.numel() + 1).index_add(0, place, values)[1:-1]
    # unsafe=True: the checks torch would make read the offsets back to the host.
    sums: Tensor = torch.segment_reduce(values, "sum", offsets=boundaries, unsafe=True)
    return sums


def _is_transformed() -> bool:
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def _sum_by_id(values: Tensor, ids: Tensor, num_sequences: int) -> Tensor:
    if values.device.type == "cpu" and num_sequences > 0:
        return values.new_zeros(num_sequences).index_add(0, ids, values)
    return _sum_by_sorted_id(values, ids, num_sequences)


def _sum_by_sorted_id(values: Tensor, ids: Tensor, num_sequences: int) -> Tensor:
    """As index_add, in a fixed order: on a GPU index_add is atomic and varies run to run."""
    order, boundaries = _sorted_by_id(ids, num_sequences)
    return _sum_segments(values[order], boundaries)


def _sorted_by_id(ids: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """The tokens' order by sequence, (N,), and the boundaries between sequences there, (B + 1,)."""
    ids, order = torch.sort(ids, stable=True)
    firsts = torch.arange(num_sequences + 1, device=ids.device, dtype=ids.dtype)
    return order, torch.searchsorted(ids, firsts)


class _OperatorSums(torch.autograd.Function):
    """The sums in one launch. Their gradients are plain torch, and differentiable themselves."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, token_weights: Tensor | None, layout: _Layout, mean: bool
    ) -> Tensor:
        """(B,), fp64 where the operator was given that and fp32 otherwise."""
        order, boundaries = None, layout.boundaries
        if layout.ids is not None:
            order, boundaries = _sorted_by_id(layout.ids, layout.num_sequences)
        values, weights = logp, token_weights
        if logp.dtype not in _DTYPES or (weights is not None and weights.dtype != logp.dtype):
            values, weights = logp.double(), None if weights is None else weights.double()
        sums, counts = torch.ops.fastpref.sequence_sums(
            _contiguous_rows(values),
            None if weights is None else _contiguous_rows(weights),
            None if layout.mask is None else _contiguous_rows(layout.mask),
            order,
            boundaries,
            mean,
        )
        needs_logp, needs_weights, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            logp if needs_weights else None,
            token_weights if needs_logp or needs_weights else None,
            counts if mean else None,
            *layout[:3],
        )
        ctx.shape, ctx.num_sequences = logp.shape, layout.num_sequences
        ctx.dtypes = logp.dtype, None if token_weights is None else token_weights.dtype
        return sums  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logp, token_weights, counts, mask, boundaries, ids = ctx.saved_tensors
        layout, dtypes = _Layout(mask, boundaries, ids, ctx.num_sequences), ctx.dtypes
        per_sequence = grad if counts is None else grad.double() / counts.clamp(min=1)
        if token_weights is None:
            return _unweighted(per_sequence, layout, ctx.shape, dtypes[0]), None, None, None
        per_token = _at_tokens(per_sequence.double(), layout, ctx.shape[-1])
        (needs_logp, needs_weights, *_), scored = ctx.needs_input_grad, layout.scored()
        weights = _keep(token_weights, scored)
        d_logp = d_weights = None
        if needs_logp:
            d_logp = _keep(_keep(per_token * weights, weights != 0), scored).to(dtypes[0])
        if needs_weights:
            factor = _finite_at_zero(_keep(logp, scored), weights)
            d_weights = _keep(per_token * factor, scored).to(dtypes[1])
        return d_logp, d_weights, None, None


def _unweighted(
    per_sequence: Tensor, layout: _Layout, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Each sequence's value at its scored tokens, rounded before it is copied there."""
    # float8 cannot be selected by index.
    rounded = per_sequence.to(dtype if dtype in _DTYPES else torch.float64)
    per_token, scored = _at_tokens(rounded, layout, shape[-1]), layout.scored()
    if scored is None:
        return per_token.expand(shape).to(dtype)
    return torch.where(scored, per_token, 0).to(dtype)


def _at_tokens(per_sequence: Tensor, layout: _Layout, tokens: int) -> Tensor:
    """Each sequence's value at its tokens: (B, 1), which broadcasts to (B, T), or (N,), 0 at tokens
    of no sequence."""
    if layout.boundaries is not None:
        each = torch.arange(tokens, dtype=torch.int64, device=per_sequence.device)
        place = torch.searchsorted(layout.boundaries, each, right=True)
    elif layout.ids is not None:
        place = layout.ids.clamp(-1, layout.num_sequences) + 1
    else:
        return per_sequence.unsqueeze(1)
    # Not by indexing, of which is_grads_batched knows no derivative.
    return torch.nn.functional.pad(per_sequence, (1, 1)).index_select(0, place)


def _contiguous_rows(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


def _check_kinds(
    logp: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
    token_weights: Tensor | None,
    num_sequences: int | None,
) -> None:
    optional = {
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "sequence_ids": sequence_ids,
        "token_weights": token_weights,
    }
    for name, value in {"logp": logp, **optional}.items():
        if not isinstance(value, Tensor) and (value is not None or name == "logp"):
            raise no_tensor(name, value)
        if value is not None and value.is_complex():
            raise TypeError(f"{name} must be real, got {value.dtype}")
    if num_sequences is not None and not is_integer(num_sequences):
        raise TypeError(
            f"num_sequences must be an int or None, got {type(num_sequences).__name__}; use int()"
        )


def _check_per_token(
    logp: Tensor, mask: Tensor | None, sequence_ids: Tensor | None, token_weights: Tensor | None
) -> None:
    if not logp.is_floating_point():
        raise TypeError(f"logp must be floating point, got {logp.dtype}")
    if logp.dim() not in (1, 2):
        raise ValueError(
            f"logp must be (B, T) padded or (N,) packed, or (1, N), got shape {tuple(logp.shape)}"
        )
    per_token = {"mask": mask, "sequence_ids": sequence_ids, "token_weights": token_weights}
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != logp.shape:
            raise ValueError(
                f"{name} must be shaped like logp, {tuple(logp.shape)}, got {tuple(tensor.shape)}"
            )
    if mask is not None and mask.is_floating_point():
        raise TypeError(
            f"mask must be bool or integer, got {mask.dtype}; weights go into token_weights"
        )


def _check_padded(
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
    num_sequences: int | None,
    reduction: str,
) -> None:
    if cu_seqlens is not None or sequence_ids is not None or num_sequences is not None:
        raise ValueError(
            "cu_seqlens, sequence_ids and num_sequences describe packed logp (N,), got padded "
            "(B, T); pass mask, or flatten logp"
        )
    if reduction == "mean" and mask is None:
        raise ValueError("reduction='mean' of padded logp needs mask to count the scored tokens")


def _check_boundaries(
    logp: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    sequence_ids: Tensor | None,
    num_sequences: int | None,
) -> Tensor:
    if mask is not None or sequence_ids is not None or num_sequences is not None:
        raise ValueError(
            "cu_seqlens stands alone: drop mask, sequence_ids and num_sequences; to leave tokens "
            "of packed logp unscored pass sequence_ids, negative there, instead of cu_seqlens"
        )
    check_boundaries(cu_seqlens, logp.numel())
    if cu_seqlens.device != logp.device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} and logp on {logp.device}; move it there once, "
            "when the batch is made"
        )
    return cu_seqlens.long().contiguous()


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise TypeError or ValueError unless these are the boundaries of packed sequences; their
    values are checked on CPU only."""
    _check_integer("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens must be (B + 1,), got shape {tuple(cu_seqlens.shape)}")
    if not readable(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if (first, last) == (0, tokens) and not bool((cu_seqlens.diff() < 0).any()):
        return
    end = ", not rising throughout" if (first, last) == (0, tokens) else ""
    if int(cu_seqlens.sum()) == tokens and not bool((cu_seqlens < 0).any()):
        end = (
            ", which look like lengths: they add up to N; make boundaries of them with "
            "torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
        )
    raise ValueError(f"cu_seqlens must rise from 0 to N = {tokens}, got {first} to {last}{end}")


def _check_ids(
    sequence_ids: Tensor | None, mask: Tensor | None, num_sequences: int | None
) -> tuple[Tensor, int]:
    if sequence_ids is None:
        raise ValueError(
            "packed logp (N,) needs cu_seqlens, or sequence_ids with num_sequences; mask belongs "
            "to padded logp (B, T)"
        )
    if mask is not None:
        raise ValueError("mask belongs to padded logp; make sequence_ids negative there instead")
    if num_sequences is None:
        raise ValueError(
            "sequence_ids needs num_sequences: it fixes the output's shape without reading the ids"
        )
    if num_sequences < 0:
        raise ValueError(f"num_sequences must be >= 0, got {num_sequences}")
    _check_integer("sequence_ids", sequence_ids)
    if readable(sequence_ids) and bool((sequence_ids >= num_sequences).any()):
        raise ValueError(
            f"sequence_ids must be below num_sequences = {num_sequences}, "
            f"got {int(sequence_ids.max())}"
        )
    return sequence_ids.long(), int(num_sequences)


def _check_integer(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {tensor.dtype}")
