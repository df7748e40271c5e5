# SPDX-License-Identifier: Apache-2.0
"""The pool of buffers: who owns what, for how long, and from which thread."""

import gc
import threading

import pytest
import torch

import fastpref
from fastpref.scoring import workspace
from fastpref.scoring.workspace import lease

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch):
    """Which small buffers go through too."""
    monkeypatch.setattr(workspace, "LEAST", 1)
    gc.collect()
    workspace.release_workspace()
    yield
    workspace.release_workspace()


def address(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (7,), (0,)])
def test_shape_and_dtype(shape, dtype):
    tensor = lease(shape, dtype, CPU)
    assert tensor.shape == shape and tensor.dtype == dtype
    assert tensor.is_contiguous()
    tensor.fill_(1)


def test_living_leases_share_nothing():
    leases = [lease((100,), torch.float32, CPU) for _ in range(5)]
    assert len({address(one) for one in leases}) == 5


def test_a_buffer_comes_back_when_its_lease_goes():
    tensor = lease((1000,), torch.float32, CPU)
    first = address(tensor)
    del tensor
    assert address(lease((10, 50), torch.float64, CPU)) == first


def test_a_view_or_a_detached_tensor_holds_the_buffer():
    tensor = lease((1000,), torch.float32, CPU)
    first, others = address(tensor), [tensor.detach(), tensor[:3]]
    del tensor
    while others:
        assert address(lease((1000,), torch.float32, CPU)) != first
        others.pop()
    assert first in {buffer.memory.data_ptr() for buffer in workspace._idle()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_given_back_is_gone_for_every_holder(device):
    """Also where rows are padded; a view has a memory of its own."""
    tensor = lease((3, 2051), torch.bfloat16, torch.device(device))
    holder, view = [tensor], tensor[:2]
    workspace.give_back(tensor)
    assert holder[0].shape == (0, 2051) and tensor._base is None
    if device == "cpu":
        assert not workspace._idle()
        del view
        assert [one.nbytes for one in workspace._idle()] == [3 * 2051 * 2]


def test_the_smallest_that_fits():
    small, large = lease((100,), torch.float32, CPU), lease((1000,), torch.float32, CPU)
    addresses = address(small), address(large)
    del small, large
    assert address(lease((101,), torch.float32, CPU)) == addresses[1]
    assert address(lease((99,), torch.float32, CPU)) == addresses[0]


def idle():
    return sorted(buffer.nbytes for buffer in workspace._idle())


def passes(*sizes, count=1):
    """Forward passes that work in buffers of so many bytes, one after the other."""
    for _ in range(count):
        workspace.begin_pass()
        for size in sizes:
            lease((size,), torch.uint8, CPU)


def test_what_recent_passes_do_not_need_goes():
    passes(1000)
    assert idle() == [1000]
    passes(count=workspace.RECENT_PASSES - 1)
    assert idle() == [1000]
    passes()
    assert idle() == []


def test_one_large_step_is_forgotten_by_small_ones():
    """Though they work in its buffer at first."""
    passes(1000)
    passes(10, count=workspace.RECENT_PASSES - 1)
    assert idle() == [1000]
    passes(10, count=2)
    assert idle() == [10]


def test_a_buffer_that_comes_back_late_goes():
    tensor = lease((1000,), torch.uint8, CPU)
    passes(count=workspace.RECENT_PASSES)
    del tensor
    assert idle() == []


def test_nothing_is_made_anew_in_steady_state(monkeypatch):
    """Training, whose exponentials stay until backward, and evaluation between."""
    made = []
    make = workspace._Buffer
    monkeypatch.setattr(
        workspace, "_Buffer", lambda memory, *given: made.append(memory) or make(memory, *given)
    )

    def train():
        workspace.begin_pass()
        kept = [lease((size,), torch.uint8, CPU) for size in (1000, 700)]
        for size in (16, 300, 16, 31, 16):
            lease((size,), torch.uint8, CPU)
        del kept

    def steps():
        for _ in range(3):
            train()
        passes(90, 16, count=workspace.RECENT_PASSES // 2)

    steps()
    made.clear()
    for _ in range(4):
        steps()
    assert not made


def test_all_together_are_never_more_than_was_lent_at_once():
    generator = torch.Generator().manual_seed(0)
    most, held = 0, []
    for size in torch.randint(1, 1000, (300,), generator=generator).tolist():
        workspace.begin_pass()
        held.append(lease((size,), torch.uint8, CPU))
        lent = sum(one.untyped_storage().nbytes() for one in held)
        most = max(most, lent)
        assert lent + sum(idle()) <= most
        del held[:-2]
    held.clear()
    assert sum(idle()) <= most


def test_release():
    buffers = [lease((size,), torch.float32, CPU) for size in (10, 1000)]
    del buffers[0]
    fastpref.release_workspace()
    assert idle() == []
    # What is lent is not touched, and comes back.
    buffers[0].fill_(1)
    buffers.clear()
    assert idle() == [4000]


def test_calls_leave_what_they_need_and_no_more():
    def step(rows):
        hidden = torch.randn(rows, 8, requires_grad=True)
        weight = torch.randn(1000, 8, requires_grad=True)
        scores = fastpref.linear_logprob(hidden, weight, torch.arange(rows))
        scores.logp.sum().backward()

    step(200)
    gc.collect()
    large = sum(idle())
    assert large >= 200 * 1000 * 4
    for _ in range(workspace.RECENT_PASSES + 1):
        step(10)
    gc.collect()
    assert 10 * 1000 * 4 <= sum(idle()) < large // 4
    fastpref.release_workspace()
    assert idle() == []


def test_a_buffer_made_in_inference_mode_serves_outside():
    with torch.inference_mode():
        tensor = lease((100,), torch.float32, CPU)
        del tensor
    tensor = lease((100,), torch.float32, CPU)
    assert not tensor.is_inference()
    tensor.fill_(1)


def test_other_devices_have_their_own_allocator():
    tensor = lease((100,), torch.float32, torch.device("meta"))
    assert tensor.device.type == "meta"
    del tensor
    assert not workspace._idle()


def test_threads():
    """No two threads ever hold the same buffer."""
    problems = []

    def work(mark):
        for _ in range(200):
            tensor = lease((64,), torch.float32, CPU)
            tensor.fill_(mark)
            if not (tensor == mark).all():
                problems.append(mark)
            del tensor

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_a_lease_may_be_collected_while_the_pool_is_in_use(monkeypatch):
    """The garbage collector runs wherever something is allocated, also inside the pool's own lists:
    a lease in a reference cycle then goes while the same thread holds the lock."""
    finished = threading.Event()

    def work():
        tensor = lease((10,), torch.float32, CPU)
        with workspace._lock:
            del tensor
        finished.set()

    with monkeypatch.context() as context:
        # A lock of the same kind: a deadlock must not spread to other tests.
        reentrant = isinstance(workspace._lock, type(threading.RLock()))
        context.setattr(workspace, "_lock", threading.RLock() if reentrant else threading.Lock())
        threading.Thread(target=work, daemon=True).start()
        assert finished.wait(5), "deadlock"


def test_small_buffers_are_left_to_the_allocator(monkeypatch):
    monkeypatch.setattr(workspace, "LEAST", 1 << 16)
    small, large = lease((1 << 14,), torch.float16, CPU), lease((1 << 15,), torch.float16, CPU)
    held = {one.memory.data_ptr() for one in workspace._buffers}
    assert address(small) not in held and address(large) in held
    with torch.inference_mode():
        lease((3, 4), torch.float32, CPU).fill_(1)
