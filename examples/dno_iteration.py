# SPDX-License-Identifier: Apache-2.0
"""DNO's iteration: sample from the policy, judge, train towards what wins, and begin again from
there:

    python examples/dno_iteration.py

Direct Nash optimization, Rosset et al. 2024, arXiv:2404.03715, algorithm 1: of several responses of
the policy itself, each one's win rate against the others; a logistic regression of the log-ratios
on them (``soft_label_dpo``); the next iteration's reference is this one's policy. A judge that
counts stands for the paper's large model, and there is neither a teacher's response nor replay.
Beside it the same number of steps on pairs of the first policy alone, with a fixed reference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref import preference_loss
from fastpref.curriculum import ranked_pairs
from fastpref.reference import frozen_copy, update_

VOCABULARY, PROMPTS, LENGTH, GROUP = 16, 16, 6, 6
ITERATIONS, STEPS, BETA = 4, 12, 0.3


class Model(nn.Module):
    """Any model that gives hidden states will do."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embeddings(ids))[0]
        return hidden

    @torch.no_grad()
    def sample(self, prompts: Tensor) -> Tensor:
        """(B,) -> (B, 1 + LENGTH), the prompt first."""
        ids = prompts[:, None]
        for _ in range(LENGTH):
            chances = self.head(self(ids)[:, -1]).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1)], 1)
        return ids


def score(ids: Tensor) -> Tensor:
    """Of the judge: how many tokens of a response go on counting from the one before."""
    return ((ids[:, 1:] - ids[:, :-1]) % VOCABULARY == 1).sum(1).float()


def win_rates(ids: Tensor) -> Tensor:
    """(G, K): how often each response of a group is preferred to the others."""
    scores = score(ids).view(-1, GROUP)
    wins = torch.sigmoid(scores[:, :, None] - scores[:, None, :])
    return (wins.sum(2) - 0.5) / (GROUP - 1)


def train(policy: Model, reference: Model, ids: Tensor, steps: int) -> None:
    """On pairs of the best of each group against the rest."""
    rates = win_rates(ids)
    pairs = ranked_pairs(rates)
    rows = torch.cat([ids[pairs.chosen_index], ids[pairs.rejected_index]])
    # The judge's preference between the two, made sharper by the number of responses it is over.
    probs = torch.sigmoid(GROUP * pairs.gap)
    with torch.no_grad():
        ref_hidden = reference(rows)[:, :-1]
    optimizer = torch.optim.Adam(policy.parameters(), lr=4e-3)
    for _ in range(steps):
        output = preference_loss(
            policy(rows)[:, :-1],
            policy.head.weight,
            rows[:, 1:],
            "soft_label_dpo",
            ref_hidden=ref_hidden,
            ref_weight=reference.head.weight,
            extras={"preference_probs": probs},
            beta=BETA,
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()


def wins(policy: Model, first: Model) -> float:
    """How often the judge prefers the policy's response to the first policy's."""
    prompts = torch.arange(PROMPTS).repeat(256)
    gap = score(policy.sample(prompts)) - score(first.sample(prompts))
    return float(torch.sigmoid(gap).mean())


def pretrain(model: Model) -> None:
    """It knows how to count a little: one token in three."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(VOCABULARY, (64, 1 + LENGTH))
        for place in range(1, 1 + LENGTH):
            counts = torch.rand(64) < 0.35
            ids[counts, place] = (ids[counts, place - 1] + 1) % VOCABULARY
        logits = model.head(model(ids)[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    first = Model()
    pretrain(first)
    first = frozen_copy(first)
    prompts = torch.arange(PROMPTS).repeat_interleave(GROUP)

    policy, reference = Model(), frozen_copy(first)
    update_(policy, first, decay=0.0)
    for iteration in range(1, ITERATIONS + 1):
        train(policy, reference, policy.sample(prompts), STEPS)
        update_(reference, policy, decay=0.0)
        print(f"iteration {iteration}   wins against the first policy {wins(policy, first):.3f}")

    offline = Model()
    update_(offline, first, decay=0.0)
    train(offline, first, first.sample(prompts), ITERATIONS * STEPS)
    print(f"offline       wins against the first policy {wins(offline, first):.3f}")


if __name__ == "__main__":
    main()
