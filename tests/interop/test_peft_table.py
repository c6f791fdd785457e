"""Every case of the table against real PEFT: there, here, back there, and here again."""

import contextlib
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import lora_jax as lora
from interop import peft, torch_io
from interop.peft import CONFIG, WEIGHTS
from interop.peft_config import REBASED_INITS

from peft_table import (
    CASES,
    KINDS,
    Case,
    base_outputs,
    base_params,
    jitted,
    load_with_peft,
    outputs_by_the_formula,
    outputs_of,
    outputs_there,
    relative,
    save_with_peft,
)

TOLERANCE = 1e-5


class Imported(NamedTuple):
    case: Case
    directory: Path
    model: Any
    """PEFT's own."""
    theirs: np.ndarray
    """What PEFT computes, or should."""
    adapter: Any
    plan: Any

    @property
    def keymap(self):
        return KINDS[self.case.kind].keymap

    @property
    def params(self):
        return base_params(self.case.kind)


@pytest.fixture(scope="module")
def imports(tmp_path_factory):
    """A case by its name, made by real PEFT and read here, once for all tests."""

    @functools.cache
    def imported(name):
        case, directory = CASES[name], tmp_path_factory.mktemp("peft")
        model = save_with_peft(case, directory)
        right = outputs_by_the_formula if case.wrong else outputs_there
        read = peft.read(directory, base_params(case.kind), keymap=KINDS[case.kind].keymap)
        return Imported(case, directory, model, right(case, model), *read)

    return imported


@pytest.fixture(params=CASES)
def imported(request, imports):
    return imports(request.param)


def test_the_table_is_as_long_as_it_claims():
    assert len(CASES) >= 60
    assert {case.kind for case in CASES.values()} == set(KINDS)


def test_we_compute_what_peft_computes(imported):
    merge = jitted(functools.partial(lora.merge, plan=imported.plan))
    merged = merge(imported.params, imported.adapter)
    assert relative(outputs_of(imported.case.kind, merged), imported.theirs) < TOLERANCE
    assert relative(base_outputs(imported.case.kind), imported.theirs) > 1e-2


def written(imported, directory):
    given = {"keymap": imported.keymap, "params": imported.params}
    peft.write(directory, imported.adapter, imported.plan, **given)
    return directory


def test_peft_computes_it_again_from_what_we_write(imported, tmp_path):
    again = load_with_peft(imported.case.kind, written(imported, tmp_path / "ours"))
    right = outputs_by_the_formula if imported.case.wrong else outputs_there
    assert relative(right(imported.case, again), imported.theirs) < TOLERANCE


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.wrong])
def test_where_peft_is_wrong_it_is_said(imports, name):
    """PEFT fails, or is far from its own formula; where it no longer is, the note has to go."""
    imported = imports(name)
    with contextlib.suppress(RuntimeError):
        assert relative(outputs_there(imported.case, imported.model), imported.theirs) > 1e-3
    found = peft.notes(imported.directory, imported.params, keymap=imported.keymap)
    assert imported.case.wrong in "; ".join(found)


def test_a_second_way_round_changes_no_bit(imported, tmp_path):
    ours = written(imported, tmp_path / "ours")
    adapter, plan = peft.read(ours, imported.params, keymap=imported.keymap)
    assert plan == imported.plan
    jax.tree.map(np.testing.assert_array_equal, adapter, imported.adapter)
    again = written(imported._replace(adapter=adapter, plan=plan), tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (ours / name).read_bytes() == (again / name).read_bytes()
    if imported.case.inits not in REBASED_INITS:
        assert tensors_in(ours) == tensors_in(imported.directory)


def tensors_in(directory):
    return {name: t.tobytes() for name, t in torch_io.read(directory / WEIGHTS).items()}


def assert_beside_the_weights(imported):
    """The low-rank path, which is compiled anew for every case."""
    adapted = lora.adapt(KINDS[imported.case.kind].function, imported.plan)
    ours = jitted(adapted)(imported.params, imported.adapter, *KINDS[imported.case.kind].inputs)
    assert relative(np.asarray(ours), imported.theirs) < TOLERANCE


ONE_OF_EACH_KIND = {case.kind: name for name, case in CASES.items()}.values()


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_beside_the_weights_it_is_the_same(imports, name):
    assert_beside_the_weights(imports(name))


def test_beside_the_weights_every_case_is_the_same(imported):
    assert_beside_the_weights(imported)
