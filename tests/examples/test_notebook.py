"""The tutorial notebook runs in a clean kernel, and shows what it computes."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from rich.text import Text

import lora_jax as lora
from interop.comparison_tables import as_text
from lora_jax.cli.main import COMMANDS
from lora_jax.train.sharding_table import explain_sharding

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "lora_in_jax.ipynb"
ABSOLUTE = re.compile(r"(?<![\w.:/])(?:/\w[\w.-]*){2,}|\b[A-Z]:\\|file:/|~/")
DECIMAL = re.compile(r"-?\d+\.\d+")

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("torch", reason="one of its cells runs torch")


@pytest.fixture(scope="module")
def committed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_runs_and_shows_what_it_computes(committed, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    fresh = nbformat.from_dict(without_outputs(committed))
    client = nbclient.NotebookClient(
        fresh,
        kernel_name="python3",
        timeout=600,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()
    for shown, computed in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert kinds(shown) == kinds(computed), shown.source
        assert_same_text(text(shown), text(computed))


def test_it_was_executed_from_top_to_bottom(committed):
    counts = [cell.execution_count for cell in code_cells(committed)]
    assert counts == list(range(1, len(counts) + 1))


def test_most_cells_assert_and_some_draw(committed):
    cells = code_cells(committed)
    printing = [cell for cell in cells if re.search(r"\d", text(cell))]
    assert len(printing) >= 8
    assert all("assert" in cell.source for cell in printing)
    assert sum(("display_data", None) in kinds(cell) for cell in cells) >= 3


def test_its_outputs_are_clean(committed):
    for cell in code_cells(committed):
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]
        assert not re.search(r"\x1b|[Ww]arning", text(cell))


def test_it_holds_no_absolute_path(committed):
    for cell in committed.cells:
        written = cell.source + text(cell) + str(cell.metadata) + str(committed.metadata)
        assert not ABSOLUTE.search(written), cell.source


@pytest.mark.parametrize(
    "path", ["see /home/me/x.py", "'/tmp/a.b'", r"C:\\Users", "file:///etc/x", "~/models"]
)
def test_an_absolute_path_is_told(path):
    assert ABSOLUTE.search(path)
    assert not ABSOLUTE.search(
        "runs/identity, https://arxiv.org/abs/2106.09685, 思路 / idea, a/b/c"
    )


@pytest.mark.parametrize(
    ("shown", "computed"),
    [
        ("loss 6.31 before", "loss 6.28 before"),
        ("12,288 of 602,880", "12,289 of 602,880"),
        ("rank 2", "rank 2 "),
        ("0.50", "0.500"),
    ],
)
def test_another_text_is_told(shown, computed):
    assert_same_text(shown, shown)
    with pytest.raises(AssertionError):
        assert_same_text(shown, computed)


def test_its_commands_are_there(committed):
    prose = "".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    named = re.findall(r"`lora-jax ([a-z]+(?: plan)?)", prose)
    assert len(named) >= 7
    assert set(named) <= set(COMMANDS)


@pytest.mark.parametrize("table", ["plan", "sharding", "comparison"])
def test_tables_are_the_same_text_in_a_notebook(table, monkeypatch, capsys):
    outside = TABLES[table]()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert TABLES[table]() == outside
    assert "\x1b" not in outside
    assert capsys.readouterr().out == ""


def test_a_cell_is_called_one():
    use = lora.Use("dot_general", "/tmp/ipykernel_71/212921559.py:3 (model_fn)")
    assert "dot_general cell:3" in lora.explain(plan_with(use))


def plan_with(use: lora.Use) -> lora.Plan:
    return lora.Plan((lora.Site("w", (4, 6), "float32", ("in", "out"), 2, 1.0, uses=(use,)),), 24)


TABLES = {
    "plan": lambda: lora.explain(plan_with(lora.Use("dot_general", "/home/me/model.py:7 (mlp)"))),
    "sharding": lambda: explain_sharding({"w": np.zeros((6, 8))}, {"data": 2, "fsdp": 4}),
    "comparison": lambda: as_text(Text("red", style="red")),
}


def assert_same_text(shown: str, computed: str):
    """Equal but for the last digit of decimals, which may differ by one between machines."""
    assert DECIMAL.sub("#", shown) == DECIMAL.sub("#", computed)
    for ours, theirs in zip(DECIMAL.findall(shown), DECIMAL.findall(computed), strict=True):
        digits = len(ours.partition(".")[2])
        assert len(theirs.partition(".")[2]) == digits, (ours, theirs)
        assert abs(float(ours) - float(theirs)) < 1.5 * 10**-digits, (shown, computed)


def without_outputs(notebook):
    cells = [
        {**cell, "outputs": [], "execution_count": None} if cell.cell_type == "code" else cell
        for cell in notebook.cells
    ]
    return {**notebook, "cells": cells}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    return [(output.output_type, output.get("name")) for output in cell.outputs]


def text(cell):
    outputs = cell.get("outputs", [])
    return "".join(output.text for output in outputs if output.output_type == "stream")
