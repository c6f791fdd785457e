"""Rows 6, 7, 8 and 26 of the fault matrix, of checkpoints: arrays that are others than expected.

6, 7, 8: missing, extra and renamed, of another shape, of another dtype: all named at once, with
both values. 26: whatever lies behind an array, its values are what is saved.
"""

import re

import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.train import checkpoint

STATE = {"a": np.ones((4, 2), np.float32), "b": np.zeros((2, 3), np.float32), "step": np.int32(5)}


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path, 5, STATE, {"losses": []})
    return checkpoint.latest(tmp_path)


def without(name):
    return {key: value for key, value in STATE.items() if key != name}


MISFITS = {
    "an array is missing": ({**STATE, "m": np.ones(2)}, ["m is missing"]),
    "an array too many": (without("b"), ["b is not expected"]),
    "renamed": ({**without("b"), "c": STATE["b"]}, ["c is missing", "b is not expected"]),
    "of another rank": (
        {**STATE, "a": np.ones((4, 8), np.float32), "b": np.ones((8, 3), np.float32)},
        ["a is ((4, 2), dtype('float32')), expected ((4, 8), dtype('float32'))", "b is ((2, 3)"],
    ),
    "of another dtype": (
        {**STATE, "a": np.ones((4, 2), np.float64)},
        ["expected ((4, 2), dtype('f"],
    ),
    "an integer": ({**STATE, "a": np.ones((4, 2), np.int32)}, ["dtype('int32')"]),
}


@pytest.mark.parametrize(("like", "named"), MISFITS.values(), ids=MISFITS)
def test_6_7_8_arrays_that_do_not_fit_are_all_named(saved, like, named):
    with pytest.raises(InputError, match=re.escape(f"{saved.directory} is of another run")) as told:
        checkpoint.restore(saved, like)
    assert all(text in str(told.value) for text in named)
    assert checkpoint.restore(saved, STATE)["a"].tolist() == STATE["a"].tolist()


MATRIX = np.arange(24, dtype=np.float32).reshape(4, 6)
LAYOUTS = {
    "transposed": MATRIX.T,
    "in columns": np.asfortranarray(MATRIX),
    "strided": MATRIX[::2, 1::3],
    "backwards": MATRIX[::-1],
    "repeated": np.broadcast_to(MATRIX[0], (3, 6)),
    "without axes": np.float32(2.5),
    "big-endian": MATRIX.astype(">f4"),
}


@pytest.mark.parametrize("array", LAYOUTS.values(), ids=LAYOUTS)
def test_26_the_values_of_an_array_are_saved_whatever_lies_behind_it(tmp_path, array):
    checkpoint.save(tmp_path, 1, {"w": array}, {})
    native = np.array(array, np.float32)
    found = checkpoint.restore(checkpoint.latest(tmp_path), {"w": native})["w"]
    assert np.asarray(found).tobytes() == native.tobytes()


def test_26_an_array_without_elements_which_orbax_has_no_form_for_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint of update 1 .* zero size.*name=w"):
        checkpoint.save(tmp_path, 1, {"w": np.zeros((0, 3), np.float32)}, {})
    assert not [*tmp_path.iterdir()]
