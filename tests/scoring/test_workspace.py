# SPDX-License-Identifier: Apache-2.0
"""The pool of buffers: who owns what, for how long, and from which thread."""

import gc
import threading

import pytest
import torch

from fastpref.scoring import workspace
from fastpref.scoring.workspace import Lease

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_pool():
    gc.collect()
    workspace.release()
    yield
    workspace.release()


def address(lease):
    return lease.tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (7,), (0,)])
def test_shape_and_dtype(shape, dtype):
    lease = Lease(shape, dtype, CPU)
    assert lease.tensor.shape == shape and lease.tensor.dtype == dtype
    assert lease.tensor.is_contiguous()
    lease.tensor.fill_(1)


def test_living_leases_share_nothing():
    leases = [Lease((100,), torch.float32, CPU) for _ in range(5)]
    assert len({address(lease) for lease in leases}) == 5


def test_a_buffer_comes_back_when_its_lease_goes():
    lease = Lease((1000,), torch.float32, CPU)
    first = address(lease)
    del lease
    assert address(Lease((10, 50), torch.float64, CPU)) == first


def test_the_smallest_that_fits():
    small, large = Lease((100,), torch.float32, CPU), Lease((1000,), torch.float32, CPU)
    addresses = address(small), address(large)
    del small, large
    assert address(Lease((101,), torch.float32, CPU)) == addresses[1]
    assert address(Lease((99,), torch.float32, CPU)) == addresses[0]


def test_the_pool_is_small_and_keeps_the_largest():
    leases = [Lease((size,), torch.float32, CPU) for size in (10, 1000, 30, 500)]
    del leases
    sizes = [buffer.numel() for buffer in workspace._idle]
    assert sizes == [2000, 4000]
    workspace.release()
    assert not workspace._idle


def test_a_buffer_made_in_inference_mode_serves_outside():
    with torch.inference_mode():
        lease = Lease((100,), torch.float32, CPU)
        del lease
    lease = Lease((100,), torch.float32, CPU)
    assert not lease.tensor.is_inference()
    lease.tensor.fill_(1)


def test_other_devices_have_their_own_allocator():
    lease = Lease((100,), torch.float32, torch.device("meta"))
    assert lease.tensor.device.type == "meta"
    del lease
    assert not workspace._idle


def test_threads():
    """No two threads ever hold the same buffer."""
    problems = []

    def work(mark):
        for _ in range(200):
            lease = Lease((64,), torch.float32, CPU)
            lease.tensor.fill_(mark)
            if not (lease.tensor == mark).all():
                problems.append(mark)
            del lease

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
        lease = Lease((10,), torch.float32, CPU)
        with workspace._lock:
            del lease
        finished.set()

    with monkeypatch.context() as context:
        # A lock of the same kind: a deadlock must not spread to other tests.
        reentrant = isinstance(workspace._lock, type(threading.RLock()))
        context.setattr(workspace, "_lock", threading.RLock() if reentrant else threading.Lock())
        threading.Thread(target=work, daemon=True).start()
        assert finished.wait(5), "deadlock"
