# SPDX-License-Identifier: Apache-2.0
"""What serves: each backend in turn, on CPU tensors."""

import pytest

from fastpref.diffusion import backends
from tests.diffusion.cases import BACKENDS


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(backends, "of", lambda *tensors: BACKENDS[request.param])
    return request.param
