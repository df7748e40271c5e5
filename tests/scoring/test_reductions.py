# SPDX-License-Identifier: Apache-2.0
"""16-bit products on a GPU are not added up in 16 bits: the flags are off around every product, and
afterwards as they were."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import ScoringOptions, linear_divergence, linear_logprob, preference_loss
from fastpref.scoring import autograd, straight
from fastpref.scoring.reductions import FLAGS, full_precision_reductions

MATMUL = torch.backends.cuda.matmul


def settings():
    splits = [getattr(MATMUL, name + "_split_k", None) for name in FLAGS]
    return [getattr(MATMUL, name) for name in FLAGS], splits


@pytest.fixture(autouse=True)
def as_before():
    before = [getattr(MATMUL, name) for name in FLAGS]
    yield
    for name, value in zip(FLAGS, before, strict=True):
        setattr(MATMUL, name, value)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("fp16", [True, False])
def test_off_inside_and_as_before_outside(bf16, fp16):
    for name, value in zip(FLAGS, (bf16, fp16), strict=True):
        setattr(MATMUL, name, value)
    before = settings()
    with full_precision_reductions():
        assert settings()[0] == [False, False]
        with full_precision_reductions():
            assert settings()[0] == [False, False]
        assert settings()[0] == [False, False]
    assert settings() == before
    with pytest.raises(KeyError), full_precision_reductions():
        raise KeyError
    assert settings() == before


@pytest.mark.skipif(
    not hasattr(MATMUL, FLAGS[0] + "_split_k"), reason="this torch has no flag for split K"
)
def test_a_forbidden_split_stays_forbidden():
    setattr(MATMUL, FLAGS[0], (False, False))
    before = settings()
    assert before[1][0] is False
    with full_precision_reductions():
        assert settings() == ([False, False], [False, True])
    assert settings() == before


def test_a_setting_that_is_a_tuple(monkeypatch):
    """Of allowed and split, as a torch may give it."""
    matmul = SimpleNamespace(**{FLAGS[0]: (True, True), FLAGS[1]: True})
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    with full_precision_reductions():
        assert vars(matmul) == {FLAGS[0]: (False, True), FLAGS[1]: False}
    assert vars(matmul) == {FLAGS[0]: (True, True), FLAGS[1]: True}


def test_of_two_threads_the_last_to_leave_restores():
    before, entered, leave = settings(), threading.Event(), threading.Event()

    def work():
        with full_precision_reductions():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with full_precision_reductions():
        thread.start()
        entered.wait(10)
    assert settings()[0] == [False, False]
    leave.set()
    thread.join()
    assert settings() == before


class Products(TorchDispatchMode):
    """What the flags are at each product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.append(tuple(settings()[0]))
        return operation(*args, **(kwargs or {}))


def score(hidden, weight, target, **options):
    linear_logprob(hidden, weight, target, options=ScoringOptions(**options)).logp.sum().backward()


def compare(hidden, weight, target):
    linear_divergence(hidden, weight, hidden.detach(), 2 * weight.detach()).sum().backward()


def prefer(hidden, weight, target):
    options = ScoringOptions(schedule="batches", memory_budget=1)
    loss = preference_loss(hidden, weight, target, "simpo", options=options).loss
    loss.backward()


CALLS = {
    "keep": score,
    "recompute": lambda *given: score(*given, schedule="recompute"),
    "direct": lambda hidden, weight, target: score(hidden, weight.detach(), target),
    "two heads": compare,
    "batches": prefer,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_around_every_product(name, device, monkeypatch):
    """Of tensors on a GPU, which is what the engine is told here."""
    monkeypatch.setattr(autograd, "on_cuda", lambda tensor: device == "cuda")
    if device == "cuda":
        monkeypatch.setattr(straight, "serves", lambda call, model: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for flag in FLAGS:
        setattr(MATMUL, flag, True)
    hidden = torch.randn(4, 40, 16).bfloat16().requires_grad_()
    weight = torch.randn(300, 16).bfloat16().requires_grad_()
    with Products() as products:
        CALLS[name](hidden, weight, torch.randint(300, (4, 40)))
    assert len(products.seen) > 1
    assert set(products.seen) == {(device == "cpu",) * 2}
    assert settings()[0] == [True, True]
