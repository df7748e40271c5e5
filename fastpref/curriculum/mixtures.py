# SPDX-License-Identifier: Apache-2.0
"""What mixture of hidden classes the sources of pairs are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives.reading import readable
from .checks import count, numbers


class MixtureWeights(NamedTuple):
    """Float64 on the CPU, rows summing to 1; the largest component first.

    - ``weights``: (N, K), of each pair the probability of each component.
    - ``domains``: (K, D), of each component that of each domain.
    """

    weights: Tensor
    domains: Tensor


def mixture_weights(domain_posteriors: Tensor, components: int) -> MixtureWeights:
    """Of which hidden component each pair is, from where it seems to come from.

        p(domain | x) = sum_k p(k | x) p(domain | k)

    factorised without negative numbers. "Unsupervised learning under latent label shift" (Roberts
    et al. 2022, arXiv:2207.13179): where domains differ only in how they mix hidden classes, a
    discriminator of the domains knows the classes. Here domains are annotators or sources of
    pairs, posteriors those of any classifier of them, and the weights are for weighing or picking
    pairs.
    Training the discriminator is the caller's. The paper groups rows by clustering before it
    factorises; here each row is one of its own. Many factorisations fit as well; as in the paper's
    theory, the right one is known where each component has rows that are its alone: the most
    extreme rows (successive projections) are where the factorisation begins.

    Needs scikit-learn, whose NMF it is: ``pip install "fastpref[curriculum]"``.

    Args:
        domain_posteriors: (N, D), rows of probabilities.
        components: K, at most D.
    """
    rows = numbers("domain_posteriors", domain_posteriors, "(N, D)").double().cpu()
    components = count("components", components, 1)
    if components > min(rows.shape):
        raise ValueError(
            f"components must be at most {min(rows.shape)}, of {tuple(rows.shape)} "
            f"domain_posteriors, got {components}"
        )
    sums = rows.sum(1)
    if readable(rows) and (bool((rows < 0).any()) or bool(((sums - 1).abs() > 1e-3).any())):
        raise ValueError(
            "domain_posteriors must be probabilities that sum to 1 in each row, got sums from "
            f"{float(sums.min()):g} to {float(sums.max()):g}, the least {float(rows.min()):g}; "
            "take a softmax of logits"
        )
    left, right = _factorise(rows, components)
    mass = right.sum(1)
    domains = torch.where(mass[:, None] > 0, right / mass[:, None], 1 / rows.shape[1])
    weights = left * mass
    total = weights.sum(1, keepdim=True)
    weights = torch.where(total > 0, weights / total, 1 / components)
    order = weights.sum(0).argsort(descending=True, stable=True)
    return MixtureWeights(weights[:, order], domains[order])


def _factorise(rows: Tensor, components: int) -> tuple[Tensor, Tensor]:
    try:
        from sklearn.decomposition import NMF
    except ImportError as error:
        raise ImportError(
            'mixture_weights needs scikit-learn: pip install "fastpref[curriculum]"'
        ) from error
    right = rows[_extreme_rows(rows, components)]
    left = (rows @ torch.linalg.pinv(right)).clamp(min=0)
    made = NMF(components, init="custom", tol=1e-6, max_iter=2000)
    # It works in these arrays, which it does not copy.
    found = made.fit_transform(rows.numpy(), W=left.numpy().copy(), H=right.numpy().copy())
    return torch.from_numpy(found), torch.from_numpy(made.components_)


def _extreme_rows(rows: Tensor, count: int) -> list[int]:
    """Each the one farthest from the span of those before."""
    rest, found = rows.clone(), []
    for _ in range(count):
        lengths = rest.square().sum(1)
        found.append(int(lengths.argmax()))
        farthest = rest[found[-1]]
        size = farthest.square().sum().clamp(min=torch.finfo(rest.dtype).tiny)
        rest = rest - (rest @ farthest / size)[:, None] * farthest
    return found
