# SPDX-License-Identifier: Apache-2.0
"""Curry-DPO's stages: easy pairs first, and each stage's policy is the reference of the next:

    python examples/curry_dpo.py

Pattnaik et al. 2024, arXiv:2403.07230: of four ranked responses to a prompt the pairs of the best
with each other, from the widest gap to the narrowest. Beside it the same pairs and steps in random
order against the first reference, and the easiest pairs alone, which is plain DPO on one pair a
prompt. What is measured is how good the answers of the trained policies are.
"""

import torch
from torch import Tensor, nn

from fastpref import preference_loss
from fastpref.curriculum import StageSampler, ranked_pairs
from fastpref.reference import frozen_copy, update_

VOCABULARY, LENGTH, GROUP = 24, 8, 4
PROMPTS, UNSEEN, BATCH, PASSES, BETA, SEEDS = 64, 512, 16, 3, 0.5, 2


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


def compare(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model, lists = Model(), make_lists(PROMPTS)
    # A list's widest pair is in the first stage, its narrowest in the last.
    found = ranked_pairs(scores(lists))
    rows = lists.flatten(0, 1)
    pairs = torch.stack([rows[found.chosen_index], rows[found.rejected_index]], 1)
    stages = StageSampler(-found.gap, GROUP - 1, seed=seed)
    easy_to_hard = [one.tolist() for one in torch.tensor(list(stages)).split(stages.sizes)]
    curriculum = [pair for stage in easy_to_hard for pair in PASSES * stage]
    ends = [PASSES * step for step in stages.last_steps(BATCH)]
    shuffled = [pair for _ in range(PASSES) for pair in torch.randperm(len(pairs)).tolist()]
    policies = {
        "before": model,
        "curriculum": train(model, pairs, curriculum, ends),
        "random order": train(model, pairs, shuffled, []),
        "easiest pairs": train(model, pairs, (GROUP - 1) * PASSES * easy_to_hard[0], []),
    }
    unseen = torch.randint(VOCABULARY, (UNSEEN,))
    return {name: quality(policy, unseen) for name, policy in policies.items()}


def main() -> None:
    found = [compare(seed) for seed in range(SEEDS)]
    for name in found[0]:
        print(f"{name:13}   score {sum(one[name] for one in found) / SEEDS:.3f}")


if __name__ == "__main__":
    main()
