# SPDX-License-Identifier: Apache-2.0
"""The clock of the head counts the head, forward and backward, and nothing else."""

import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from fastpref.demo.measure import HeadClock, memory


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient * 2, None


class Model(torch.nn.Module):
    """A backbone of 0.3 s and a head of 0.05 s, each way."""

    def __init__(self):
        super().__init__()
        self.base_model = Backbone()

    def forward(self, x):
        states = self.base_model(x).last_hidden_state
        return SimpleNamespace(log_probs=Slow.apply(states[:, :-1], 0.05))


class Backbone(torch.nn.Module):
    def forward(self, x):
        return SimpleNamespace(last_hidden_state=Slow.apply(x, 0.3))


@pytest.mark.parametrize(("grad", "seconds"), [(True, 0.1), (False, 0.05)])
def test_head_clock_counts_the_head_alone(grad, seconds):
    clock, model = HeadClock(), Model()
    clock.attach(model)
    log_probs = model(torch.ones(2, 3, requires_grad=grad)).log_probs
    if grad:
        Slow.apply(log_probs, 0.3).sum().backward()
    assert seconds <= clock.seconds < seconds + 0.2


def test_peak_memory_is_not_below_what_is_held():
    held = memory("VmRSS")  # before the peak: the process may grow between the two
    assert held > 0
    assert memory("VmHWM") >= 0.99 * held
