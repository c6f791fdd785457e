"""The time that one step of a test takes, apart from what the tests before it left."""

import gc
import json
import resource
import time

from lora_jax.errors import InputError

_RUNS = 3
_QUICK = 0.37
"""CPU seconds of `_known_work` on a core of a Xeon with nothing else to do."""
_MOST = 2
"""A machine that is slower than this by more is no machine to take times on."""


def computed():
    """CPU seconds of this process and of those it started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def within(seconds, run):
    """What ``run`` gives or raises, if one of three runs computes for less than that.

    Even CPU seconds grow with what else shares the core and the memory: if none is quick enough,
    they are those of a quiet machine, by what work that is known takes in the same moment. Older
    objects are not looked through.
    """
    taken = []
    gc.freeze()
    try:
        while len(taken) < _RUNS:
            outcome, error, spent = _timed(run)
            taken.append(spent)
            if spent < seconds:
                break
        slowness = 1 if min(taken) < seconds else _slowness()
    finally:
        gc.unfreeze()
    assert min(taken) < seconds * slowness, (taken, slowness)
    if error is not None:
        raise error
    return outcome


def _timed(run):
    started, outcome, error = computed(), None, None
    try:
        outcome = run()
    except InputError as raised:
        error = raised
    return outcome, error, computed() - started


def _slowness():
    """How many times as long as a quiet machine this one takes now."""
    taken = min(_timed(_known_work)[-1] for _ in range(_RUNS))
    return min(max(taken / _QUICK, 1), _MOST)


def _known_work():
    names = (f"model.layers.{n}.self_attn.q_proj.lora_A.weight" for n in range(100_000))
    return json.loads(json.dumps({name: {"shape": [1], "dtype": "F32"} for name in names}))
