# SPDX-License-Identifier: Apache-2.0
"""Which pairs to train on: filters, weights, trees and probes, on data whose truth is known:

    python examples/choosing_pairs.py

No model and no training: each line says what one tool of ``fastpref.curriculum`` finds out about
pairs that are made so that it can be checked. Features stand for pooled hidden states, scores for a
judge's points, values for those of a tree search. Papers and what of each a tool is:
fastpref/curriculum/README.md. ``mixture_weights`` needs scikit-learn.
"""

import torch
from torch import Tensor

from fastpref.curriculum import (
    clear_margin,
    margin_weights,
    mixture_weights,
    ridge_difficulty,
    separability,
    singular_kernel_scores,
    step_rewards,
    tree_steps,
)
from fastpref.sequences import step_weights

PAIRS, WIDTH, NOISE = 400, 16, 1.2


def by_a_judge() -> None:
    """A judge of six points errs: of the pairs with a clear margin fewer are the wrong way round,
    and the others weigh more the harder they are."""
    quality = 6 * torch.rand(PAIRS, 2)
    points = (quality + NOISE * torch.randn(PAIRS, 2)).round().clamp(0, 6)
    better, worse = points.max(1), points.min(1)
    truth = quality.gather(1, better.indices[:, None])[:, 0] - quality.gather(
        1, (1 - better.indices)[:, None]
    ).squeeze(1)
    kept = clear_margin(better.values, worse.values)
    print(
        f"clear margin     right way round {float((truth > 0).float().mean()):.3f} of all, "
        f"{float((truth[kept] > 0).float().mean()):.3f} of the {int(kept.sum())} kept"
    )
    margin = better.values - worse.values
    weights = margin_weights(margin)
    hard, easy = weights[margin <= 1].mean(), weights[margin >= 3].mean()
    print(f"margin weights   hard pairs {float(hard):.3f}, easy ones {float(easy):.3f}")


def by_source() -> None:
    """Chosen and rejected responses of one model cannot be told apart, those of two can."""
    chosen, rejected = torch.randn(2, PAIRS, WIDTH)
    labels = torch.tensor([1, -1]).repeat_interleave(PAIRS)
    for name, shift in (("one model", 0.0), ("two models", 1.0)):
        features = chosen + shift, rejected - shift
        report = separability(*features)
        scores = singular_kernel_scores(torch.cat(features), labels)
        kernel = float((scores * labels > 0).float().mean())
        print(f"{name:15}  linear probe {report.accuracy:.3f}, singular kernel {kernel:.3f}")


def by_probe() -> None:
    """Rewards of which some are wrong: those the probe finds hard."""
    features = torch.randn(PAIRS, WIDTH)
    rewards = features @ torch.randn(WIDTH)
    wrong = torch.rand(PAIRS) < 0.1
    rewards = torch.where(wrong, rewards + 8, rewards)
    hardest = ridge_difficulty(features, rewards).topk(int(wrong.sum())).indices
    share = float(wrong[hardest].float().mean())
    print(f"ridge probe      wrong rewards {share:.3f} of the hardest, 0.1 of all")


def by_mixture() -> None:
    """Three annotators who mix two kinds of pairs differently: of which kind each pair is."""
    mixed = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    kinds = torch.rand(PAIRS, 1)
    kinds[:40] = (torch.arange(40) % 2)[:, None]  # some are plainly of one
    posteriors = torch.cat([kinds, 1 - kinds], 1) @ mixed
    weights = mixture_weights(posteriors, 2).weights[:, 0]
    error = min(float((weights - one).abs().mean()) for one in (kinds[:, 0], 1 - kinds[:, 0]))
    print(f"mixture          error of the kind of a pair {error:.4f}")


def tree() -> tuple[Tensor, Tensor]:
    """Three steps, each continued twice; the value of a node is that of the best way on."""
    parents = torch.tensor([-1, *((node - 1) // 2 for node in range(1, 15))])
    values = torch.rand(15)
    for node in range(6, -1, -1):
        values[node] = values[2 * node + 1 : 2 * node + 3].max()
    return parents, values


def by_tree() -> None:
    """Each branching is a pair of steps; the path of chosen ones leads to the best leaf."""
    parents, values = tree()
    pairs = tree_steps(parents, values)
    node, chosen = 0, dict(zip(pairs.parent.tolist(), pairs.chosen.tolist(), strict=True))
    while node in chosen:
        node = chosen[node]
    best = int(values[7:].argmax()) + 7
    print(f"tree             pairs of steps {len(pairs.parent)}, leads to {node}, best leaf {best}")
    step_ids = torch.arange(6).div(2, rounding_mode="floor").expand(2, 6)
    hidden = torch.randn(2, 6, WIDTH)
    hidden[1, 2:4] = -hidden[0, 2:4]  # the second step of the other response is unlike
    rewards = step_rewards(hidden, step_ids, torch.tensor([0, 0]))
    weights = step_weights(step_ids, rewards, torch.ones(2, 6, dtype=torch.bool))
    print(f"step rewards     like {float(rewards[0, 1]):.3f}, unlike {float(rewards[1, 1]):.3f}, "
          f"weights of its tokens {float(weights[1, 2:4].sum()):.3f}")  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    by_a_judge()
    by_source()
    by_probe()
    by_mixture()
    by_tree()


if __name__ == "__main__":
    main()
