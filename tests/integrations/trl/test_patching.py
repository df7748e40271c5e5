# SPDX-License-Identifier: Apache-2.0
"""What patching TRL does, undoes and refuses."""

import importlib.metadata
import logging
import subprocess
import sys
from typing import Any

import pytest

from fastpref.integrations import trl as integration
from fastpref.integrations.trl import LogProbAdapter, PairAdapter
from tests.integrations.trl.runs import RELEASE

ADAPTER = LogProbAdapter if RELEASE >= (1, 15) else PairAdapter


def test_patch_and_unpatch_are_idempotent(trl_utils: Any, caplog: Any) -> None:
    found = trl_utils._ChunkedLogProbFunction
    with caplog.at_level(logging.INFO, logger="fastpref"):
        integration.patch()
        integration.patch()
    assert trl_utils._ChunkedLogProbFunction is ADAPTER
    version = importlib.metadata.version("trl")
    assert [(record.levelname, version in record.message) for record in caplog.records] == [
        ("INFO", True)
    ]
    integration.unpatch()
    integration.unpatch()
    assert trl_utils._ChunkedLogProbFunction is found


def test_patched_restores_what_it_found(trl_utils: Any) -> None:
    found = trl_utils._ChunkedLogProbFunction
    with pytest.raises(KeyError), integration.patched():
        assert trl_utils._ChunkedLogProbFunction is ADAPTER
        raise KeyError
    assert trl_utils._ChunkedLogProbFunction is found
    integration.patch()
    with integration.patched():
        pass
    assert trl_utils._ChunkedLogProbFunction is ADAPTER
    with integration.patched():
        integration.unpatch()
    assert trl_utils._ChunkedLogProbFunction is ADAPTER
    integration.unpatch()
    assert trl_utils._ChunkedLogProbFunction is found


class OtherHead:
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any) -> None:
        """Not what TRL has."""


@pytest.mark.parametrize(
    ("symbol", "version", "said"),
    [
        (OtherHead, None, r"_ChunkedLogProbFunction\(ctx, hidden, weight, targets\)"),
        (None, None, r"has no _ChunkedLogProbFunction"),
        ("stock", "1.12.0", r"TRL 1\.12\.0"),
    ],
    ids=["other signature", "no symbol", "old version"],
)
def test_unknown_trl_is_refused(
    symbol: Any,
    version: str | None,
    said: str,
    trl_utils: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if symbol is None:
        monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    elif symbol != "stock":
        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", symbol)
    if version is not None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    before = getattr(trl_utils, "_ChunkedLogProbFunction", None)
    for attempt in (integration.patch, integration.patched().__enter__):
        with pytest.raises(RuntimeError, match=said) as refused:
            attempt()
        message = str(refused.value)
        assert importlib.metadata.version("trl") in message
        assert "Expected: TRL 1.13 or newer" in message and "final_logit_softcapping" in message
        assert 'pip install "fastpref[trl]"' in message
    assert getattr(trl_utils, "_ChunkedLogProbFunction", None) is before


@pytest.mark.parametrize("version", ["1.15.0.dev0", "1.15.0", "2.0.0"])
def test_versions_with_the_known_signature_are_patched(
    version: str, trl_utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with integration.patched():
        assert trl_utils._ChunkedLogProbFunction is ADAPTER


@pytest.mark.parametrize("call", [integration.patch, integration.unpatch])
def test_missing_trl_names_the_remedy(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trl", "trl.trainer", "trl.trainer.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "fastpref\[trl\]"'):
        call()


def test_import_of_the_package_needs_no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it import it; a trainer that is asked for names the remedy."""
    code = "import sys, fastpref.integrations.trl; print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    for name in ("trl", "trl.trainer", "trl.trainer.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "fastpref\[trl\]"'):
        integration.FastORPOTrainer  # noqa: B018
