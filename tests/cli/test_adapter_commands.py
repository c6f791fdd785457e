"""import, export, inspect and diff: adapters of every format, from the command line."""

import json
import os
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest

import lora_jax as lora
from interop import hf, peft, torch_io
from interop.adapter_formats import FORMATS
from interop.hf_config import from_attributes
from interop.tokenizer import byte_tokenizer
from lora_jax.cli.adapter_bases import load_adapter_base
from lora_jax.cli.main import main

from small_models import random_params

LINEARS = ".*_proj/kernel"
ROLES = {".*layers.*kernel": "stack in out", ".*": "in out"}
# What tiny's layers are called by each format, and how its files end.
OUTPUTS = {
    "peft": "",
    "gguf": ".gguf",
    "mlx": "",
    "loralib": ".pth",
    "lora_layer": ".pt",
    "kohya": ".safetensors",
    "torchtune": ".safetensors",
    "minimind": ".pth",
}
TOLD = ("loralib", "lora_layer", "torchtune")
"""Formats that hold no alpha."""


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def base():
    return load_adapter_base("tiny")


def write(directory, base, *, roles=ROLES, **changes):
    """An adapter with random factors on tiny, as a PEFT directory."""
    config = lora.LoraConfig(**{"rank": 4, "alpha": 6, "targets": LINEARS, **changes})
    plan = lora.plan_from_axes(base.params, config, roles)
    adapter = lora.init(jax.random.key(0), base.params, plan)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    adapter = {
        path: entry._replace(
            b=0.02
            * jax.random.normal(next(keys), entry.b.shape)
            * (entry.a != 0).any(-2)[..., None]  # no more than a layer's own rank
        )
        for path, entry in adapter.items()
    }
    about = {"keymap": base.keymap, "params": base.params, "base": base.about}
    peft.write(directory, adapter, plan, **about)
    return directory


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    return write(tmp_path_factory.mktemp("plain") / "adapter", base)


@pytest.fixture(scope="module")
def square(base, tmp_path_factory):
    """What MiniMind's files can hold: square layers alone."""
    return write(tmp_path_factory.mktemp("square") / "adapter", base, targets=".*/[qo]_proj/kernel")


@pytest.fixture(scope="module")
def mixed(base, tmp_path_factory):
    """Ranks and scales that differ by layer and by weight."""
    targets = (lora.Rule(".*mlp.*kernel", rank=(2, 6), alpha=9), LINEARS)
    return write(tmp_path_factory.mktemp("mixed") / "adapter", base, targets=targets)


@pytest.mark.parametrize("format", OUTPUTS)
def test_what_is_exported_is_the_same_when_it_is_imported(
    format, plain, square, mixed, tmp_path, capsys
):
    source = {"minimind": square, "lora_layer": plain}.get(format, mixed)
    out, back = tmp_path / f"out{OUTPUTS[format]}", tmp_path / "back"
    assert run("export", source, out, "--format", format) == 0
    alpha = ("--alpha", 6) if format in TOLD and source is not mixed else ()
    if format in TOLD and not alpha:
        printed = capsys.readouterr().out
        alpha = ("--alpha", printed.partition("alpha=")[2].split()[0].rstrip(","))
    assert run("import", out, back, "--model", "tiny", *alpha) == 0
    assert run("diff", source, back) == 0
    assert run("diff", source, out, "--model", "tiny", *alpha) == 0
    assert "same" in capsys.readouterr().out
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run("export", source, out, "--format", format) == 2
    assert run("import", out, back, "--model", "tiny", *alpha) == 2
    assert "already exists" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_every_format_that_can_be_written_is_tried():
    pipelines = {"diffusers"}  # of components that no language model has
    assert set(OUTPUTS) - {"peft", "gguf"} == {n for n, f in FORMATS.items() if f.write} - pipelines


def test_an_import_computes_what_the_file_holds(base, plain, tmp_path):
    """The weights with the update, formed by hand from the file."""
    file = tmp_path / "a.pth"
    assert run("export", plain, file, "--format", "loralib") == 0
    assert run("import", file, tmp_path / "back", "--model", "tiny", "--alpha", 12) == 0
    adapter, plan = peft.read(tmp_path / "back", base.params, keymap=base.keymap)
    merged = lora.merge(base.params, adapter, plan)["layers"]["self_attn"]["q_proj"]["kernel"]
    tensors = torch_io.read(file)
    name = "model.layers.1.self_attn.q_proj.lora_"
    update = 12 / 4 * tensors[f"{name}B"] @ tensors[f"{name}A"]
    stored = base.params["layers"]["self_attn"]["q_proj"]["kernel"][1]
    np.testing.assert_allclose(merged[1], stored + update.T, atol=1e-6)
    assert np.abs(update).max() > 1e-2


def test_serving_folds_and_says_so(mixed, tmp_path, capsys):
    assert run("export", mixed, tmp_path / "served", "--for-serving") == 0
    printed = capsys.readouterr().out
    assert "filled up with zeros to 6" in printed
    assert "multiplied into B" in printed
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert run("diff", mixed, tmp_path / "served") == 0
    assert "rank differs in" in capsys.readouterr().out


FAULTS = {
    "no such source": (("export", "{here}/none", "{here}/out"), "none: no such file or directory"),
    "an empty source": (("export", "{here}", "{here}/out"), "is empty: name an adapter file"),
    "no such format": (("export", "{plain}", "{here}/out", "--format", "ggml"), "there are peft,"),
    "no model": (("import", "{file}", "{here}/out"), "give --model"),
    "a name of PEFT's": (("import", "{named}", "{here}/out"), "names the base 'org/model', and no"),
    "no such model": (("import", "{file}", "{here}/out", "--model", "tinny"), "did you mean tiny"),
    "no alpha": (("import", "{file}", "{here}/out", "--model", "tiny"), "don't hold alpha"),
    "another base": (("export", "{plain}", "{here}/out", "--model", "{other}"), "another base"),
    "no parent": (("export", "{plain}", "{here}/a/b"), "{here}/a: no such directory"),
    "serving of gguf": (("export", "{plain}", "{here}/out.gguf", "--format", "gguf",
                         "--for-serving"), "--for-serving goes with --format peft"),
    "bfloat16 gguf": (("export", "{plain}", "{here}/o.gguf", "--format", "gguf", "--dtype",
                       "bfloat16"), "--dtype bfloat16"),
    "gguf by no such name": (("export", "{plain}", "{here}/o.bin", "--format", "gguf"), "in .gguf"),
    "half a peft": (("export", "{plain}", "{here}/o", "--dtype", "float16"), "--dtype is float32"),
    "oblong minimind": (("export", "{plain}", "{here}/o.pth", "--format", "minimind"),
                        "square layers alone, not 'model.layers.0"),
    "no suffix": (("export", "{plain}", "{here}/o", "--format", "loralib"), "can't write tensors"),
    "parts named twice": (("import", "{file}", "{here}/out", "--model", "tiny", "--merged-linear",
                           "c_attn=101", "c_attn=110"), "--merged-linear names twice: c_attn"),
    "merged parts": (("import", "{file}", "{here}/out", "--model", "tiny", "--merged-linear",
                      "c_attn=102"), "expected such as c_attn=101"),
    "a text": (("inspect", "{here}/../notes.txt"), "can't read tensors from this"),
    "a path": (("inspect", "{here}/none"), "no such file or directory"),
    "a directory": (("inspect", "{here}"), "holds none of"),
    "its alpha": (("inspect", "{file}"), "don't hold alpha"),
    "rotary of peft": (("export", "{plain}", "{here}/out", "--rotary", "halves"),
                       "--rotary goes with --format torchtune, not with peft"),
    "rotary of loralib": (("import", "{file}", "{here}/out", "--model", "tiny", "--alpha", "4",
                           "--rotary", "halves"), "rotary='halves' says nothing of loralib"),
    "parts of gguf": (("import", "{gguf}", "{here}/out", "--model", "tiny", "--merged-linear",
                       "c_attn=101"), "says nothing of gguf: it goes with loralib"),
    "alpha of peft": (("export", "{plain}", "{here}/out", "--alpha", "4"),
                      "alpha=4.0 says nothing of peft"),
    "alpha to look at": (("inspect", "{plain}", "--alpha", "4"), "says nothing of peft"),
    "alpha to compare": (("diff", "{plain}", "{plain}", "--alpha", "4"),
                         "says nothing of peft or peft"),
    "a wrong format": (("inspect", "{file}", "--format", "peft"), "is no peft adapter"),
    "gguf beside peft": (("diff", "{plain}", "{gguf}"), "give --model"),
    "nothing to convert": (("bench", "convert", "--megabytes", "0"), "--megabytes 0: at least 1"),
    "no such disk": (("bench", "convert", "--directory", "{here}/a"), "a: no such directory"),
    "a tolerance": (("diff", "{plain}", "{plain}", "--tolerance", "-1"), "--tolerance -1.0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    assert run("export", plain, folder / "a.pth", "--format", "loralib") == 0
    assert run("export", plain, folder / "a.gguf", "--format", "gguf") == 0
    other, named = folder / "other", folder / "named"
    assert run("merge", plain, other, "--model", "tiny") == 0
    named.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/model"}
    (named / "adapter_config.json").write_text(json.dumps(config))
    files = {"file": folder / "a.pth", "gguf": folder / "a.gguf"}
    return {"plain": plain, "other": other, "named": named, **files}


@pytest.mark.parametrize(("words", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_bad_input_is_refused_and_nothing_is_written(words, fault, places, tmp_path, capsys):
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "notes.txt").write_text("not an adapter")
    known = {**places, "here": here}
    capsys.readouterr()
    assert run(*(word.format(**known) for word in words)) == 2
    error = capsys.readouterr().err
    assert fault.format(**known) in error
    assert "Traceback" not in error
    assert list(here.iterdir()) == []


def printed_json(capsys, *words):
    capsys.readouterr()
    status = run(*words, "--form", "json")
    return status, json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_inspect_shows_numbers_of_the_update(base, mixed, capsys):
    status, found = printed_json(capsys, "inspect", mixed)
    assert (status, found["format"], found["base"]) == (0, "peft", "tiny")
    adapter, plan = peft.read(mixed, base.params, keymap=base.keymap)
    by_name = {module["name"]: module for module in found["modules"]}
    assert len(by_name) == 14
    assert found["parameters"] == sum(module["parameters"] for module in by_name.values())
    path, site = "layers/mlp/up_proj/kernel", plan["layers/mlp/up_proj/kernel"]
    for layer in (0, 1):
        module = by_name[f"model.layers.{layer}.mlp.up_proj"]
        assert (module["rank"], module["scale"]) == (site.ranks[layer], site.scale[layer])
        dense = site.scale[layer] * adapter[path].a[layer] @ adapter[path].b[layer]
        values = np.linalg.svd(np.asarray(dense, np.float64), compute_uv=False)[: module["rank"]]
        np.testing.assert_allclose(module["singular_values"], values, rtol=1e-4)
        np.testing.assert_allclose(module["norm_delta"], np.linalg.norm(dense), rtol=1e-5)
    assert any("rank_pattern and alpha_pattern: vLLM" in note for note in found["notes"])


def test_inspect_takes_a_run_and_groups_layers(plain, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    os.symlink(plain, tmp_path / "run" / "adapter")
    assert run("inspect", tmp_path / "run") == 0
    grouped = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj (2)" in grouped
    assert "14 modules, rank 4, scale 1.5" in grouped
    assert run("inspect", tmp_path / "run", "--every") == 0
    assert "model.layers.1.mlp.up_proj " in capsys.readouterr().out


@pytest.mark.parametrize("format", ["gguf", "mlx", "kohya", "minimind"])
def test_inspect_takes_other_formats(format, square, tmp_path, capsys):
    out = tmp_path / f"out{OUTPUTS[format]}"
    assert run("export", square, out, "--format", format) == 0
    _, ours = printed_json(capsys, "inspect", square)
    _, theirs = printed_json(capsys, "inspect", out)
    assert theirs["format"] == format
    norms = [sorted(module["norm_delta"] for module in each["modules"]) for each in (ours, theirs)]
    np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.parametrize("format", ["torchtune", "loralib"])
def test_inspect_and_diff_are_told_alpha(format, plain, tmp_path, capsys):
    """Rows of q and k are in an order of torchtune's own, on which no number here depends."""
    out = tmp_path / f"out{OUTPUTS[format]}"
    assert run("export", plain, out, "--format", format) == 0
    _, ours = printed_json(capsys, "inspect", plain)
    _, theirs = printed_json(capsys, "inspect", out, "--alpha", 6)
    for key in ("rank", "scale", "norm_delta", "effective_rank"):
        values = [sorted(module[key] for module in each["modules"]) for each in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-5)
    model = ("--model", "tiny") if format == "torchtune" else ()
    assert run("diff", plain, out, "--alpha", 6, *model) == 0


def changed(source, target, change=lambda tensors: {}, **config):
    """A copy of a PEFT directory with other tensors and config, and without its manifest."""
    target.mkdir()
    tensors = torch_io.read(source / peft.WEIGHTS)
    torch_io.write(target / peft.WEIGHTS, {**tensors, **change(tensors)})
    content = json.loads((source / peft.CONFIG).read_text())
    (target / peft.CONFIG).write_text(json.dumps({**content, **config}))
    return target


def test_what_to_know_of_a_peft_directory_is_printed(plain, tmp_path, capsys):
    idle = changed(plain, tmp_path / "idle", target_modules=[r"q_proj", "nowhere"])
    weights = torch_io.read(idle / peft.WEIGHTS)
    kept = {name: np.array(tensor) for name, tensor in weights.items() if ".q_proj." in name}
    torch_io.write(idle / peft.WEIGHTS, kept)
    assert run("import", idle, tmp_path / "back", "--model", "tiny") == 0
    assert "note: target_modules: 'nowhere' match nothing" in capsys.readouterr().out


def test_a_folder_adapter_does_not_replace_the_directorys_own(plain, square, tmp_path, capsys):
    own = changed(plain, tmp_path / "own")
    changed(square, own / "adapter")
    assert run("export", own, tmp_path / "out", "--format", "peft", "--model", "tiny") == 0
    assert run("diff", plain, tmp_path / "out") == 0
    assert run("diff", square, tmp_path / "out") != 0
    capsys.readouterr()


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
WARNINGS = {
    "values that are not finite": (lambda t: {f"{Q}A.weight": t[f"{Q}A.weight"] * np.nan}, {}),
    "a B of zeros": (lambda t: {f"{Q}B.weight": t[f"{Q}B.weight"] * 0}, {}),
    "an A of zeros": (lambda t: {f"{Q}A.weight": t[f"{Q}A.weight"] * 0}, {}),
    "a scale outside": (lambda t: {}, {"lora_alpha": 400}),
    "10 times the median": (lambda t: {f"{Q}B.weight": t[f"{Q}B.weight"] * 100}, {}),
    "whole weights": (
        lambda t: {"base_model.model.lm_head.weight": np.ones((9, 4), "f4")},
        {"modules_to_save": ["lm_head"]},
    ),
    "weights that its config doesn't train": (
        lambda t: {"base_model.model.lm_head.weight": np.ones((9, 4), "f4")}, {}
    ),
    "ranks that differ from the config's": (lambda t: {}, {"r": 8}),
    "that are no targets": (lambda t: {}, {"target_modules": ["k_proj"]}),
    "use_rslora": (lambda t: {}, {"use_rslora": True}),
    "pissa, not converted": (lambda t: {}, {"init_lora_weights": "pissa"}),
    "it can't be used here: init_lora_weights": (lambda t: {}, {"init_lora_weights": "corda"}),
}  # fmt: skip


@pytest.mark.parametrize("word", WARNINGS)
def test_inspect_warns(word, plain, tmp_path, capsys):
    assert run("inspect", plain) == 0
    assert word not in capsys.readouterr().out
    change, config = WARNINGS[word]
    assert run("inspect", changed(plain, tmp_path / "odd", change, **config)) == 0
    assert word in capsys.readouterr().out


def test_inspect_finds_a_flipped_bit(plain, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in plain.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = bytearray((copy / peft.WEIGHTS).read_bytes())
    weights[-5] ^= 1
    (copy / peft.WEIGHTS).write_bytes(weights)
    assert run("inspect", copy) == 2
    assert "adapter_model.safetensors is" in capsys.readouterr().err


LIGHT = """
import sys
from lora_jax.cli.main import main
status = main(sys.argv[1:])
print([name for name in ("jax", "torch", "flax", "transformers") if name in sys.modules], status)
"""


def test_inspect_answers_in_half_a_second_without_jax_or_torch(tmp_path):
    """On 210 modules of rank 16, as SmolLM2-135M has them; time is the process's own."""
    rng = np.random.default_rng(0)
    sizes = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    sizes |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    tensors = {}
    for layer, (name, (rows, columns)) in ((i, each) for i in range(30) for each in sizes.items()):
        module = f"base_model.model.model.layers.{layer}.{name}_proj"
        tensors[f"{module}.lora_A.weight"] = rng.normal(size=(16, rows)).astype("f4")
        tensors[f"{module}.lora_B.weight"] = rng.normal(size=(columns, 16)).astype("f4")
    torch_io.write(tmp_path / peft.WEIGHTS, tensors)
    targets = [f"{name}_proj" for name in sizes]
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": targets}
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", LIGHT, "inspect", str(tmp_path)]
        printed = subprocess.check_output(command, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert printed.splitlines()[-1] == "[] 0"
    assert "210 modules, rank 16, scale 2" in printed
    assert min(seconds) < 0.5, seconds


def test_diff_names_what_differs(plain, tmp_path, capsys):
    changes = {
        "scaled": (lambda t: {f"{Q}B.weight": t[f"{Q}B.weight"] * 1.1}, {}, 0.1 / 1.1),
        "turned": (lambda t: {f"{Q}B.weight": -t[f"{Q}B.weight"]}, {}, 2.0),
        "broken": (lambda t: {f"{Q}B.weight": t[f"{Q}B.weight"] * np.inf}, {}, None),
    }
    cosines = {"scaled": 1.0, "turned": -1.0, "broken": None}
    for name, (change, config, relative) in changes.items():
        other = changed(plain, tmp_path / name, change, **config)
        status, found = printed_json(capsys, "diff", plain, other)
        worst = max(found["modules"], key=lambda module: module["worst"] or np.inf)
        assert (status, found["same"]) == (1, False)
        assert worst["name"] == "model.layers.0.self_attn.q_proj"
        assert worst["relative"] == (relative and pytest.approx(relative, rel=1e-4))
        assert worst["cosine"] == (cosines[name] and pytest.approx(cosines[name]))
    assert run("diff", plain, tmp_path / "scaled", "--tolerance", 0.1) == 0
    assert run("diff", plain, tmp_path / "scaled") == 1
    assert "differ: 1 of 14 beyond 1e-06" in capsys.readouterr().out


def test_diff_sees_the_largest_entry_of_the_difference(base, plain, tmp_path, capsys):
    other = changed(plain, tmp_path / "b", lambda t: {f"{Q}B.weight": t[f"{Q}B.weight"] * 1.1})
    _, found = printed_json(capsys, "diff", plain, other)
    tensors = torch_io.read(plain / peft.WEIGHTS)
    update = 1.5 * tensors[f"{Q}B.weight"] @ tensors[f"{Q}A.weight"]
    largest = max(module["largest"] for module in found["modules"])
    assert largest == pytest.approx(0.1 * np.abs(update).max(), rel=1e-4)


def test_diff_of_other_modules_and_of_magnitudes(base, plain, square, tmp_path, capsys):
    status, found = printed_json(capsys, "diff", plain, square)
    alone = [module["name"] for module in found["modules"] if module["only_in"] == "a"]
    assert (status, len(alone)) == (1, 10)
    assert "10 modules only in the first" in found["verdict"]
    dora = write(tmp_path / "dora", base, targets=(lora.Rule(LINEARS, variant="dora"),))
    assert run("diff", dora, dora) == 0
    assert run("diff", dora, plain) == 1
    name = f"{Q}magnitude_vector"
    moved = changed(dora, tmp_path / "moved", lambda t: {name: t[name] * 2})
    status, found = printed_json(capsys, "diff", dora, moved)
    assert [m["others"] for m in found["modules"] if m["worst"] > 0.1] == [{"magnitude": 0.5}]


def test_a_base_relates_pefts_experts_to_those_of_other_formats(tmp_path, capsys):
    attributes = {
        "model_type": "mixtral", "vocab_size": 260, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 3, "max_position_embeddings": 32,
    }  # fmt: skip
    config, model = from_attributes(attributes), tmp_path / "mixtral"
    hf.write(model, config, random_params(config), tokenizer=byte_tokenizer().tokenizer)
    mixture = load_adapter_base(str(model))
    source = write(
        tmp_path / "peft",
        mixture,
        roles={".*experts.*": "stack stack in out", **ROLES},
        rank=2,
        targets=".*(q_proj/kernel|mlp/gate/.*|experts/.*)",
    )
    out, back = tmp_path / "mlx", tmp_path / "back"
    assert run("export", source, out, "--format", "mlx") == 0
    assert run("diff", source, out) == 1
    assert run("diff", source, out, "--model", model) == 0
    assert run("import", out, back, "--model", model) == 0
    assert run("diff", source, back) == 0
    moved = changed(source, tmp_path / "moved", lambda t: {n: 2 * t[n] for n in t if "lora_A" in n})
    assert run("diff", moved, out, "--model", model) == 1


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", "\x1b[31mred", "a\nb", "🦙.é"])
def test_names_of_modules_are_text_and_nothing_else(name, plain, tmp_path, capsys):
    def renamed(tensors):
        return {f"{name}.lora_{f}.weight": tensors[f"{Q}{f}.weight"] * 3 for f in "AB"}

    odd = changed(plain, tmp_path / "odd", renamed, base_model_name_or_path=name)
    for words, status in ((("inspect", odd), 0), (("diff", plain, odd), 1)):
        assert run(*words) == status
        assert run(*words, "--form", "json") == status
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        assert name.encode("unicode_escape").decode() in printed or name in printed
