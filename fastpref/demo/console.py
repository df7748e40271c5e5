# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: lines with the time since the start, and blocks of text."""

import time
from collections.abc import Sequence
from typing import TextIO


class Console:
    """Lines of progress with the time since the start; rewritten in place on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def say(self, label: str, text: str, end: str = "\n") -> None:
        """One line under a label."""
        minutes, seconds = divmod(int(self.seconds), 60)
        print(
            f"{minutes:2}:{seconds:02}  {label:<10} {text}", end=end, file=self.stream, flush=True
        )

    def block(self, lines: Sequence[str]) -> None:
        """Indented lines between blank ones."""
        print("", *(f"  {line}" for line in lines), "", sep="\n", file=self.stream, flush=True)

    def progress(self, label: str) -> "Steps":
        """What a training calls after every step."""
        return Steps(self, label)


class Steps:
    """Shows every step on a terminal, about ten of them in a log, and keeps the losses."""

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label = console, label
        self.losses: list[float] = []

    def __call__(self, step: int, steps: int, loss: float) -> None:
        self.losses.append(loss)
        text = f"step {step:{len(str(steps))}} of {steps}   loss {loss:.4f}"
        last = step == steps
        if self.console.stream.isatty():
            print("\r", end="", file=self.console.stream)
            self.console.say(self.label, text, end="\n" if last else "")
        elif last or step == 1 or step % -(-steps // 10) == 0:
            self.console.say(self.label, text)
