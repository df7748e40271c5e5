# SPDX-License-Identifier: Apache-2.0
"""The kernel that sums over sequences, compiled for the host."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.cuda_on_host.kernels import unavailable_reason
from tests.cuda_on_host.sequence_sums import SequenceSums, compile_sequence_sums


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Handing these small tensors to a second thread takes longer than the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def on_the_host(tmp_path_factory: pytest.TempPathFactory) -> SequenceSums:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return compile_sequence_sums(tmp_path_factory.mktemp("host"))


@pytest.fixture
def kernel(on_the_host: SequenceSums) -> Callable[..., tuple[Tensor, Tensor]]:
    return on_the_host
