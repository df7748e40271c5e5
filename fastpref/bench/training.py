# SPDX-License-Identifier: Apache-2.0
"""A whole training step: a small Llama, the head with DPO on given reference log-probabilities,
backward, AdamW. Against the same step with the bare products in the head's place."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import exact
from .experiment import Candidate, Case, Experiment, Loss, Mode, Outcome, bare_products
from .losses import score_implementations, uniform_reference
from .work import Work

LAYERS = 2
HEAD_SIZE = 64


def training_experiment(case: Case) -> Experiment:
    work = case.work()
    step = _Step(work, case.mode)
    answer = functools.cache(step.exact)
    candidates = [
        Candidate(
            one.name,
            functools.partial(step, one.loss),
            answer,
            one.unavailable,
            one.compiles,
        )
        for one in score_implementations(case)
    ]
    return Experiment(step.limit, candidates)


class _Step:
    """The model, its head and their optimizer, which updates copies: every run, also one after a
    run that failed, has the same parameters."""

    def __init__(self, work: Work, mode: Mode) -> None:
        self.work, self.mode = work, mode
        self.body = _body(work)
        # Masked positions get tokens that differ: the gradient of one embedding is no sum over all.
        others = torch.arange(work.target.numel(), device=work.target.device, dtype=torch.int64)
        others = (others % work.shape.vocab_size).view_as(work.target)
        self.tokens = torch.where(work.scored, work.target, others)
        self.weight = work.leaves(hidden=False, weight=mode == "trainable head")[1]
        parameters = [*self.body.parameters(), self.weight]
        self.parameters = [one for one in parameters if one.requires_grad]
        self.updated = [one.detach().clone() for one in self.parameters]
        self.optimizer = torch.optim.AdamW(self.updated, lr=1e-6)
        self.gradient = 1e-4 * torch.randn_like(work.hidden)
        self.limit = self._products()

    def __call__(self, loss: Loss) -> Outcome:
        if self.mode == "forward":
            with torch.no_grad():
                return Outcome(loss(self.work, self._hidden(), self.weight))
        value = loss(self.work, self._hidden(), self.weight)
        value.backward()
        return Outcome(value.detach(), self._update())

    def _products(self) -> Callable[[], None]:
        products = bare_products(self.work, self.mode)

        def limit() -> None:
            with torch.set_grad_enabled(self.mode != "forward"):
                hidden = self._hidden()
            products()
            if self.mode != "forward":
                hidden.backward(self.gradient)
                if self.weight.requires_grad:
                    self.weight.grad = self.weight.detach()
                self._update()

        return limit

    def exact(self) -> Outcome:
        body = copy.deepcopy(self.body).double()
        with torch.set_grad_enabled(self.mode != "forward"):
            hidden = body(self.tokens).last_hidden_state
        work = replace(self.work, hidden=hidden.detach())
        head = exact.of_scores(
            work, self.mode, lambda logp, _: uniform_reference(work, logp), reference=False
        )
        if self.mode == "forward":
            return head
        of_hidden, *of_weight = head.gradients
        hidden.backward(of_hidden)
        return Outcome(head.loss, (*(one.grad for one in body.parameters()), *of_weight))

    def _hidden(self) -> Tensor:
        # What a run that failed left behind.
        for one in self.parameters:
            one.grad = None
        hidden: Tensor = self.body(self.tokens).last_hidden_state
        return hidden

    def _update(self) -> tuple[Tensor, ...]:
        """The gradients, after the optimizer's step."""
        gradients = []
        for one, copied in zip(self.parameters, self.updated, strict=True):
            copied.grad, one.grad = one.grad, None
            gradients += [] if copied.grad is None else [copied.grad]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return tuple(gradients)


def _body(work: Work) -> Any:
    from transformers import LlamaConfig, LlamaModel

    shape = work.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.hidden_size * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, shape.hidden_size // HEAD_SIZE),
        max_position_embeddings=shape.length,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body: Any = LlamaModel(config)
    # The scale that the head was made for.
    torch.nn.init.constant_(body.norm.weight, float(work.hidden.float().std()))
    return body.to(work.hidden.device, work.hidden.dtype)
