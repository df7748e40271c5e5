# SPDX-License-Identifier: Apache-2.0
"""Where verdicts lie: one JSON file for each key in the user's cache directory.

A file that cannot be read, or that is none of ours, counts as none: one warning, no exception.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("fastpref")
VARIABLE = "FASTPREF_CACHE_DIR"
FORMAT = 1
NAMES = "tune-*.json"
NO_DIRECTORY = (
    f"no cache directory: neither {VARIABLE} nor XDG_CACHE_HOME is set, and no home directory is "
    f"known; set {VARIABLE}"
)

Key = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On heads of one hidden size in one dtype, with what it rests on."""

    dtype: str
    heavy: bool
    hidden_size: int  # H
    vocab_size: int  # V
    tier: str  # right, and the fastest
    milliseconds: dict[str, dict[str, float]]  # by what was timed and by tier

    @property
    def subject(self) -> tuple[Any, ...]:
        """There is one verdict on each."""
        return self.dtype, self.heavy, self.hidden_size, self.vocab_size


@dataclass(frozen=True, kw_only=True)
class Record:
    """A file's content."""

    key: Key
    verdicts: tuple[Verdict, ...]


def directory() -> Path | None:
    """FASTPREF_CACHE_DIR, else fastpref/ in the user's cache; None where there is none. It need not
    exist."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the XDG specification.
    if shared.startswith("/"):
        return Path(shared) / "fastpref"
    try:
        return Path.home() / ".cache" / "fastpref"
    except RuntimeError:
        return None


def path_of(key: Key) -> Path | None:
    """The file of ``key``; None where there is no cache directory."""
    folder = directory()
    if folder is None:
        return None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / NAMES.replace("*", digest[:20])


def read(key: Key) -> tuple[Verdict, ...]:
    """The verdicts of ``key``; none where the file is missing or cannot be used."""
    path = path_of(key)
    record = None if path is None else _read(path)
    if record is None:
        return ()
    if record.key != key:
        warn(f"{path} ignored: it is of another key; `python -m fastpref tune` writes it again")
        return ()
    return record.verdicts


def everything() -> list[Record]:
    """All that is stored, of other cards and versions too."""
    found = (_read(path) for path in _files())
    return [one for one in found if one is not None]


def record(key: Key, verdicts: Iterable[Verdict], instead_of: Iterable[tuple[Any, ...]]) -> Path:
    """Write ``verdicts`` in place of those on the subjects ``instead_of``; others stay.

    Whole or not at all: a reader sees the old file or the new one.

    Raises:
        OSError: it cannot be written.
    """
    path = path_of(key)
    if path is None:
        raise OSError(NO_DIRECTORY)
    gone = set(instead_of)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        kept = [one for one in read(key) if one.subject not in gone]
        entries = [asdict(one) for one in (*kept, *verdicts)]
        content = {"format": FORMAT, "key": key, "verdicts": entries}
        # In the same folder: between file systems a file cannot be replaced whole.
        fresh = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
        try:
            with fresh.open("x") as file:
                file.write(json.dumps(content, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    return path


def forget() -> list[Path]:
    """Delete all that is stored; what was.

    Raises:
        OSError: a file cannot be deleted.
    """
    found = _files()
    folder = directory()
    # Left by a writer that was killed.
    leftovers = [] if folder is None else folder.glob(NAMES.replace(".json", ".*.tmp"))
    for path in (*found, *leftovers):
        path.unlink(missing_ok=True)
    return found


@functools.cache
def warn(message: str) -> None:
    """Once a process."""
    LOGGER.warning("%s", message)


def _files() -> list[Path]:
    folder = directory()
    return [] if folder is None else sorted(folder.glob(NAMES))


def _read(path: Path) -> Record | None:
    try:
        return _parsed(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    # Of a file that nests too deeply, the last.
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        warn(f"{path} ignored: {reason}; `python -m fastpref tune --forget` deletes it")
        return None


def _parsed(content: Any) -> Record:
    """Raises ValueError, TypeError or KeyError where it is no record."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a file of fastpref's in format {FORMAT}")
    key = content["key"]
    if not isinstance(key, dict) or not all(isinstance(one, str) for one in key.values()):
        raise TypeError("its key is no table of strings")
    return Record(key=key, verdicts=tuple(_verdict(one) for one in content["verdicts"]))


def _verdict(entry: Any) -> Verdict:
    verdict = Verdict(**entry)
    types = {"dtype": str, "heavy": bool, "hidden_size": int, "vocab_size": int, "tier": str}
    for name, kind in (types | {"milliseconds": dict}).items():
        if type(getattr(verdict, name)) is not kind:
            raise TypeError(f"{name} of a verdict is no {kind.__name__}")
    for times in verdict.milliseconds.values():
        if not all(isinstance(one, float) for one in times.values()):
            raise TypeError("a time of a verdict is no number")
    return verdict


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, where the platform and the file system can: two that add a verdict each
    then keep both. Readers need no lock."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl
        except ImportError:
            yield
            return
        file = stack.enter_context((folder / "tune.lock").open("a"))
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
