"""Asking a run to stop: the first Ctrl-C or SIGTERM is a request, the second is obeyed at once.

The handler only sets a flag, and stands before JAX is imported: an exception raised in the middle
of a compilation or of a callback of XLA can be swallowed there, or take the process with it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A stop was asked for while there was nothing to keep yet."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} before the first update")
        self.status = 128 + signum


class Stop:
    """Whether a stop was asked for, and by which signal."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def requested(self) -> bool:
        """Whether there was a signal."""
        return self.signum is not None

    @property
    def status(self) -> int:
        """What shells expect: 130 after Ctrl-C; 143 after SIGTERM, also another process's."""
        return 128 + (self.signum or signal.SIGTERM)

    def check(self) -> None:
        """Raise `Stopped` if a stop was asked for; called between the steps of a preparation."""
        if self.signum is not None:
            raise Stopped(self.signum)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """In the block SIGINT and SIGTERM only set a flag; a second one has its usual effect."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def request(number: int, frame: FrameType | None) -> None:
        stop.signum = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in SIGNALS:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
