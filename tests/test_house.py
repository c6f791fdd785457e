"""Rules of the house: imports run one way, every public name is documented, CI runs the README."""

import ast
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import interop
import lora_jax

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("lora_jax/**/*.py"), *ROOT.glob("interop/**/*.py")])
CORE = (
    ("errors", "paths", "site", "files"),
    ("targets", "manifest"),
    ("config",),
    ("adapter",),
    ("variants",),
    ("initialisers", "merging", "rewrite"),
    ("selection", "planning", "adapting", "explanation", "monitoring"),
)
LAYER = {name: layer for layer, names in enumerate(CORE) for name in names}
SIDE_ROOMS = ("train", "models", "data")
ALLOWED_IN_SIDE_ROOMS = {"errors", "paths", "files", "manifest"}


def imports(path: Path, *, module_level: bool = False) -> set[str]:
    """Every module that a file imports, in full; only at module level if asked."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if module_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    """``lora_jax.rewrite.walk`` -> ``rewrite``."""
    return [*module.split("."), ""][1]


def in_package(path: Path, package: str) -> bool:
    return path.relative_to(ROOT).parts[0] == package


def core_imports(path: Path) -> set[str]:
    names = (name for name in imports(path) if name.split(".")[0] == "lora_jax")
    return {room(name) for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[1]
    names = imports(path)
    if in_package(path, "lora_jax"):
        assert not any(name.split(".")[0] == "torch" for name in names)
        outside_cli = own != "cli"
        assert not (outside_cli and any(name.split(".")[0] == "interop" for name in names))
        top = imports(path, module_level=True)
        assert not any(name.split(".")[0] == "interop" for name in top)
    if own in SIDE_ROOMS and in_package(path, "lora_jax"):
        assert core_imports(path) <= ALLOWED_IN_SIDE_ROOMS | {own}
    if own in LAYER:
        higher = {name for name in core_imports(path) if LAYER.get(name, 99) > LAYER[own]}
        assert not higher, f"{own} imports {higher}, which stand above it"
    assert not any(name.startswith("jax._src") for name in names)
    assert parts[:2] == ("lora_jax", "rewrite") or not any("jax.extend" in name for name in names)


def test_interop_has_no_circle():
    """Not in function bodies either: every module can be read after those that it stands on."""
    modules = {path.stem: path for path in (ROOT / "interop").glob("*.py")}
    stands_on = {
        name: {room(each) for each in imports(path) if each.startswith("interop.")}
        for name, path in modules.items()
    }
    assert {*graphlib.TopologicalSorter(stands_on).static_order()} == modules.keys()


def test_core_layers_name_every_module():
    modules = {p.stem for p in ROOT.glob("lora_jax/*.py")} - {"__init__"}
    assert modules == set(LAYER) - {"rewrite"}


@pytest.mark.parametrize("name", lora_jax.__all__)
def test_public_names_are_documented(name):
    value = getattr(lora_jax, name)
    assert inspect.getdoc(value), f"lora_jax.{name} has no docstring"
    assert not inspect.ismodule(value)


@pytest.mark.parametrize("package", [lora_jax, interop], ids=lambda p: p.__name__)
def test_every_module_and_public_function_is_documented(package):
    bare = []
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        bare += [] if module.__doc__ else [info.name]
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == info.name
            documented = not callable(value) or inspect.getdoc(value) or name.startswith("_")
            bare += [f"{info.name}.{name}"] if own and not documented else []
    assert not bare


def test_ci_finds_the_readmes_test_commands():
    found = re.findall(r"^python3.*pytest.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [command.split()[0] for command in found] == ["python3.11", "python3.13"]
    assert "grep -E '^python3.*pytest' README.md" in (ROOT / ".ci/run").read_text()


def test_importing_the_library_is_light():
    heavy = "{'jax', 'torch', 'numpy'} & set(sys.modules)"
    code = f"import lora_jax, lora_jax.cli.main, sys; print({heavy})"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.strip() == "set()"


def test_ruff_finds_nothing():
    subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)], check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", str(ROOT)], check=True)
