"""Rows 4, 5, 22 and 23 of the fault matrix: files that are not what they were, or never were good.

4: cut at every length. 5: one bit flipped, anywhere. 22 and 23: manifests and progress files that
somebody forged. It is always found, the error names the file, and no older checkpoint is taken in
its place.
"""

import hashlib
import json
import random
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console

from interop import peft
from lora_jax.cli.main import main
from lora_jax.cli.parsing import parse
from lora_jax.cli.resuming import checkpoint_of
from lora_jax.cli.train import Options
from lora_jax.errors import InputError
from lora_jax.manifest import MANIFEST, to_json, write_manifest
from lora_jax.train import checkpoint

SMALL = 3000
"""Bytes up to which a file is cut at every length."""

OPTIONS = ("--epochs", "2", "--save-every", "4", "--accumulate", "2")


@pytest.fixture(scope="module")
def finished(training, tmp_path_factory):
    whole = training(tmp_path_factory.mktemp("whole"), OPTIONS)
    assert whole.run()[0] == 0
    assert len(checkpoint.steps(whole.checkpoints)) == 2
    return whole


@pytest.fixture
def root(finished, tmp_path):
    """The two checkpoints of a finished run, to be damaged."""
    return Path(shutil.copytree(finished.checkpoints, tmp_path / "checkpoints"))


@pytest.fixture
def newest(root):
    return checkpoint.latest(root).directory


@pytest.fixture
def adapter(finished, tmp_path):
    return Path(shutil.copytree(finished.out / "adapter", tmp_path / "adapter"))


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def require_found(root, path):
    with pytest.raises(InputError) as caught:
        checkpoint.latest(root)
    told = str(caught.value)
    assert str(path.relative_to(path.parents[1])) in told or path.name in told
    assert "to resume from update 8 instead, remove it" in told


def require_found_in_adapter(directory, path):
    with pytest.raises(InputError) as caught:
        peft.base_of(directory)
    assert path.name in str(caught.value)
    assert str(directory) in str(caught.value)


def flipped(content, place, bit):
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def places(content, count, seed=0):
    """First, last, and some between."""
    drawn = random.Random(seed)
    return {0, len(content) - 1, *(drawn.randrange(len(content)) for _ in range(count))}


def lengths_of(content, count):
    """To cut a content at: all, or of a large one some."""
    return range(len(content)) if len(content) < SMALL else sorted(places(content, count))


def require_each_found(path, contents, require):
    """Write each content in turn, then what was there."""
    whole, tried = path.read_bytes(), 0
    for content in contents:
        path.write_bytes(content)
        require()
        tried += 1
    path.write_bytes(whole)
    assert tried


def test_5_every_flipped_bit_of_a_checkpoint_is_found(root, newest):
    for path in files_of(newest):
        content = path.read_bytes()
        changed = (flipped(content, at, bit) for at in places(content, 6) for bit in (0, 3, 7))
        require_each_found(path, changed, lambda path=path: require_found(root, path))
    assert checkpoint.latest(root).directory == newest


def test_5_every_flipped_bit_of_a_manifest_is_found(root, newest):
    path = newest / MANIFEST
    content = path.read_bytes()
    changed = (flipped(content, at, at % 8) for at in range(len(content)))
    require_each_found(path, changed, lambda: require_found(root, path))
    base = content.index(b'"step"')
    changed = (flipped(content, base + at, bit) for at in range(11) for bit in range(8))
    require_each_found(path, changed, lambda: require_found(root, path))


@pytest.mark.slow
def test_4_a_file_of_a_checkpoint_cut_at_any_length_is_found(root, newest):
    for path in files_of(newest):
        content = path.read_bytes()
        cut = (content[:length] for length in lengths_of(content, 20))
        require_each_found(path, cut, lambda path=path: require_found(root, path))


def test_4_a_file_of_a_checkpoint_that_is_gone_or_new_or_longer_is_found(root, newest):
    for path in files_of(newest):
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        require_found(root, path)
        path.unlink()
        require_found(root, path)
        path.write_bytes(content)
    for folder in (newest, newest / "state", newest / "adapter", newest / "new"):
        folder.mkdir(exist_ok=True)
        path = folder / ".added"
        path.write_bytes(b"")
        require_found(root, path)
        path.unlink()
    assert checkpoint.latest(root).step == 10


def test_4_a_checkpoint_under_another_name_is_found(root, newest):
    newest.rename(root / "step-00000012")
    require_found(root, root / "step-00000012" / MANIFEST)


def test_5_every_flipped_bit_of_an_adapter_is_found(adapter):
    for name in (peft.CONFIG, peft.WEIGHTS, MANIFEST):
        content = (adapter / name).read_bytes()
        changed = (flipped(content, at, bit) for at in places(content, 40) for bit in range(8))
        require = lambda name=name: require_found_in_adapter(adapter, adapter / name)  # noqa: E731
        require_each_found(adapter / name, changed, require)


def test_4_a_file_of_an_adapter_cut_at_any_length_is_found(adapter):
    for path in files_of(adapter):
        content = path.read_bytes()
        cut = (content[:length] for length in lengths_of(content, 100))
        require = lambda path=path: require_found_in_adapter(adapter, path)  # noqa: E731
        require_each_found(path, cut, require)


def test_4_a_file_of_an_adapter_that_is_gone_is_found(adapter):
    """All but the manifest, which PEFT's own directories don't have."""
    for name in (peft.CONFIG, peft.WEIGHTS):
        (adapter / name).rename(adapter.parent / "away")
        require_found_in_adapter(adapter, adapter / name)
        (adapter.parent / "away").rename(adapter / name)
    assert peft.base_of(adapter)["model"] == "tiny"


@pytest.mark.parametrize("name", [MANIFEST, "progress.json", "adapter/adapter_model.safetensors"])
def test_5_a_run_does_not_go_on_from_a_damaged_checkpoint(finished, tmp_path, capsys, name):
    """Nor from the one before, unless it is told to."""
    out = Path(shutil.copytree(finished.out, tmp_path / "run"))
    path = checkpoint.latest(out / "checkpoints").directory / name
    path.write_bytes(flipped(path.read_bytes(), -20, 1))
    before = sorted(
        (file, file.stat().st_mtime_ns) for file in files_of(out) if file.name[0] != "."
    )
    words = finished.words("--resume", "--out", str(out))
    assert main(words) == 2
    told = capsys.readouterr()
    assert path.name in told.err
    assert "remove it" in told.err
    after = sorted((file, file.stat().st_mtime_ns) for file in files_of(out) if file.name[0] != ".")
    assert after == before


HOSTILE_MANIFESTS = {
    "huge": b"[" + b" " * (2 << 20) + b"]",
    "deep": b'{"files": ' + b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "no object": b"[]",
    "empty": b"",
    "not UTF-8": b'{"files": "\xff"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "no keys": b"{}",
    "another version": b'{"format_version": 99, "files": {}, "base": {}}',
    "files are a list": b'{"format_version": 1, "files": ["../../etc/passwd"], "base": {}}',
    "files are a number": b'{"format_version": 1, "files": 1e999, "base": {}}',
    "the base is a text": b'{"format_version": 1, "files": {}, "base": "x"}',
    "other directories": b'{"format_version": 1, "files": {"../../../etc/passwd": {}}, "base": {}}',
    "absolute": b'{"format_version": 1, "files": {"/etc/passwd": {}}, "base": {}}',
    "huge integer": b'{"format_version": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS)
def test_23_a_forged_manifest_is_refused_at_once(root, newest, adapter, content):
    started = time.perf_counter()
    for directory in (newest, adapter):
        (directory / MANIFEST).write_bytes(content)
    require_found(root, newest / MANIFEST)
    require_found_in_adapter(adapter, adapter / MANIFEST)
    assert time.perf_counter() - started < 1


def write_as_forged(path, manifest):
    """With a digest that holds."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(to_json(content).encode()).hexdigest()
    path.write_text(to_json({**content, "sha256": digest}))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "state/../../outside", "a\u0000b"])
def test_22_a_manifest_with_files_elsewhere_is_refused(root, newest, name):
    path = newest / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["progress.json"]
    write_as_forged(path, manifest)
    require_found(root, path)


@pytest.mark.parametrize("kind", [None, 1, [], "text", {"size": "1", "sha256": None}, {}])
def test_23_a_manifest_with_fingerprints_of_another_type_is_refused(root, newest, kind):
    path = newest / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["progress.json"] = kind
    write_as_forged(path, manifest)
    require_found(root, newest / "progress.json")


def forge(directory, change):
    """Progress that its manifest vouches for."""
    path = directory / checkpoint.PROGRESS
    path.write_text(change(json.loads(path.read_text())))
    names = [str(each.relative_to(directory)) for each in files_of(directory)]
    step = int(directory.name.partition("-")[2])
    write_manifest(directory, sorted({*names} - {MANIFEST}), {"step": step})


def replaced(*keys, by):
    """The progress with one value in it replaced."""

    def change(progress):
        inner = progress
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = by
        return json.dumps(progress)

    return change


FORGED = {
    "deep": lambda progress: '{"history": ' + "[" * 200_000,
    "a list": lambda progress: "[]",
    "nothing": lambda progress: "{}",
    "no identity": replaced("identity", by=[]),
    "no position": replaced("batches", by=None),
    "no history": replaced("history", by=7),
    "losses of another run": replaced("history", "losses", by=[1.0]),
    "losses are a number": replaced("history", "losses", by=1),
    "a loss is a text": replaced("history", "losses", 3, by="low"),
    "a loss is an object": replaced("history", "losses", 3, by={}),
    "held-out steps are texts": replaced("history", "heldout", by={"first": 1.0}),
    "held-out is a list": replaced("history", "heldout", by=[1]),
    "no judgement": replaced("history", "before", by=None),
    "another judgement": replaced("history", "before", by={"answers": [], "lost": 1}),
    "answers are a number": replaced("history", "before", "answers", by=1),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_23_forged_progress_is_refused(finished, root, newest, change):
    out = root.parent
    forge(newest, change)
    options = parse(Options, finished.words("--resume", "--out", str(out))[1:], "train", None)
    with pytest.raises(InputError, match=r"progress\.json"):
        checkpoint_of(options, {}, Console(quiet=True))


@pytest.mark.parametrize("position", [{}, {"next_index": "x"}, {"next": [1]}], ids=str)
def test_23_a_forged_position_in_the_data_is_refused(finished, tmp_path, capsys, position):
    out = Path(shutil.copytree(finished.out, tmp_path / "run"))
    newest = checkpoint.latest(out / "checkpoints").directory
    forge(newest, replaced("batches", by=position))
    assert main(finished.words("--resume", "--out", str(out))) == 2
    assert "progress.json" in capsys.readouterr().err
