# SPDX-License-Identifier: Apache-2.0
"""A batch of pairs with each prompt once (Wang and Hegde, arXiv:2410.20305).

A pair's row is the prompt, the chosen completion, the rejected one. A mask keeps the completions
apart, and positions of both go on from the prompt's last. That last token is there twice, once
before each completion: a position predicts one token, and this one has two to predict.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .joined import Form, Fused, Rows, attention_of

ATTENTION = ("sdpa", "eager")  # that take a mask of any two tokens
PROMPT, CHOSEN, REJECTED, PADDING = range(4)  # what a token belongs to


def sharing_supported(model: Any) -> str | None:
    """Why prompts cannot be shared in batches of this model, or None."""
    kind, config = type(model).__name__, model.config.get_text_config()
    attention = attention_of(model)
    if attention not in ATTENTION:
        return (
            f"{kind} has attn_implementation={attention!r}, which is given no mask of any two "
            f"tokens; expected {' or '.join(ATTENTION)}. Load it with attn_implementation='sdpa', "
            "or set prefix_sharing=False"
        )
    layers = getattr(config, "layer_types", None)
    odd = sorted({one for one in layers or () if one != "full_attention"})
    window = getattr(config, "sliding_window", None)
    if layers is None and window is not None:
        odd = [f"sliding_window={window}"]
    if "local" in (getattr(config, "attention_layers", None) or ()):
        odd = ["local attention"]
    if odd:
        return (
            f"{kind} has {', '.join(odd)}, for which it matters how far apart tokens lie in a row; "
            "expected attention to all tokens before. Set prefix_sharing=False"
        )
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return (
            f"{kind} takes no position_ids, and would count positions along the row. Set "
            "prefix_sharing=False"
        )
    return None


def shared_call(model: nn.Module, fused: Fused, rows: Rows) -> dict[str, Any]:
    """What ``fused`` returns of padded rows, chosen ones and then as many rejected, by name.

    Raises:
        ValueError: an odd number of rows.
    """
    places = _places(rows)
    output = fused(
        input_ids=_joined(rows.ids, places, fill=0),
        attention_mask=_mask(model, _joined(places.branches, places, fill=PADDING)),
        position_ids=_joined(places.ranks, places, fill=0),
        shift_labels=_joined(rows.ahead, places, fill=-100),
        **rows.others,
    )

    def in_rows(value: Any) -> Any:
        """Of (P, width) by token (2P, T - 1), 0 where there is padding."""
        if not isinstance(value, Tensor) or value.dim() != 2:
            return value
        found = torch.cat((value, value)).gather(1, places.columns.to(value.device))
        return found.masked_fill(~rows.kept.to(value.device), 0)[:, :-1]

    return {name: in_rows(value) for name, value in output.items()}


class _Places(NamedTuple):
    """Where the tokens of (2P, T) padded rows lie in (P, width) joined ones."""

    ranks: Tensor  # (2P, T), how many tokens of its row are before each
    branches: Tensor  # (2P, T), what each belongs to
    columns: Tensor  # (2P, T)
    width: int


def _places(rows: Rows) -> _Places:
    if len(rows.ids) % 2:
        raise ValueError(
            "prefix_sharing=True takes pairs, chosen rows and then as many rejected ones; got "
            f"{len(rows.ids)} rows. Set prefix_sharing=False"
        )
    ranks = (rows.kept.long().cumsum(1) - 1).clamp(min=0)
    lengths = rows.kept.sum(1, keepdim=True)
    # Rows from their first token on, wherever the padding is.
    starts = rows.kept.long().argmax(1, keepdim=True)
    steps = torch.arange(rows.ids.shape[1], device=rows.ids.device, dtype=torch.long)
    sources = (starts + steps).clamp(max=rows.ids.shape[1] - 1)
    ids, ahead = rows.ids.gather(1, sources), rows.ahead.gather(1, sources)
    unscored = (steps < lengths) & (ahead == -100)
    (chosen, rejected), (one, other) = ids.chunk(2), unscored.chunk(2)
    # What is scored, by the last token of a prompt first, is each row's own.
    shared = ((chosen == rejected) & one & other).long().cumprod(1).sum(1, keepdim=True)
    chosen_ranks, rejected_ranks = ranks.chunk(2)
    (behind, more) = lengths.chunk(2)
    after = torch.where(rejected_ranks < shared, 0, behind - shared)
    branches = torch.cat((torch.full_like(chosen, CHOSEN), torch.full_like(rejected, REJECTED)))
    branches = torch.where(ranks < torch.cat((shared, shared)), PROMPT, branches)
    return _Places(
        ranks,
        branches.masked_fill(~rows.kept, PADDING),
        torch.cat((chosen_ranks, rejected_ranks + after)),
        int((behind + more - shared).max()),
    )


def _joined(values: Tensor, places: _Places, fill: int) -> Tensor:
    """(2P, T) -> (P, width)."""
    columns = places.columns.masked_fill(places.branches == PADDING, places.width)
    # A column more, for padding. Prompts of both rows are written, and are the same.
    made = values.new_full((len(values) // 2, places.width + 1), fill)
    for half, where in zip(values.chunk(2), columns.chunk(2), strict=True):
        made.scatter_(1, where, half)
    return made[:, :-1]


def _mask(model: Any, branches: Tensor) -> Tensor:
    """(P, 1, width, width): each token sees those before it of its prompt and of its own branch."""
    seen = branches[:, None, :] == branches[:, :, None]
    seen = (seen | (branches == PROMPT)[:, None, :]).tril_()[:, None]
    if attention_of(model) == "sdpa":
        return seen
    blocked = torch.finfo(model.dtype).min
    return torch.zeros_like(seen, dtype=model.dtype).masked_fill_(~seen, blocked)


def _pair(ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A pair of the batch's tokens, as long as its rows: an attention that reaches less far than
    the mask lets it is seen to."""
    tokens = ids[kept]
    length = max(ids.shape[1], 4)
    steps = torch.arange(length, device=ids.device, dtype=torch.long) % len(tokens)
    row, prompt = tokens[steps], length // 2
    pair = torch.stack((row, torch.cat((row[:prompt], row[prompt:].flip(0)))))
    labels = torch.cat((torch.full_like(pair[:, :prompt], -100), pair[:, prompt:]), dim=1)
    return pair, torch.ones_like(pair, dtype=torch.bool), labels


PREFIX_SHARING = Form(
    "prefix_sharing", "follows a mask and positions of its caller's", shared_call, _pair
)
