"""PEFT directories from a stranger: an InputError in a second, no code run, nothing written."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

import lora_jax as lora
from interop import peft, torch_io
from interop.peft import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from lora_jax.manifest import MANIFEST

from clocks import within
from peft_cases import edit_config, edit_tensors
from peft_table import CASES, KINDS, base_params, save_with_peft

SECONDS = 1.0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One of PEFT's own directories, with every kind of tensor that a plain network has."""
    directory = tmp_path_factory.mktemp("peft")
    case = CASES["linear, ranks and alphas"]
    save_with_peft(case._replace(config={**case.config, "use_dora": True}), directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def read(directory):
    return peft.read(directory, base_params("mlp"), keymap=KINDS["mlp"].keymap)


def refused(directory, *named, seconds=SECONDS):
    base_params("mlp")
    with pytest.raises(lora.InputError) as raised:
        within(seconds, lambda: read(directory))
    message = str(raised.value)
    assert len(message) < 4000
    assert all(part in message for part in named), message


HUGE = 10**9
CONFIGS = {
    "rank 0": (dict(r=0), "r is 0"),
    "negative rank": (dict(r=-1), "r is -1"),
    "a billion ranks": (dict(r=HUGE), f"({HUGE}, 12)"),
    "a truth for a rank": (dict(r=True), "r is True"),
    "a word for an alpha": (dict(lora_alpha="16"), "lora_alpha is '16'"),
    "no number": (dict(lora_alpha=float("nan")), "lora_alpha is nan"),
    "infinity": (dict(lora_alpha=float("inf")), "lora_alpha is inf"),
    "a long key": ({"x" * 100_000: 1}, "not known here"),
    "a long value": (dict(target_modules={"0": "y" * 100_000}), "module names or a pattern"),
    "many targets": (dict(target_modules=[f"x{i}" for i in range(90_000)]), "name no module"),
    "many ranks": (dict(rank_pattern={f"x{i}": 1 for i in range(60_000)}), "take over 0.5 s"),
    "many saved": (dict(modules_to_save=[f"x{i}" for i in range(60_000)]), "take over 0.5 s"),
    "many tokens": (
        dict(trainable_token_indices={"0": [*range(100_000)]}),
        "is no embedding table",
    ),
    "a bomb of memory": (dict(target_modules="(x{1,65000}){1,65000}"), "name no module"),
    "parentheses": (dict(target_modules="(" * 50_000), "is not a regular expression"),
    "no text": (dict(target_modules="\udc80"), "name no module"),
}


@pytest.mark.parametrize(("changes", "text"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_ask_for_too_much_or_nonsense_are_refused(directory, changes, text):
    edit_config(directory, **changes)
    refused(directory, text)


def test_a_config_of_a_gigabyte_is_refused_unread(directory):
    with open(directory / CONFIG, "wb") as file:
        file.truncate(1 << 30)
    refused(directory, CONFIG, "1073741824 bytes")


def test_a_key_that_is_there_twice_is_refused(directory):
    text = (directory / CONFIG).read_text()
    (directory / CONFIG).write_text(text.rstrip().removesuffix("}") + ', "r": 64}')
    refused(directory, "it has twice r")


NAMES = ("../../escape", "/etc/escape", "nul\0", "a\nb", "\x1b[2J", "x" * 10_000, "__metadata__x")


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_are_names_and_never_paths(directory, name):
    before = {*directory.parent.rglob("*")}
    edit_tensors(directory, lambda tensors: tensors.update({name: np.zeros(2, "f4")}))
    refused(directory, "unexpected")
    assert {*directory.parent.rglob("*")} == before


def test_a_hundred_thousand_tensors_are_refused_at_once(directory):
    more = {f"t{i}": np.zeros(1, "f4") for i in range(100_000)}
    edit_tensors(directory, lambda tensors: tensors.update(more))
    # Half of it is the file's header.
    refused(directory, "unexpected: t0, t1, t10", "99995 more")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing(directory, tmp_path):
    (directory / WEIGHTS).unlink()
    torch.save({"x": Payload(tmp_path / "ran")}, directory / PICKLED_WEIGHTS)
    refused(directory, PICKLED_WEIGHTS, "safely")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_link_to_somewhere_else_is_refused(directory, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text('{"password": 1}')
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(secret)
    refused(directory, name, "is a link to", "outside of")


def test_a_folder_that_is_a_link_out_is_refused(directory, tmp_path):
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "one").symlink_to(directory)
    with pytest.raises(lora.InputError, match="is a link to"):
        peft.read(tmp_path / "several", base_params("mlp"), keymap=KINDS["mlp"].keymap,
                  adapter_name="one")  # fmt: skip


def test_the_links_of_a_hubs_cache_are_followed(directory, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        (directory / name).rename(blobs / f"digest of {name}")
        (snapshot / name).symlink_to(f"../../blobs/digest of {name}")
    assert len(read(snapshot)[1]) == 3


def test_a_link_is_not_written_through(directory, tmp_path):
    adapter, plan = read(directory)
    (tmp_path / "link").symlink_to(directory)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(lora.InputError, match="is a symbolic link"):
        peft.write(tmp_path / "link", adapter, plan, keymap=KINDS["mlp"].keymap,
                   params=base_params("mlp"), overwrite=True)  # fmt: skip
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


KEYS = [*json.loads(json.dumps(LoraConfig(target_modules=["0"]).to_dict(), default=str))]
WORDS = st.sampled_from(["0", "2", "4", "all", "pissa", "olora", "", ".*", "(", "\0", "layers"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | WORDS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=4,
)
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def read_or_refused(directory):
    try:
        read(directory)
    except lora.InputError:
        return False
    return True


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
@example({"lora_dropout": 0.5})
def test_configs_of_anything_are_read_or_refused(saved, tmp_path, changes):
    config = {**json.loads((saved / CONFIG).read_text()), **changes}
    shutil.copy(saved / WEIGHTS, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert read_or_refused(tmp_path) or {*changes} != {"lora_dropout"}


@FUZZ
@given(
    st.sampled_from([CONFIG, WEIGHTS]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
    st.floats(0, 1),
)
@example(WEIGHTS, [], 1.0)
def test_mutated_files_are_read_or_refused(saved, tmp_path, name, mutations, kept):
    for each in (CONFIG, WEIGHTS):
        shutil.copy(saved / each, tmp_path / each)
    content = bytearray((saved / name).read_bytes())
    for where, byte in mutations:
        content[int(where * len(content))] = byte
    kept = 1.0 if kept > 0.5 else kept
    (tmp_path / name).write_bytes(content[: int(kept * len(content))])
    assert read_or_refused(tmp_path) or mutations or kept < 1


TENSORS = {
    "wrong rank": lambda tensor: np.concatenate([tensor, tensor]),
    "another number of axes": lambda tensor: tensor[None],
    "no axes": lambda tensor: tensor.reshape(-1)[0],
    "none of it": lambda tensor: tensor[:0],
    "integers": lambda tensor: tensor.astype(np.int64),
    "truths": lambda tensor: tensor > 0,
    "not finite": lambda tensor: tensor * np.float32("nan"),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("end", ["0.lora_A.weight", "2.lora_B.weight", "4.lora_magnitude_vector"])
def test_tensors_of_another_form_are_named(directory, change, end):
    name = f"base_model.model.{end}"
    edit_tensors(directory, lambda tensors: tensors.update({name: change(tensors[name])}))
    refused(directory, name)


def test_the_directory_that_they_all_spoil_can_be_read(directory):
    assert len(read(directory)[1]) == 3
    assert len(torch_io.read(directory / WEIGHTS)) == 9
