"""A small MiniMind here and in torch, with one adapter."""

from typing import NamedTuple

import jax
import numpy as np
import torch

import lora_jax as lora
from interop import adapter_formats, torch_lora
from interop.adapter_plan import from_plan
from interop.conversion import to_torch
from interop.families import keymap_of
from interop.torch_lora_files import load_adapter
from lora_jax.models.config import DecoderConfig

from minimind_adapter import apply_lora
from minimind_options import Options, model_config
from minimind_torch import MiniMind
from minimind_training import fresh_params

SMALL = {"dim": 64, "vocab_size": 700, "max_seq_len": 160}


def options(**given):
    return Options(**{**SMALL, **given})


class Start(NamedTuple):
    """The same adapted model on both sides."""

    config: DecoderConfig
    params: dict
    plan: lora.Plan
    adapter: dict
    theirs: MiniMind


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)


def spread_out(adapter, spread=0.1):
    """The adapter with every value moved, so that B is not zero."""
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + spread * noise.normal(size=x.shape).astype("f4"), adapter)


def torch_model(config, params):
    said = {"dim": config.hidden_size, "vocab_size": config.vocab_size}
    model = MiniMind(**said, use_moe=config.experts is not None)
    names = to_torch(jax.tree.map(np.asarray, params), keymap_of(config))
    state = {name: torch.from_numpy(np.array(array)) for name, array in names.items()}
    model.load_state_dict({**state, "output.weight": state["tok_embeddings.weight"]})
    return model


def started(said, tmp_path, *, spread=0.0):
    """Both sides adapted, with the adapter handed over in MiniMind's own file."""
    config = model_config(said)
    params = fresh_params(jax.random.key(3), config)
    plan, adapter = apply_lora(config, params, said)
    adapter = spread_out(adapter, spread)
    theirs = torch_model(config, params)
    names = torch_lora.apply_lora(theirs, torch_lora.square, rank=said.rank)
    assert names == [f"layers.{n}.attention.{w}" for n in range(2) for w in ("wq", "wo")]
    path = tmp_path / "lora.pth"
    file = from_plan(adapter, plan, keymap_of(config), params=params)
    adapter_formats.write(path, file, "minimind")
    load_adapter(theirs, path, "minimind")
    return Start(config, params, plan, adapter, theirs)
