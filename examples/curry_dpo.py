# SPDX-License-Identifier: Apache-2.0
"""Curry-DPO's stages: easy pairs first, and each stage's policy is the reference of the next:

    python examples/curry_dpo.py

Pattnaik et al. 2024, arXiv:2403.07230: of four ranked responses to a prompt the pairs of the best
with each other, from the widest gap to the narrowest. Beside it the same pairs and steps in random
order against the first reference, and the easiest pairs alone, which is plain DPO on one pair a
prompt. What is measured is how good the answers of the trained policies are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref import preference_loss
from fastpref.curriculum import StageSampler, ranked_pairs
from fastpref.reference import frozen_copy, update_

VOCABULARY, LENGTH, GROUP = 24, 8, 4
PROMPTS, UNSEEN, BATCH, PASSES, BETA = 64, 512, 16, 3, 0.5


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


def make_lists(count: int) -> Tensor:
    """(count, GROUP, 1 + LENGTH): each response to a prompt goes on counting for one token more
    than the next worse one, and at random after that, but for the worst, which never counts."""
    ids = torch.randint(VOCABULARY, (count, GROUP, 1 + LENGTH))
    ids[:, :, 0] = ids[:, :1, 0]
    for rank in range(GROUP):
        counted = (GROUP - 1 - rank) * 2
        steps = torch.arange(1, counted + 1)
        ids[:, rank, 1 : counted + 1] = (ids[:, rank, :1] + steps) % VOCABULARY
    return ids


def scores(lists: Tensor) -> Tensor:
    """(count, GROUP): the share of tokens that count on."""
    return ((lists[..., 1:] - lists[..., :-1]) % VOCABULARY == 1).float().mean(-1)


def pretrain(model: Model) -> None:
    """It knows how to count a little: one token in four."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        ids = torch.randint(VOCABULARY, (64, 1 + LENGTH))
        for place in range(1, 1 + LENGTH):
            counts = torch.rand(64) < 0.25
            ids[counts, place] = (ids[counts, place - 1] + 1) % VOCABULARY
        logits = model.head(model(ids)[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(model: Model, pairs: Tensor, order: list[int], new_reference: list[int]) -> Model:
    """One pass over ``pairs`` (P, 2, 1 + LENGTH); the policy becomes the reference after these
    steps."""
    policy, reference = frozen_copy(model).requires_grad_(True), frozen_copy(model)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for step, start in enumerate(range(0, len(order), BATCH), 1):
        rows = pairs[order[start : start + BATCH]].transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            ref_hidden = reference(rows)[:, :-1]
        output = preference_loss(
            policy(rows)[:, :-1],
            policy.head.weight,
            rows[:, 1:],
            "dpo",
            ref_hidden=ref_hidden,
            ref_weight=reference.head.weight,
            beta=BETA,
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step in new_reference:
            update_(reference, policy, decay=0.0)
    return policy


@torch.no_grad()
def quality(policy: Model, prompts: Tensor) -> float:
    """The score of what the policy answers."""
    ids = prompts[:, None]
    for _ in range(LENGTH):
        chances = policy.head(policy(ids)[:, -1]).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1)], 1)
    return float(scores(ids).mean())


def main() -> None:
    torch.manual_seed(0)
    model, lists = Model(), make_lists(PROMPTS)
    pretrain(model)
    # A list's widest pair is in the first stage, its narrowest in the last.
    found = ranked_pairs(scores(lists))
    rows = lists.flatten(0, 1)
    pairs = torch.stack([rows[found.chosen_index], rows[found.rejected_index]], 1)
    stages = StageSampler(-found.gap, GROUP - 1)
    easy_to_hard = [one.tolist() for one in torch.tensor(list(stages)).split(stages.sizes)]
    curriculum = [pair for stage in easy_to_hard for pair in PASSES * stage]
    ends = [PASSES * step for step in stages.last_steps(BATCH)]
    shuffled = [pair for _ in range(PASSES) for pair in torch.randperm(len(pairs)).tolist()]
    easiest = (GROUP - 1) * PASSES * easy_to_hard[0]
    policies = {
        "before": model,
        "curriculum": train(model, pairs, curriculum, ends),
        "random order": train(model, pairs, shuffled, []),
        "easiest pairs": train(model, pairs, easiest, []),
    }
    unseen = torch.randint(VOCABULARY, (UNSEEN,))
    for name, policy in policies.items():
        print(f"{name:13}   score {quality(policy, unseen):.3f}")


if __name__ == "__main__":
    main()
