"""mlx-lm's directories: its documented maths in NumPy; with ``mlx-lm`` installed, its own code."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from interop.adapter_file import FileAdapter
from interop.adapter_format import BaseModule, Given
from interop.adapter_formats import read, write
from interop.adapter_plan import base_modules, from_plan, to_plan
from interop.keymaps import Keymap, Rule

from module_cases import pair

TABLE = Keymap(
    (
        Rule("embed", "model.embed_tokens.weight", (), "embedding"),
        Rule("q", "model.layers.{i}.self_attn.q_proj.weight", (1, 0), "linear"),
        Rule("up", "model.layers.{i}.mlp.experts.{e}.up_proj.weight", (1, 0), "linear"),
    ),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
)
SHAPES = {"embed": (11, 8), "q": (2, 8, 6), "up": (2, 3, 8, 5)}
SWITCH = "model.layers.{}.mlp.switch_mlp.up_proj"


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def directory(path, tensors, config):
    """An adapter directory as mlx-lm leaves it."""
    path.mkdir()
    save_file(tensors, path / "adapters.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def config(kind="lora", **settings):
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.0} | settings
    return {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}


def tensors_of_all_kinds(dora=False):
    """A and B of an embedding, of linears and of switched ones, with mlx's axes."""
    rng = np.random.default_rng(1)
    shapes = {
        f"model.layers.{i}.self_attn.q_proj.{name}": shape
        for i in range(2)
        for name, shape in {"lora_a": (8, 3), "lora_b": (3, 6), "m": (6,)}.items()
    }
    if not dora:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(".m")}
        shapes |= {"model.embed_tokens.lora_a": (11, 3), "model.embed_tokens.lora_b": (3, 8)}
        for i in range(2):
            shapes[f"{SWITCH.format(i)}.lora_a"] = (3, 3, 8)
            shapes[f"{SWITCH.format(i)}.lora_b"] = (3, 5, 3)
    return {name: rng.normal(size=s).astype(np.float32) / 4 for name, s in shapes.items()}


def effective(params, tensors, scale):
    """The weights that mlx-lm's layers have, here in the axes of our leaves."""
    found = {}
    q = "model.layers.{}.self_attn.q_proj.{}"
    for i in range(2):
        a, b = (tensors[q.format(i, name)] for name in ("lora_a", "lora_b"))
        weight = np.asarray(params["q"][i]).T + (scale * b.T) @ a.T
        if (m := tensors.get(q.format(i, "m"))) is not None:
            weight = (m / np.linalg.norm(weight, axis=1))[:, None] * weight
        found["q", i] = weight.T
    if "model.embed_tokens.lora_a" in tensors:
        a, b = (tensors[f"model.embed_tokens.{name}"] for name in ("lora_a", "lora_b"))
        found["embed",] = np.asarray(params["embed"]) + scale * a @ b
        for i, e in np.ndindex(2, 3):
            a, b = (tensors[f"{SWITCH.format(i)}.{name}"][e] for name in ("lora_a", "lora_b"))
            found["up", i, e] = np.asarray(params["up"][i, e]) + (scale * b @ a).T
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_directories_of_mlx_compute_what_it_computes(dora, params, tmp_path):
    tensors = tensors_of_all_kinds(dora)
    source = directory(tmp_path / "mlx", tensors, config("dora" if dora else "lora"))
    adapter, plan = to_plan(read(source, Given(base=base_modules(params, TABLE))), params, TABLE)
    merged = lora.merge(params, adapter, plan)
    for (path, *index), expected in effective(params, tensors, 20.0).items():
        assert np.abs(expected - params[path][tuple(index)]).max() > 0.1
        np.testing.assert_allclose(merged[path][tuple(index)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_written_for_mlx_is_what_it_reads(dora, params, tmp_path):
    tensors = tensors_of_all_kinds(dora)
    source = directory(tmp_path / "mlx", tensors, config("dora" if dora else "lora"))
    given = Given(base=base_modules(params, TABLE))
    adapter, plan = to_plan(read(source, given), params, TABLE)
    file = from_plan(adapter, plan, TABLE, params=params)
    assert not write(tmp_path / "back", file, "mlx", given)
    stored = load_file(tmp_path / "back" / "adapters.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(np.array_equal(stored[name], tensors[name]) for name in stored)
    own = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert own["fine_tune_type"] == ("dora" if dora else "lora")
    assert own["lora_parameters"]["scale"] == 20.0
    keys = {"self_attn.q_proj"} if dora else {
        "self_attn.q_proj", "mlp.switch_mlp.up_proj", "model.embed_tokens"
    }  # fmt: skip
    assert {*own["lora_parameters"]["keys"]} == keys


def test_ranks_and_scales_that_differ_are_folded(params, tmp_path):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    modules = {names[0]: pair(3, (8,), 6, 1.5), "lm_head": pair(3, (8,), 11, 1.5),
               names[1]: pair(2, (8,), 6, 0.5)}  # fmt: skip
    notes = write(tmp_path / "mlx", FileAdapter("mine", modules), "mlx")
    assert notes == (
        f"filled up with zeros to rank 3: '{names[1]}'",
        f"scale multiplied into B: '{names[1]}'",
    )
    again = read(tmp_path / "mlx")
    for name, module in modules.items():
        found = again.modules[name]
        np.testing.assert_allclose(
            found.scale * found.b @ found.a, module.scale * module.b @ module.a, 1e-5, 1e-6
        )
    write(tmp_path / "one", FileAdapter("mine", {names[1]: modules[names[1]]}), "mlx")
    own = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert own["lora_parameters"]["keys"] == [names[1]]


def test_mixtrals_experts_have_their_own_names(tmp_path):
    block = "model.layers.0.block_sparse_moe"
    modules = {f"{block}.experts.{e}.{w}": pair(2, (4,), 4) for e in (0, 2) for w in ("w1", "w2")}
    names = [f"{block}.experts.{e}.{w}" for e in range(5) for w in ("w1", "w2", "w3")]
    given = Given(base={name: BaseModule("linear", (4, 4)) for name in names})
    write(tmp_path / "mlx", FileAdapter("mine", modules), "mlx", given)
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert stored[f"{block}.switch_mlp.gate_proj.lora_a"].shape == (5, 2, 4)
    assert not stored[f"{block}.switch_mlp.down_proj.lora_b"][[1, 3, 4]].any()
    again = read(tmp_path / "mlx").modules
    assert {*modules} < {*again}
    assert all(np.array_equal(again[name].b, module.b) for name, module in modules.items())


def test_experts_that_cannot_be_counted_are_refused(tmp_path):
    block = "model.layers.{}.mlp.experts.{}.up_proj"
    gap = {block.format(0, e): pair(2, (4,), 4) for e in (0, 2)}
    shorter = {block.format(0, e): pair(2, (4,), 4) for e in (0, 1)}
    longer = {block.format(1, e): pair(2, (4,), 4) for e in (0, 1, 2)}
    for modules, number in ((gap, 1), (shorter | longer, 2)):
        with pytest.raises(lora.InputError, match=rf"0\.mlp\.switch_mlp\.up_proj' lacks experts "
                           rf"{number} of 3 at least: give the base"):  # fmt: skip
            write(tmp_path / "mlx", FileAdapter("mine", modules), "mlx")
    base = {name: BaseModule("linear", (4, 4)) for name in shorter}
    with pytest.raises(lora.InputError, match=r"the base has no experts '.*experts\.2\.up_proj'"):
        write(tmp_path / "mlx", FileAdapter("mine", gap), "mlx", Given(base=base))


def test_a_full_fine_tune_is_read_and_written_whole(params, tmp_path):
    rng = np.random.default_rng(0)
    whole = {f"model.layers.{i}.self_attn.q_proj.weight": rng.normal(size=(6, 8)) for i in range(2)}
    whole = {name: array.astype(np.float32) for name, array in whole.items()}
    source = directory(tmp_path / "mlx", whole, {"fine_tune_type": "full"})
    adapter, plan = to_plan(read(source), params, TABLE)
    merged = lora.merge(params, adapter, plan)
    assert np.array_equal(merged["q"][1].T, whole["model.layers.1.self_attn.q_proj.weight"])
    write(tmp_path / "back", from_plan(adapter, plan, TABLE, params=params), "mlx")
    stored = load_file(tmp_path / "back" / "adapters.safetensors")
    assert all(np.array_equal(stored[name], array) for name, array in whole.items())


def test_gpt2_has_the_names_and_the_axes_of_mlxs_model(tmp_path):
    """mlx-lm skips what its model doesn't have, so other names would be an adapter of nothing."""
    modules = {f"transformer.h.{i}.attn.c_attn": pair(2, (4,), 12) for i in range(2)}
    modules["transformer.wte"] = pair(2, (9,), 4, kind="embedding")
    write(tmp_path / "mlx", FileAdapter("mine", modules), "mlx")
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert stored["model.h.1.attn.c_attn.lora_a"].shape == (4, 2)
    assert all(name.startswith(("model.h.", "model.wte.")) for name in stored)
    keys = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    assert keys["keys"] == ["model.h.0.attn.c_attn", "model.h.1.attn.c_attn", "model.wte"]
    again = read(tmp_path / "mlx").modules
    assert {name: module.kind for name, module in again.items()} == {
        name: module.kind for name, module in modules.items()
    }
    square = {"transformer.h.0.attn.c_proj.weight": np.arange(16, dtype=np.float32).reshape(4, 4),
              "transformer.ln_f.weight": np.ones(4, np.float32)}  # fmt: skip
    write(tmp_path / "full", FileAdapter("mine", {}, square), "mlx")
    stored = load_file(tmp_path / "full" / "adapters.safetensors")
    assert stored["model.h.0.attn.c_proj.weight"][0].tolist() == [0, 4, 8, 12]
    again = read(tmp_path / "full").whole
    assert all(np.array_equal(again[name], array) for name, array in square.items())


A, B = "fc.lora_a", "fc.lora_b"
REFUSED = {
    "no scale": (config(scale=None), {A: (4, 3), B: (3, 4)}, "scale None, expected a finite"),
    "alpha in its place": (
        {"lora_parameters": {"rank": 3, "alpha": 6}}, {A: (4, 3), B: (3, 4)}, "scale None",
    ),
    "scale of words": (config(scale="20"), {A: (4, 3), B: (3, 4)}, "scale '20'"),
    "no parameters": ({"fine_tune_type": "lora"}, {A: (4, 3), B: (3, 4)}, "no lora_parameters"),
    "another type": (config("adalora"), {A: (4, 3), B: (3, 4)}, "fine_tune_type is 'adalora'"),
    "another rank": (config(rank=8), {A: (4, 3), B: (3, 4)}, "don't have the config's rank 8"),
    "the width for a rank": (config(rank=4), {A: (4, 3), B: (3, 4)}, "have the config's rank 4"),
    "the experts for a rank": (
        config(rank=5), {A: (5, 3, 4), B: (5, 4, 3)}, "don't have the config's rank 5",
    ),
    "dora without m": (config("dora"), {A: (4, 3), B: (3, 4)}, r"have no '\.m'"),
    "m without dora": (config(), {A: (4, 3), B: (3, 4), "fc.m": (4,)}, r"isn't dora.*have '\.m'"),
    "dora of a table": (
        config("dora"),
        {"wte.lora_a": (9, 3), "wte.lora_b": (3, 4), "wte.m": (9,)},
        "a magnitude for each token there",
    ),
    "axes": (config(), {A: (4, 3, 1, 1), B: (3, 4)}, "which don't fit"),
    "experts": (config(), {A: (5, 3, 4), B: (4, 4, 3)}, "which don't fit"),
    "half": (config(), {A: (4, 3)}, r"without '\.lora_b': 'fc'"),
    "more": (config(), {A: (4, 3), B: (3, 4), "fc.weight": (4, 4)}, "unexpected tensors: 'fc"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_mlx_directories_are_refused_for(case, tmp_path):
    settings, shapes, message = REFUSED[case]
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(lora.InputError, match=message):
        read(directory(tmp_path / "mlx", tensors, settings))


def test_what_mlx_directories_cannot_hold(tmp_path):
    modules = {"a": pair(2, (4,), 4, dora=True), "b": pair(2, (4,), 4),
               "wte": pair(2, (4,), 4, kind="embedding", dora=True),
               "c.experts.0.x": pair(2, (4,), 4, dora=True)}  # fmt: skip
    file = FileAdapter("mine", modules, {"norm.weight": np.ones(3)})
    with pytest.raises(lora.InputError) as caught:
        write(tmp_path / "mlx", file, "mlx")
    for part in ("not in 'a', 'wte'", "DoRA of tables: 'wte'", "experts: 'c.ex", "'norm.weight'"):
        assert part in str(caught.value)
    with pytest.raises(lora.InputError, match=r"mlx files can't hold 'c', which are of kinds"):
        write(tmp_path / "mlx", FileAdapter("x", {"c": pair(2, (4, 3), 4, kind="conv")}), "mlx")
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "mine.txt").write_text("keep")
    with pytest.raises(lora.InputError, match="already"):
        write(tmp_path / "mlx", FileAdapter("x", {"b": modules["b"]}), "mlx")


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_mlx_lm_itself_loads_what_is_written(dora, params, tmp_path):
    mx, nn = pytest.importorskip("mlx.core"), pytest.importorskip("mlx.nn")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    switch = pytest.importorskip("mlx_lm.models.switch_layers")

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.mlp = nn.Module(), nn.Module()
            self.self_attn.q_proj = nn.Linear(8, 6, bias=False)
            self.mlp.switch_mlp = nn.Module()
            self.mlp.switch_mlp.up_proj = switch.SwitchLinear(8, 5, 3, bias=False)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(11, 8)
            self.model.layers = [Layer(), Layer()]

        @property
        def layers(self):
            return self.model.layers

    model = Model()
    model.model.embed_tokens.weight = mx.array(np.asarray(params["embed"]))
    for i, layer in enumerate(model.layers):
        layer.self_attn.q_proj.weight = mx.array(np.asarray(params["q"][i]).T)
        layer.mlp.switch_mlp.up_proj.weight = mx.array(np.asarray(params["up"][i]).swapaxes(1, 2))
    source = directory(tmp_path / "mlx", tensors_of_all_kinds(dora),
                       config("dora" if dora else "lora"))  # fmt: skip
    given = Given(base=base_modules(params, TABLE))
    adapter, plan = to_plan(read(source, given), params, TABLE)
    write(tmp_path / "back", from_plan(adapter, plan, TABLE, params=params), "mlx")
    model = tuner.load_adapters(model, str(tmp_path / "back"))
    merged = jax.tree.map(np.asarray, lora.merge(params, adapter, plan))
    x = np.random.default_rng(3).normal(size=(4, 8)).astype(np.float32)
    for i, layer in enumerate(model.layers):
        ours = x @ merged["q"][i]
        assert np.abs(ours - x @ np.asarray(params["q"][i])).max() > 0.1
        np.testing.assert_allclose(np.array(layer.self_attn.q_proj(mx.array(x))), ours, 1e-3, 1e-4)
        if not dora:
            chosen = mx.array(np.array([[e] for e in (0, 1, 2, 0)]))
            found = layer.mlp.switch_mlp.up_proj(mx.array(x)[:, None, None], chosen)
            expected = np.stack([x[k] @ merged["up"][i, e] for k, e in enumerate((0, 1, 2, 0))])
            np.testing.assert_allclose(np.array(found).reshape(4, 5), expected, 1e-3, 1e-4)
    if not dora:
        table = model.model.embed_tokens
        np.testing.assert_allclose(np.array(table(mx.arange(11))), merged["embed"], 1e-3, 1e-4)
        head = np.array(table.as_linear(mx.array(x)))
        np.testing.assert_allclose(head, x @ merged["embed"].T, 1e-3, 1e-4)
