# SPDX-License-Identifier: Apache-2.0
"""Processes of one gloo group that run a test's function on every rank: the fixtures ``two_ranks``
and ``four_ranks``.

Where the machine has a GPU for each, CUDA tensors go by NCCL; ``device()`` is a rank's own.
They are started when a test first calls them, and serve every test of a pytest process, as
importing torch takes seconds.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

# Long: the first optimizer imports torch._dynamo, minutes of a loaded machine.
COLLECTIVE = timedelta(seconds=240)  # after which gloo raises on the ranks that wait
CALL = 300.0  # seconds
START = 300.0  # in which processes import torch and meet, on a loaded machine


def backends(gpus: int, world: int) -> str:
    """Of a group of ``world`` ranks, each of which takes a GPU of its own where there are as
    many."""
    return "cpu:gloo,cuda:nccl" if gpus >= world else "gloo"


def device() -> "torch.device":
    """Where a rank's tensors are to be."""
    import torch
    import torch.distributed as dist

    if "nccl" in dist.get_backend_config():
        return torch.device("cuda", dist.get_rank())
    return torch.device("cpu")


def on_host(value: Any) -> Any:
    """What a rank returns: the GPU of another process is none of the test's."""
    if isinstance(value, dict):
        return {key: on_host(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(on_host, value))
    return value.cpu() if hasattr(value, "cpu") else value


def run_to_the_end(function: Callable[..., Any], *args: Any) -> NoReturn:
    """Call ``function`` and end the process, with status 1 and the traceback where it raises.

    The interpreter is not finalised: a thread of gloo lets go of the last collective's tensors
    after that has returned, takes the GIL for it, and aborts the process where the interpreter is
    already on its way out, as happens on a loaded machine. ``destroy_process_group`` waits for
    the thread only where nothing else refers to the group, and DTensor's caches do.
    """
    status = 0
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def started_by_torchrun(rank: int, world: int) -> Iterator[None]:
    """On a rank: the environment in which accelerate takes it for one of torchrun's processes."""
    from accelerate.state import AcceleratorState, GradientState

    given: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
    }
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in given.items()})
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)


class Ranks:
    """``ranks(function, *args)`` calls ``function(rank, *args)`` on every rank and returns what
    each returned, in their order.

    ``function`` is one that the ranks can import: defined at the top of a module. Where a rank
    raises, dies or does not answer, AssertionError says so with its traceback, and the next call
    gets fresh processes.
    """

    def __init__(self, world: int, timeout: float = CALL) -> None:
        self.timeout = timeout
        self._world = world
        self._processes: list[Any] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._connections: list[Connection] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        call = pickle.dumps((function, args))
        if not all(process.is_alive() for process in self._processes):
            self._stop()
        if not self._processes:
            self._start()
            self._returned(START)
        for connection in self._connections:
            connection.send_bytes(call)
        return self._returned(self.timeout)

    def _returned(self, timeout: float) -> list[Any]:
        returned, failed = self._answers(timeout)
        if failed:
            self._stop()
            raise AssertionError("\n".join(f"rank {rank}: {failed[rank]}" for rank in failed))
        return [returned[rank] for rank in range(self._world)]

    def _start(self) -> None:
        # Spawned: a fork would share the locks and lack the threads of the torch that runs here.
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory()
        store = str(Path(self._directory.name) / "store")
        for rank in range(self._world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self._world, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._directory is not None:
            self._directory.cleanup()

    def _answers(self, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        """What the ranks returned, and what became of those that returned nothing."""
        returned: dict[int, Any] = {}
        failed: dict[int, str] = {}
        until = time.monotonic() + timeout
        while pending := [
            rank for rank in range(self._world) if rank not in returned and rank not in failed
        ]:
            ready = wait([self._connections[rank] for rank in pending], until - time.monotonic())
            if not ready:
                return returned, failed | {rank: self._stacks(rank) for rank in pending}
            for rank in pending:
                if self._connections[rank] not in ready:
                    continue
                try:
                    done, value = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join()
                    done, value = False, f"ended with status {self._processes[rank].exitcode}"
                (returned if done else failed)[rank] = value
            if failed:
                # The others may wait for this one in vain; a second is for what they know of it.
                until = min(until, time.monotonic() + 1)
        return returned, failed

    def _stacks(self, rank: int) -> str:
        """Of a rank without an answer, whose stacks go to stderr."""
        self._processes[rank].terminate()
        self._processes[rank].join(5)
        return "no answer; stderr has its stacks"


def _serve(rank: int, world: int, store: str, connection: Connection) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    files = dist.FileStore(store, world)
    # On a loaded machine one may be here minutes before another, more than a collective waits.
    files.set(f"here {rank}", "")
    files.wait([f"here {other}" for other in range(world)], timedelta(seconds=START))
    gpus = torch.cuda.device_count()
    if gpus >= world:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backends(gpus, world),
        store=files,
        rank=rank,
        world_size=world,
        timeout=COLLECTIVE,
    )
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:  # whoever asked is gone
            os._exit(0)
        try:
            function, args = pickle.loads(call)
            torch.manual_seed(0)
            answer = pickle.dumps((True, on_host(function(rank, *args))))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
