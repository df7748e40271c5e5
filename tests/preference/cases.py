# SPDX-License-Identifier: Apache-2.0
"""Batches, and preference_loss on them by hand: scoring, sums and objective in plain torch."""

import torch
from torch import Tensor

from fastpref import objectives, preference_loss

B, T, H, V = 8, 7, 16, 41
SCORED = 0.7
EXTRAS = {
    "pair": {
        "reward_margin": 0.1 + torch.rand(4).double(),
        "preference_probs": torch.rand(4).double(),
        "chosen_win_probs": torch.rand(4).double(),
        "rejected_win_probs": torch.rand(4).double(),
        "chosen_q_values": torch.rand(4).double(),
        "rejected_q_values": torch.rand(4).double(),
        "other_chosen_logps": -torch.rand(4).double(),
        "other_rejected_logps": -torch.rand(4).double(),
        "running_mean": torch.tensor(0.3).double(),
        "running_std": torch.tensor(0.8).double(),
        "prompt_embeddings": torch.randn(4, 3).double(),
        "margin_plus": torch.rand(4).double(),
        "margin_minus": -torch.rand(4).double(),
        "chosen_kl": torch.rand(4).double(),
        "rejected_kl": torch.rand(4).double(),
    },
    "unit": {"labels": torch.arange(B) % 3 > 0},
    "list": {"scores": torch.rand(2, 4).double()},
    "token": {
        "advantages": torch.randn(B).double(),
        "old_token_logp": -3 - torch.rand(B, T).double(),
        "rewards": (torch.arange(B) % 2).double(),
        "group_ids": torch.arange(B) // 4,
    },
}
REQUIRED = {"shift": 0.7, "max_completion_length": T}


class Data:
    """A batch with a row that has no scored token, and NaN in hidden states that are not scored."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = draw(B, T, H), 0.5 * draw(V, H)
        self.ref_hidden, self.ref_weight = draw(B, T, H - 3), 0.5 * draw(V, H - 3)
        self.bias, self.ref_bias = draw(V), draw(V)
        self.target = torch.randint(V, (B, T), generator=generator)
        ignored = torch.rand(B, T, generator=generator) > SCORED
        ignored[5] = True
        self.target[ignored] = -100
        self.scored = ~ignored
        self.hidden[ignored] = torch.nan
        self.token_weights = torch.rand(B, T, generator=generator, dtype=torch.float64)
        for one in (self.hidden, self.weight, self.bias, self.token_weights):
            one.requires_grad_()


def token_logp(hidden: Tensor, weight: Tensor, bias: Tensor | None, data: Data) -> Tensor:
    """(B, T), 0 where not scored."""
    safe = torch.where(data.scored[..., None], hidden, 0)
    logits = safe @ weight.t() + (0 if bias is None else bias)
    picked = logits.log_softmax(-1).gather(-1, data.target.clamp(min=0)[..., None])[..., 0]
    return torch.where(data.scored, picked, 0)


def by_hand(objective: objectives.Objective, data: Data, split, extras, weighted=False) -> Tensor:
    """The losses, from plain torch; ``split`` arranges rows."""
    logp = token_logp(data.hidden, data.weight, data.bias, data)
    ref = token_logp(data.ref_hidden, data.ref_weight, data.ref_bias, data)
    if objective.unit == "token":
        extras = dict(extras)
        old = extras.pop("old_token_logp", None)
        filled = {"mask": data.scored, "ref_token_logp": ref}
        filled = {name: one for name, one in filled.items() if name in objective.extras}
        return objective(logp, old, **filled, **extras).losses
    weights = data.token_weights if weighted else 1
    sums, lengths = (logp * weights).sum(1), data.scored.sum(1)
    means = sums / lengths.clamp(min=1)
    rows = [sums, (ref * weights).sum(1)] if objective.needs_reference else [sums]
    sides = split(lengths)
    filled = {"lengths": sides[0], "chosen_lengths": sides[0], "rejected_lengths": sides[-1]}
    filled["chosen_nll"] = -split(means)[0]
    taken = {name: one for name, one in filled.items() if name in objective.extras}
    return objective(*(side for row in rows for side in split(row)), **(taken | extras)).losses


def extras_of(objective: objectives.Objective) -> dict[str, Tensor]:
    known = EXTRAS[objective.unit]
    return {
        name: known[name]
        for name in (*objective.extras, "old_token_logp")
        if (name in known and (name == "old_token_logp" or objective.extras[name].required))
        or (objective.unit == "list" and name == "scores")
    }


def configured(declared: objectives.Objective) -> objectives.Objective:
    """With a value for what has no default."""
    needed = {n: v for n, v in REQUIRED.items() if n in declared.signature.hyperparameters}
    return declared.replace(**needed)


def run(objective, data: Data, **changes):
    reference = {
        "ref_hidden": data.ref_hidden,
        "ref_weight": data.ref_weight,
        "ref_bias": data.ref_bias,
    }
    if not objective.needs_reference and objective.unit != "token":
        reference = {}
    return preference_loss(
        data.hidden,
        data.weight,
        data.target,
        objective,
        **({"bias": data.bias} | reference | changes),
    )


def halves(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.chunk(2)


SPLITS = {
    "pair": halves,
    "unit": lambda rows: (rows,),
    "list": lambda rows: (rows.view(2, 4),),
    "token": lambda rows: (rows,),
}


def compare(data: Data, losses: Tensor, output) -> None:
    torch.testing.assert_close(output.losses, losses.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.loss, losses.mean(), rtol=1e-9, atol=1e-9)
    every = (data.hidden, data.weight, data.bias, data.token_weights)
    leaves = [one for one in every if one.requires_grad]
    got = torch.autograd.grad(3 * output.loss, leaves, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(3 * losses.mean(), leaves, allow_unused=True, materialize_grads=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


INDEX = torch.tensor([[3, 0], [1, 6], [7, 2]])
LAYOUTS = {
    "halves": ("halves", halves),
    "interleaved": ("interleaved", lambda rows: (rows[0::2], rows[1::2])),
    "index": (INDEX, lambda rows: (rows[INDEX[:, 0]], rows[INDEX[:, 1]])),
}


def run_packed(objective, data: Data, **changes):
    """The same rows one after the other; the one without a scored token has none at all."""
    keep = torch.where(data.scored.any(1), T, 0)[:, None] > torch.arange(T)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    if objective.needs_reference:
        changes |= {
            "ref_hidden": data.ref_hidden[keep],
            "ref_weight": data.ref_weight,
            "ref_bias": data.ref_bias,
        }
    if "token_weights" in changes:
        changes["token_weights"] = changes["token_weights"][keep]
    return preference_loss(
        data.hidden[keep],
        data.weight,
        data.target[keep],
        objective,
        bias=data.bias,
        cu_seqlens=boundaries,
        **changes,
    )
