"""The time that one step of a test takes, apart from what the tests before it left."""

import gc
import resource
import time
from contextlib import contextmanager


def computed():
    """CPU seconds of this process and of those it started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@contextmanager
def takes_less_than(seconds):
    """The block computes for less than that; older objects are not looked through meanwhile."""
    gc.collect()
    gc.freeze()
    started = computed()
    try:
        yield
        spent = computed() - started
    finally:
        gc.unfreeze()
    assert spent < seconds
