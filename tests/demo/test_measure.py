# SPDX-License-Identifier: Apache-2.0
"""The clock of the head counts the head, forward and backward, and nothing else; steps are taken
in turn; memory."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from fastpref.demo import measure


class Backbone(torch.nn.Module):
    def __init__(self, tick):
        super().__init__()
        self.tick = tick

    def forward(self, states):
        self.tick(5)
        return SimpleNamespace(last_hidden_state=states * 1.0)


class Late(torch.autograd.Function):
    """Takes its time in both directions."""

    @staticmethod
    def forward(ctx, values, tick, forward, backward):
        tick(forward)
        ctx.tick, ctx.backward = tick, backward
        return values * 2

    @staticmethod
    def backward(ctx, gradient):
        ctx.tick(ctx.backward)
        return gradient * 2, None, None, None


def test_the_head_is_what_lies_between_backbone_and_loss(monkeypatch):
    time = SimpleNamespace(now=0.0)

    def tick(seconds):
        time.now += seconds

    monkeypatch.setattr(measure, "now", lambda: time.now)
    model, reference = (SimpleNamespace(base_model=Backbone(tick)) for _ in range(2))
    states = torch.ones(3, requires_grad=True)

    def compute_loss(states):
        below = Late.apply(states, tick, 70, 900)  # before the backbone, not the head's
        hidden = model.base_model(below).last_hidden_state
        scored = Late.apply(hidden, tick, 1, 20)
        with torch.no_grad():
            Late.apply(reference.base_model(states).last_hidden_state, tick, 3, 0)
        return scored.sum(), None

    trainer = SimpleNamespace(model=model, ref_model=reference, compute_loss=compute_loss)
    head = measure.HeadClock()
    head.attach(trainer)
    loss, _ = trainer.compute_loss(states)
    assert head.seconds == 1 + 3
    tick(10_000)  # between the passes
    loss.backward()
    assert head.seconds == 1 + 3 + 20


def test_a_step_waits_for_its_turn_outside_its_time(monkeypatch):
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measure, "now", lambda: time.now)

    held = []

    class Turn:
        def __enter__(self):
            time.now += 500
            held.append(True)

        def __exit__(self, *_):
            time.now += 7000
            held.append(False)

    head = SimpleNamespace(seconds=3.0)
    clock = measure.StepClock(head, Turn())
    for seconds in (1, 2):
        clock.on_step_begin()
        time.now += seconds
        head.seconds = seconds / 2
        assert held.pop()
        clock.on_step_end()
        assert not held.pop()
    assert clock.step_seconds == [1, 2] and clock.head_seconds == [0.5, 1.0]


def test_peak_memory_is_not_below_what_is_held():
    held = measure.memory("VmRSS")  # before the peak: the process may grow between the two
    assert held > 0
    assert measure.memory("VmHWM") >= 0.99 * held
