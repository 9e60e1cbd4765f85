"""SIGTERM and Ctrl-C as a wish that the loop reads between steps; a second Ctrl-C kills at once.

Winnow's own.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, by Ctrl-C or SIGTERM, and saved itself; `code` is what the shell expects of such an end."""

    def __init__(self, words: str, signum: int) -> None:
        super().__init__(words)
        self.code = 128 + signum


class Wish:
    """Which signal came, 0 for none."""

    signum = 0


@contextmanager
def signals() -> Iterator[Wish]:
    """Catch SIGTERM and SIGINT meanwhile; outside the main thread nothing is caught."""
    wish = Wish()

    def note(signum: int, frame: FrameType | None) -> None:
        wish.signum = signum
        signal.signal(signum, before[signal.Signals(signum)])

    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield wish
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
