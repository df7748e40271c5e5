# SPDX-License-Identifier: Apache-2.0
"""A module against the class of Liger-Kernel that it stands in for, on the same tensors."""

import inspect

import pytest
import torch

import fastpref.nn

B, T, H, V = 6, 5, 8, 23
IGNORE = -100


def peer_of(name):
    return getattr(pytest.importorskip("liger_kernel.chunked_loss"), f"Liger{name}")


def ours(name):
    return getattr(fastpref.nn, name)


def signature(function, unlike):
    """(name, kind, default) of every parameter, in order; no default of those in ``unlike``."""
    return [
        (p.name, p.kind, None if p.name in unlike else p.default)
        for p in inspect.signature(function).parameters.values()
    ]


def assert_same_signatures(name, unlike=()):
    for method in ("__init__", "forward"):
        mine, theirs = (getattr(one(name), method) for one in (ours, peer_of))
        assert signature(mine, unlike) == signature(theirs, unlike)


def tensors(dtype=torch.float64, width=H, masked=True):
    """Hidden states, a head and targets of policy and reference; by default with unscored positions
    in front and behind, as many in one row as in no other."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(V, (B, T), generator=generator)
    if masked:
        places = torch.arange(T)
        first, length = torch.tensor([0, 1, 2, 0, 3, 1]), torch.tensor([5, 2, 3, 4, 1, 3])
        scored = (places >= first[:, None]) & (places < (first + length)[:, None])
        target[~scored] = IGNORE
    return {
        "_input": draw(B, T, width),
        "lin_weight": 0.5 * draw(V, width),
        "target": target,
        "bias": draw(V),
        "ref_input": draw(B, T, width + 2),
        "ref_weight": 0.5 * draw(V, width + 2),
        "ref_bias": draw(V),
    }


LEAVES = ("_input", "lin_weight", "bias")


def leaves(given):
    """The same with fresh leaves that require gradients."""
    fresh = {
        name: given[name].detach().clone().requires_grad_()
        for name in LEAVES
        if given.get(name) is not None
    }
    return dict(given) | fresh


def gradients(loss, given):
    found = [given[name] for name in LEAVES if given.get(name) is not None]
    return torch.autograd.grad(1.7 * loss, found, retain_graph=True)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def compare(name, given, settings):
    """Values, returned tuple and gradients."""
    mine, theirs = leaves(given), leaves(given)
    loss, returned = ours(name)(compiled=False, **settings)(**mine)
    their_loss, their_returned = peer_of(name)(compiled=False, **settings)(**theirs)
    close(loss, their_loss)
    assert len(returned) == len(their_returned)
    for got, want in zip(returned, their_returned, strict=True):
        close(got, want)
    for got, want in zip(gradients(loss, mine), gradients(their_loss, theirs), strict=True):
        close(got, want)
    return loss, returned


def token_logps(given, target, prefix=""):
    """(B, T) by plain torch, 0 where not scored, and the logits."""
    hidden, weight = given[f"{prefix}_input".replace("__", "_")], given[f"{prefix or 'lin_'}weight"]
    logits = hidden @ weight.t() + given[f"{prefix}bias"]
    picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return torch.where(target != IGNORE, picked, 0), logits
