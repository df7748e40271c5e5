# SPDX-License-Identifier: Apache-2.0
"""Weights of tokens: what is summed to the log-probability of a response, instead of every token.

Each maker returns fp32 shaped like ``mask`` ``(B, T)``, bool or integer and nonzero at scored
tokens, with 0 at the others, for ``sequence_logp(..., token_weights=...)``. Policy and reference
take the same weights. Nothing here reads a value back from a device.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import is_number
from ..objectives.reading import readable


def length_desensitized_weights(mask: Tensor, partner_lengths: Tensor, *, alpha: float) -> Tensor:
    """LD-DPO: what a response has beyond the length of the other one of its pair counts less.

        weight = 1 for the first min(n, partner) scored tokens, alpha for the rest

    Liu et al. 2024, arXiv:2409.06411; 1 is plain DPO. TRL weights policy and reference like this,
    older trainers the policy alone.

    Args:
        mask: ``(B, T)``, nonzero = scored.
        partner_lengths: ``(B,)`` integer, scored tokens of the other response.
        alpha: in [0, 1].
    """
    scored = _scored(mask)
    _check_lengths("partner_lengths", partner_lengths, mask)
    _check_number("alpha", alpha, low=0.0, high=1.0, includes=(0.0, 1.0))
    shared = _places(scored) < partner_lengths[:, None]
    weights = torch.full(mask.shape, alpha, dtype=torch.float32, device=mask.device)
    return torch.where(scored, weights.masked_fill(shared, 1), 0)


def sampled_weights(
    mask: Tensor, partner_lengths: Tensor, *, generator: torch.Generator | None
) -> Tensor:
    """SamPO: of the longer response of a pair, as many tokens drawn at random as the other has.

        weight = 1 for min(n, partner) scored tokens drawn without replacement, 0 for the rest

    Lu et al. 2024, arXiv:2406.10957.

    Args:
        mask: ``(B, T)``, nonzero = scored.
        partner_lengths: ``(B,)`` integer, scored tokens of the other response.
        generator: of the random numbers, on the device of ``mask``; None takes torch's own.
    """
    scored = _scored(mask)
    _check_lengths("partner_lengths", partner_lengths, mask)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or None, got {type(generator).__name__}"
            )
        if generator.device.type != mask.device.type:
            raise ValueError(
                f"generator must be on the device of mask, {mask.device}, got {generator.device}"
            )
    keys = torch.rand(mask.shape, generator=generator, dtype=torch.float32, device=mask.device)
    order = torch.argsort(torch.where(scored, keys, math.inf), dim=-1, stable=True)
    ranks = torch.argsort(order, dim=-1)
    return ((ranks < partner_lengths[:, None]) & scored).float()


def decay_weights(mask: Tensor, *, gamma: float) -> Tensor:
    """D2PO: earlier tokens count more.

        weight = gamma^t for scored token t of the response, from t = 0

    Shao et al. 2025, arXiv:2502.14340; 1 is plain DPO.

    Args:
        mask: ``(B, T)``, nonzero = scored.
        gamma: in (0, 1].
    """
    scored = _scored(mask)
    _check_number("gamma", gamma, low=0.0, high=1.0, includes=(1.0,))
    return torch.where(scored, torch.pow(gamma, _places(scored).float()), 0)


def divergence_mask(tokens: Tensor, partner_tokens: Tensor, mask: Tensor) -> Tensor:
    """MCTS-DPO: only from the first token in which the two responses of a pair differ.

        weight = 1 for scored token t if tokens[s] != partner_tokens[s] for some s <= t

    Xie et al. 2024, arXiv:2405.00451. Column s is compared with column s, scored or not, so the two
    responses must start in the same one. Two that nowhere differ have weight 0 throughout.

    Args:
        tokens: ``(B, T)`` integer, the ids whose log-probabilities are weighted.
        partner_tokens: ``(B, T)`` integer, those of the other response.
        mask: ``(B, T)``, nonzero = scored.
    """
    scored = _scored(mask)
    for name, value in (("tokens", tokens), ("partner_tokens", partner_tokens)):
        _check_integers(name, value, mask.shape)
    apart = (tokens != partner_tokens).cumsum(-1) > 0
    return (apart & scored).float()


def step_weights(step_ids: Tensor, step_values: Tensor, mask: Tensor) -> Tensor:
    """TPO (tree preference optimization): the weighted mean, over steps, of their token means.

        weight = v_k / (n_k sum v) at the n_k scored tokens of step k, summed over steps with any

    Liao et al. 2024, arXiv:2410.12854, whose code has v_k = 1 + cosine between the mean hidden
    state of step k and that of the same step of the best response; here v gets no gradient. A
    response whose values sum to 0 has weight 0 throughout.

    Args:
        step_ids: ``(B, T)`` integer, the step of each token, a column of ``step_values``;
            negative = none.
        step_values: ``(B, S)``, not negative.
        mask: ``(B, T)``, nonzero = scored.

    The values of both are checked on CPU only; elsewhere that would wait for the device.
    """
    scored = _scored(mask)
    _check_integers("step_ids", step_ids, mask.shape)
    _check_tensor("step_values", step_values)
    if step_values.dim() != 2 or step_values.shape[0] != mask.shape[0]:
        raise ValueError(
            f"step_values must be (B, S) with B = {mask.shape[0]}, got {tuple(step_values.shape)}"
        )
    num_steps = step_values.shape[1]
    if readable(step_ids) and bool((step_ids >= num_steps).any()):
        raise ValueError(
            f"step_ids must be below S = {num_steps} of step_values, got {int(step_ids.max())}"
        )
    if readable(step_values) and not bool((step_values >= 0).all()):
        raise ValueError(f"step_values must be >= 0, got {step_values.min().item():g}")
    values = step_values.detach().double()
    # Tokens of no step are counted in a column of their own, the last one.
    outside = ~scored | (step_ids < 0) | (step_ids >= num_steps)
    columns = torch.where(outside, num_steps, step_ids).long()
    counts = values.new_zeros(values.shape[0], num_steps + 1)
    counts = counts.scatter_add(1, columns, torch.ones_like(columns, dtype=values.dtype))
    counts = counts[:, :-1]  # exact, so the order in which a GPU adds does not matter
    total = torch.where(counts > 0, values, 0).sum(-1, keepdim=True)
    per_token = values / (counts * total)
    per_token = torch.where((counts > 0) & (total > 0), per_token, 0)
    return torch.nn.functional.pad(per_token, (0, 1)).gather(1, columns).float()


def turn_mask(turn_ids: Tensor, trained_turns: Tensor, mask: Tensor) -> Tensor:
    """M-DPO: only the turns that are trained, not those of the user or of a tool.

        weight = 1 for scored tokens whose turn is one of trained_turns

    Xiong et al. 2024, arXiv:2409.02392.

    Args:
        turn_ids: ``(B, T)`` integer, the turn of each token.
        trained_turns: ``(K,)`` integer, the turns trained, of all responses.
        mask: ``(B, T)``, nonzero = scored.
    """
    scored = _scored(mask)
    _check_integers("turn_ids", turn_ids, mask.shape)
    _check_integers("trained_turns", trained_turns)
    if trained_turns.dim() != 1:
        raise ValueError(f"trained_turns must be (K,), got {tuple(trained_turns.shape)}")
    trained = (turn_ids[..., None] == trained_turns).any(-1)  # isin waits for the device
    return (trained & scored).float()


def token_credit(logp: Tensor, ref_logp: Tensor, *, beta: float) -> Tensor:
    """DPO's implicit reward, token by token, without gradient.

        credit = beta (log policy - log reference)

    Rafailov et al. 2024 ("From r to Q*"), arXiv:2404.12358: the step's reward, shaped by the change
    of the optimal value. The credits of a response sum to its DPO reward.

    Args:
        logp: ``(B, T)`` or ``(N,)``, log-probabilities of the policy.
        ref_logp: the same of the reference.
        beta: > 0, that of the training.
    """
    for name, value in (("logp", logp), ("ref_logp", ref_logp)):
        _check_tensor(name, value)
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
    _check_shape("ref_logp", ref_logp, "logp", logp.shape)
    _check_number("beta", beta, low=0.0, high=math.inf, includes=())
    return (beta * (logp.detach().double() - ref_logp.detach().double())).float()


def _places(scored: Tensor) -> Tensor:
    """0, 1, ... at the scored tokens of each row."""
    return scored.cumsum(-1) - 1


def _scored(mask: Tensor) -> Tensor:
    _check_tensor("mask", mask)
    if mask.is_floating_point():
        raise TypeError(f"mask must be bool or integer, got {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask must be (B, T), got {tuple(mask.shape)}")
    return mask != 0


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_integers(name: str, value: Any, shape: torch.Size | None = None) -> None:
    _check_tensor(name, value)
    if value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    if shape is not None:
        _check_shape(name, value, "mask", shape)


def _check_shape(name: str, value: Tensor, like: str, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{name} must be shaped like {like}, {tuple(shape)}, got {tuple(value.shape)}"
        )


def _check_lengths(name: str, value: Any, mask: Tensor) -> None:
    _check_integers(name, value)
    if value.shape != mask.shape[:1]:
        raise ValueError(
            f"{name} must be one value a response, {tuple(mask.shape[:1])}, "
            f"got {tuple(value.shape)}"
        )


def _check_number(
    name: str, value: Any, *, low: float, high: float, includes: tuple[float, ...]
) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (low < float(value) < high or value in includes):
        left, right = "[" if low in includes else "(", "]" if high in includes else ")"
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, got {value!r}")
