# SPDX-License-Identifier: Apache-2.0
"""A run that fits a time limit: items in order of value, each part within a share of the time, a
result written as soon as it is there, and what is left for a later run."""

from __future__ import annotations

import concurrent.futures
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPORT, LEFT = "bench.json", "left.json"
NOT_BEGUN = "not begun: out of time"


class Item(NamedTuple):
    name: str  # unique in a run
    # Until a time of ``Drive.clock``, past which it raises TimeoutError.
    run: Callable[[float], None]


class Part(NamedTuple):
    seconds: float  # that it may take, of those of the run
    lanes: Sequence[Sequence[Item]]  # side by side
    close: Callable[[], None] = lambda: None


class Drive:
    """
    Args:
        report: plain data, which items add to.
        folder: for ``bench.json`` and ``left.json``, or None.
        end: of ``clock``.
        only: names of the items to run; None: all.
    """

    def __init__(
        self,
        report: dict[str, Any],
        folder: Path | None,
        end: float,
        only: Collection[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.report, self.folder, self.end, self.only = report, folder, end, only
        self.clock = clock
        self.left: dict[str, str] = {}  # why, by name
        self.lock = threading.RLock()

    def run(self, parts: Sequence[Part]) -> None:
        """All the parts, as far as there is time."""
        parts = [part._replace(lanes=self._wanted(part)) for part in parts]
        every = [item.name for part in parts for lane in part.lanes for item in lane]
        # Written first: a run that is killed leaves a true list.
        self.left = dict.fromkeys(every, NOT_BEGUN)
        self.save()
        for part in parts:
            end = min(self.end, self.clock() + part.seconds)
            try:
                with concurrent.futures.ThreadPoolExecutor(max(1, len(part.lanes))) as pool:
                    running = [pool.submit(self._lane, lane, end) for lane in part.lanes]
                for one in running:
                    one.result()
            finally:
                part.close()

    def _wanted(self, part: Part) -> list[list[Item]]:
        lanes = [
            [item for item in lane if self.only is None or item.name in self.only]
            for lane in part.lanes
        ]
        return [lane for lane in lanes if lane]

    def _lane(self, items: Sequence[Item], end: float) -> None:
        for item in items:
            if self.clock() >= end:
                return
            try:
                item.run(end)
            except TimeoutError as cut:
                self._finished(item.name, left=str(cut) or "cut short")
            except Exception as error:
                self._finished(item.name, failed=f"{type(error).__name__}: {error}")
            else:
                self._finished(item.name)

    def _finished(self, name: str, left: str | None = None, failed: str | None = None) -> None:
        with self.lock:
            if left is not None:
                # After those that were not begun.
                self.left.pop(name)
                self.left[name] = left
            else:
                self.left.pop(name)
            if failed is not None:
                self.report.setdefault("failed", {})[name] = failed
                print(f"\n{name}: not measured, {failed}", flush=True)
            self.save()

    def add(self, section: str, row: dict[str, Any], text: str) -> None:
        """A row of the report, which ``text`` shows."""
        with self.lock:
            self.report.setdefault(section, []).append(row)
            print(text, flush=True)
            self.save()

    def save(self) -> None:
        if self.folder is not None:
            with self.lock:
                write(self.folder / REPORT, self.report)
                write(self.folder / LEFT, self.left)


def write(path: Path, data: Any) -> None:
    """JSON, whole or not at all: a process that is killed leaves the file that was there."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    beside.replace(path)


def earlier(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The report of a run in ``folder``, and what it left.

    Raises:
        ValueError: there is none.
    """
    try:
        report, left = (json.loads((folder / name).read_text()) for name in (REPORT, LEFT))
        return dict(report), dict(left)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"--more must be a folder that --suite gpu --out wrote, got {folder}: {error}"
        ) from None


def age() -> float:
    """Seconds since this process began, imports included; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0
