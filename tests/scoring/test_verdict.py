# SPDX-License-Identifier: Apache-2.0
"""The cache of verdicts: what is read, what is written, and what of it ``auto`` follows."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastpref import ScoringOptions
from fastpref.scoring import api, backends, request, validation
from fastpref.scoring.agreement import Agreed, Own
from fastpref.scoring.backends import verdict, verdict_files
from fastpref.scoring.backends.choice import Size
from fastpref.scoring.backends.verdict_files import Verdict

KEY = {"device": "a card", "driver": "1"}
GPU = torch.device("cuda", 0)
SIZE = Size(torch.bfloat16, 1000, 4096, 128256)
CARD = {
    "name": "NVIDIA H100",
    "multi_processor_count": 132,
    "major": 9,
    "minor": 0,
    "total_memory": 80 << 30,
}


def made(tier: str = "triton", **changes: Any) -> Verdict:
    plain = {"dtype": "bfloat16", "heavy": False, "hidden_size": 4096, "vocab_size": 128256}
    times = {"1u": {"rows": 2.0, "triton": 1.5}}
    return Verdict(**(plain | changes), tier=tier, milliseconds=times)


def put(*verdicts: Verdict, key: dict[str, str] = KEY) -> Path:
    return verdict_files.record(key, verdicts, instead_of=[one.subject for one in verdicts])


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache directory, and a process that has read nothing yet."""
    for remembered in (verdict.stored, verdict._hash_of_sources, verdict_files.warn):
        remembered.cache_clear()
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTPREF_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU that nothing is launched on."""
    found = SimpleNamespace(**CARD)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return found


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable_reason", lambda name, device: None)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


def test_what_is_written_is_read() -> None:
    verdicts = made(), made("rows", heavy=True)
    path = put(*verdicts)
    assert verdict_files.read(KEY) == verdicts
    assert verdict_files.everything() == [verdict_files.Record(key=KEY, verdicts=verdicts)]
    assert verdict_files.read(KEY | {"driver": "2"}) == ()
    assert sorted(one.name for one in path.parent.iterdir()) == [path.name, "tune.lock"]


def test_a_verdict_takes_the_place_of_its_like() -> None:
    put(made(), made(heavy=True), made(hidden_size=896))
    put(made("rows"))
    assert verdict_files.read(KEY) == (made(heavy=True), made(hidden_size=896), made("rows"))
    verdict_files.record(KEY, [], instead_of=[made().subject])
    assert verdict_files.read(KEY) == (made(heavy=True), made(hidden_size=896))


@pytest.mark.parametrize(
    "size, expected",
    [
        (SIZE, "triton"),
        (SIZE._replace(rows=0, vocab_size=7), "triton"),
        (SIZE._replace(hidden_size=5120), "triton"),
        (SIZE._replace(hidden_size=3277), "triton"),
        (SIZE._replace(hidden_size=5121), None),
        (SIZE._replace(hidden_size=3276), None),
        (SIZE._replace(heavy=True), "rows"),
        (SIZE._replace(dtype=torch.float16), "rows"),
        (SIZE._replace(dtype=torch.float32), None),
        (SIZE._replace(static=True), None),
    ],
)
def test_which_verdict_counts(
    card: SimpleNamespace, serving: None, size: Size, expected: str | None
) -> None:
    # For the fused kernels where all that are near are.
    half = made("rows", dtype="float16"), made(dtype="float16", vocab_size=32000)
    put(made(), made("rows", heavy=True), *half, key=verdict.key_of(0))
    assert verdict.verdict(GPU, size) == expected
    assert verdict.verdict(torch.device("cuda"), size) == expected
    assert (backends.choose("auto", GPU, size) == "triton") == (expected == "triton")


def test_a_verdict_for_what_is_not_there_is_not_followed(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(made(), key=verdict.key_of(0))
    monkeypatch.setattr(
        backends,
        "unavailable_reason",
        lambda name, device: "absent" if name == "triton" else None,
    )
    assert backends.choose("auto", GPU, SIZE) != "triton"


def test_read_once_a_process(
    card: SimpleNamespace, serving: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(made(), key=verdict.key_of(0))
    assert backends.choose("auto", GPU, SIZE) == "triton"
    put(made("rows"), key=verdict.key_of(0))
    monkeypatch.setattr(Path, "read_bytes", None)
    assert backends.choose("auto", GPU, SIZE) == "triton"


def test_of_no_interest_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "stored", None)
    assert backends.choose("auto", torch.device("cpu"), SIZE) != "triton"


@pytest.mark.parametrize(
    "name, value",
    [
        ("name", "NVIDIA H200"),
        ("multi_processor_count", 114),
        ("major", 10),
        ("minor", 3),
    ],
)
def test_another_card_is_another_key(card: SimpleNamespace, name: str, value: Any) -> None:
    before = verdict.key_of(0)
    setattr(card, name, value)
    assert verdict_files.path_of(verdict.key_of(0)) != verdict_files.path_of(before)


def test_another_version_is_another_key(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = [verdict.key_of(0)]
    monkeypatch.setattr("fastpref.__version__", "9.9.9")
    seen.append(verdict.key_of(0))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    seen.append(verdict.key_of(0))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.9")
    seen.append(verdict.key_of(0))
    monkeypatch.setattr(verdict, "_driver", lambda: "999.99")
    seen.append(verdict.key_of(0))
    for name in ("one.py", "launch.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(verdict, "KERNELS", tmp_path)
    monkeypatch.setattr(verdict, "LAUNCHERS", (tmp_path / "launch.py",))
    for text in ("x = 1\n", "x = 2\n"):
        (tmp_path / "one.py").write_text(text)
        verdict._hash_of_sources.cache_clear()
        seen.append(verdict.key_of(0))
    (tmp_path / "one.py").rename(tmp_path / "two.py")
    verdict._hash_of_sources.cache_clear()
    seen.append(verdict.key_of(0))
    paths = [verdict_files.path_of(one) for one in seen]
    assert len(set(paths)) == len(seen) == 8


def test_the_hash_is_of_the_kernels_that_run() -> None:
    from fastpref.kernels import linear_exp

    assert Path(linear_exp.__file__).resolve() in {
        one.resolve() for one in verdict.KERNELS.glob("*.py")
    }
    assert all(one.exists() for one in verdict.LAUNCHERS)


def test_the_driver_is_told_by_kernel_and_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: "580.65.06\n")
    assert verdict._driver() == "580.65.06, CUDA 13000"


GOOD = {"format": 1, "key": KEY, "verdicts": []}
ENTRY = {
    "dtype": "bfloat16",
    "heavy": False,
    "hidden_size": 8,
    "vocab_size": 9,
    "tier": "triton",
    "milliseconds": {},
}
SPOILT = {
    "empty": b"",
    "cut": json.dumps(GOOD).encode()[:-9],
    "binary": bytes(range(256)),
    "a list": b"[1]",
    "nested": b"[" * 100_000,
    "another program's": b'{"version": 3}',
    "another format": json.dumps(GOOD | {"format": 2}).encode(),
    "another key": json.dumps(GOOD | {"key": {"device": "b"}}).encode(),
    "no key": b'{"format": 1, "verdicts": []}',
    "a key of numbers": json.dumps(GOOD | {"key": {"device": 1}}).encode(),
    "verdicts none": json.dumps(GOOD | {"verdicts": None}).encode(),
    "a verdict of another kind": json.dumps(GOOD | {"verdicts": [ENTRY | {"x": 1}]}).encode(),
    "half a verdict": json.dumps(GOOD | {"verdicts": [{"dtype": "bfloat16"}]}).encode(),
    "a size in words": json.dumps(GOOD | {"verdicts": [ENTRY | {"hidden_size": "8"}]}).encode(),
    "times in words": json.dumps(
        GOOD | {"verdicts": [ENTRY | {"milliseconds": {"1u": {"rows": "1"}}}]}
    ).encode(),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file_is_ignored_with_one_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = put(made())
    path.write_bytes(SPOILT[name])
    for _ in range(3):
        assert verdict_files.read(KEY) == ()
    (said,) = warnings(caplog)
    assert str(path) in said and "ignored" in said and "python -m fastpref tune" in said
    assert caplog.records[0].name == "fastpref"
    put(made())  # a new verdict mends it
    assert verdict_files.read(KEY) == (made(),)


def test_an_unreadable_file_is_ignored_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A folder of its name: what a superuser cannot read either."""
    path = put(made())
    path.unlink()
    path.mkdir()
    for _ in range(3):
        assert verdict_files.read(KEY) == ()
    assert len(warnings(caplog)) == 1


def test_a_spoilt_file_keeps_auto_from_nothing(
    card: SimpleNamespace, serving: None, caplog: pytest.LogCaptureFixture
) -> None:
    put(made(), key=verdict.key_of(0)).write_bytes(b"{")
    for _ in range(3):
        assert backends.choose("auto", GPU, SIZE) != "triton"
    assert len(warnings(caplog)) == 1


def test_a_directory_that_cannot_be_written_to(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(OSError):
        put(made())
    assert verdict_files.read(KEY) == () and verdict_files.everything() == []
    assert verdict_files.forget() == []


def test_a_missing_directory_says_nothing(
    cache: Path, card: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    assert verdict.verdict(GPU, SIZE) is None
    assert not cache.exists() and warnings(caplog) == []


def test_without_a_home(
    monkeypatch: pytest.MonkeyPatch, card: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTPREF_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert verdict.verdict(GPU, SIZE) is None
    assert verdict_files.everything() == [] and verdict_files.forget() == []
    assert verdict.describe().startswith("no cache directory")
    with pytest.raises(OSError, match="set FASTPREF_CACHE_DIR"):
        put(made())
    assert warnings(caplog) == []


def test_where_the_directory_is(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert verdict_files.directory() == cache
    monkeypatch.setenv("FASTPREF_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/else")
    assert verdict_files.directory() == Path("/somewhere/else/fastpref")
    monkeypatch.setenv("HOME", "/home/her")
    for absent in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", absent)
        assert verdict_files.directory() == Path("/home/her/.cache/fastpref")


def test_describe(monkeypatch: pytest.MonkeyPatch, cache: Path, card: SimpleNamespace) -> None:
    assert verdict.describe() == f"{cache}; no NVIDIA GPU here to choose for"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "none on this card: `python -m fastpref tune`" in verdict.describe()
    put(made(), made("rows", heavy=True), key=verdict.key_of(0))
    verdict.stored.cache_clear()
    assert verdict.describe() == (
        f"{cache}; on this card: triton for bfloat16 H=4096 plain, "
        "rows for bfloat16 H=4096 with statistics"
    )


def test_forget(cache: Path) -> None:
    paths = [put(made()), put(made(), key={"device": "another"})]
    other = cache / "notes.json"
    other.write_text("{}")
    left = cache / "tune-0.ab.tmp"
    left.write_text("{")
    assert verdict_files.forget() == sorted(paths)
    assert {one.name for one in cache.iterdir()} == {"notes.json", "tune.lock"}


_WRITER = """
import os, sys
from pathlib import Path
from tests.scoring import test_verdict as t

def hold(descriptor):  # everything is in the new file, nothing is in place
    Path(sys.argv[1]).touch()
    import time
    time.sleep(60)

os.fsync = hold
t.put(t.made("rows"))
"""


@pytest.mark.heavy
def test_a_writer_killed_halfway_leaves_the_old_file(cache: Path, tmp_path: Path) -> None:
    path = put(made())
    before, ready = path.read_bytes(), tmp_path / "ready"
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(ready)]) as writer:
        end = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < end:
            assert writer.poll() is None
            time.sleep(0.02)
        assert path.read_bytes() == before  # readers in the meantime
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert len(list(cache.glob("*.tmp"))) == 1
    assert verdict_files.read(KEY) == (made(),)
    put(made("rows"))  # its lock went with it
    assert verdict_files.read(KEY) == (made("rows"),)


def test_a_writer_that_fails_leaves_no_trace(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(made())

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        put(made("rows"))
    assert verdict_files.read(KEY) == (made(),)
    assert {one.name for one in cache.iterdir()} == {path.name, "tune.lock"}


def _write_many(first: int, count: int) -> None:
    for size in range(first, first + count):
        put(made(hidden_size=size))


@pytest.mark.slow
def test_two_processes_write_at_once() -> None:
    """Neither loses what the other wrote, and a reader never sees half a file."""
    context, count = multiprocessing.get_context("fork"), 12
    writers = [context.Process(target=_write_many, args=(1000 * i, count)) for i in (1, 2)]
    for one in writers:
        one.start()
    seen = 0
    while any(one.is_alive() for one in writers):
        found = len(verdict_files.read(KEY))
        assert found >= seen
        seen = found
    for one in writers:
        one.join()
        assert one.exitcode == 0
    sizes = {one.hidden_size for one in verdict_files.read(KEY)}
    assert sizes == {*range(1000, 1000 + count), *range(2000, 2000 + count)}
    assert not verdict_files.warn.cache_info().currsize


_CHOOSER = """
import torch
from types import SimpleNamespace
from fastpref.scoring import backends
from tests.scoring import test_verdict as t

torch.cuda.get_device_properties = lambda index: SimpleNamespace(**t.CARD)
backends.unavailable_reason = lambda name, device: None
for size in (t.SIZE, t.SIZE._replace(heavy=True)):
    print(backends.choose("auto", t.GPU, size))
"""


@pytest.mark.slow
@pytest.mark.heavy
def test_all_processes_with_the_same_file_choose_alike(card: SimpleNamespace) -> None:
    put(made(), made("rows", heavy=True), key=verdict.key_of(0))
    said = {
        subprocess.run(
            [sys.executable, "-c", _CHOOSER], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    (one,) = said
    assert one.split()[0] == "triton" and one.split()[1] != "triton"


@pytest.mark.parametrize(
    "changes, heavy, static",
    [
        ({}, False, False),
        ({"outputs": ("logp", "lse")}, False, False),
        ({"outputs": ("logp", "entropy")}, True, False),
        ({"softcap": 30.0}, True, False),
        ({"tp_group": "sharded"}, False, True),
    ],
)
def test_what_the_choice_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], heavy: bool, static: bool
) -> None:
    """Ranks that share a vocabulary ask for the static rule."""
    asked: list[Size] = []

    def choose(name: str, device: torch.device, size: Size) -> str:
        asked.append(size)
        return "torch"

    hidden, weight = torch.randn(6, 8), torch.randn(11, 8)
    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setattr(validation, "check_group", lambda group, name: None)
    monkeypatch.setattr(request, "agree", lambda *_: Agreed.alone(Own(11)))
    target = torch.arange(6)
    api.ask(hidden, weight, target, **changes).planned(target)
    (size,) = asked
    assert size == Size(torch.float32, 6, 8, 11, heavy, static)


def test_two_heads_ask_for_the_static_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref import linear_divergence

    asked: list[Size] = []

    def choose(name: str, device: torch.device, size: Size) -> str:
        asked.append(size)
        return "torch"

    monkeypatch.setattr(backends, "choose", choose)
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8)
    linear_divergence(hidden, weight, hidden, weight)
    assert [one.static for one in asked] == [True]


def test_only_auto_is_chosen_by_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "choose", lambda *_: "triton")
    monkeypatch.setattr(backends, "load", lambda name, load=backends.load: load("torch"))
    arguments = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6)
    for backend, tuned in (("auto", True), ("triton", False)):
        asked = api.ask(*arguments, options=ScoringOptions(backend=backend))
        call = asked.planned(arguments[-1])
        assert call.tuned == tuned
