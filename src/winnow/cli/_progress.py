"""A progress bar over configurations and images; on a terminal that is none, one line per configuration.

Winnow's own, drawn by rich.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """`say` names what runs now, `images` how far it is."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bar = Bar(*columns, console=self.console, transient=True)
        self.total = 0
        self.start = time.monotonic()
        self.task = self.bar.add_task("decoding", total=None)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def say(self, words: str) -> None:
        """A new configuration starts."""
        if not self.console.is_terminal:
            self.console.print(f"{time.monotonic() - self.start:6.0f} s  {words}", highlight=False, soft_wrap=True)
        self.bar.reset(self.task, description=words, total=self.total or None)

    def images(self, done: int) -> None:
        """So many images of this configuration are done."""
        self.bar.update(self.task, completed=done)
