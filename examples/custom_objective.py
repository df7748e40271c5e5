# SPDX-License-Identifier: Apache-2.0
"""An objective of your own, ten lines of plain torch, on the fused schedules of the built-in ones:

    python examples/custom_objective.py

It takes log-probabilities and returns one loss a pair; no kernel is written, and
``preference_loss`` still holds no logits. Any model that gives hidden states will do for ``Model``.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref import PreferenceOutput, preference_loss
from fastpref.objectives import Objective

VOCABULARY, WIDTH, PROMPT, PAIRS, LENGTH = 200, 48, 4, 16, 12


def rated_dpo(chosen, rejected, ref_chosen, ref_rejected, *, rating, beta=0.1, penalty=0.5):
    """DPO whose margin must exceed how much better a rater found the chosen response, and which
    pays for a chosen response that falls below the reference."""
    gain, loss = chosen - ref_chosen, rejected - ref_rejected
    margin = beta * (gain - loss) - rating
    losses = F.softplus(-margin) + penalty * beta * F.relu(-gain)
    return losses, beta * gain, beta * loss


# Each loss is known from its pair alone: batches may be worked through pair by pair.
OBJECTIVE = Objective(rated_dpo, unit="pair", scope="pair")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> hidden states (B, T, WIDTH)."""
        hidden: Tensor = self.body(self.embeddings(ids))[0]
        return hidden


def loss_of(policy: Model, reference: Model, ids: Tensor, rating: Tensor) -> PreferenceOutput:
    """Of ``ids`` (2 P, T), chosen rows first, and ``rating`` (P,)."""
    target = ids[:, 1:].clone()
    target[:, : PROMPT - 1] = -100
    with torch.no_grad():
        ref_hidden = reference(ids)[:, :-1]
    return preference_loss(
        policy(ids)[:, :-1],
        policy.head.weight,
        target,
        OBJECTIVE,
        ref_hidden=ref_hidden,
        ref_weight=reference.head.weight,
        extras={"rating": rating},
        beta=0.3,
    )


def make_batch() -> tuple[Tensor, Tensor]:
    """Responses to the same prompts: even tokens are preferred to odd ones."""
    ids = torch.randint(VOCABULARY // 2, (2 * PAIRS, LENGTH)) * 2
    ids[PAIRS:, PROMPT:] += 1
    ids[PAIRS:, :PROMPT] = ids[:PAIRS, :PROMPT]
    return ids, torch.rand(PAIRS)


def main() -> None:
    torch.manual_seed(0)
    policy = Model()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    ids, rating = make_batch()
    for step in range(20):
        output = loss_of(policy, reference, ids, rating)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step % 5 == 0 or step == 19:
            margin = output.metrics["rewards/margins"].item()
            print(f"step {step:2}   loss {output.loss.item():.4f}   margin {margin:+.3f}")


if __name__ == "__main__":
    main()
