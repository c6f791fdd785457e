"""A small Llama, adapters for it, and the same in transformers and PEFT."""

import functools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft as reference
import torch

import lora_jax as lora
from interop import hf, torch_io
from interop.peft import CONFIG, WEIGHTS
from lora_jax.manifest import MANIFEST
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder, init_params

DECODER = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, DECODER.vocab_size, (2, 24))
PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
Q, K = "layers/self_attn/q_proj/kernel", "layers/self_attn/k_proj/kernel"
Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def model_fn(params, tokens, decoder=DECODER):
    return Decoder(decoder).apply({"params": params}, tokens)[0]


@functools.cache
def base_params(decoder=DECODER):
    leaves = init_params(jax.random.key(0), decoder)
    # Larger projections, so that attention is not uniform.
    return jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim == 3 else leaf, leaves)


def planned(params, **config):
    axes = {"layers/.*": "stack in out", "(lm_head|embed_tokens)/.*": "in out"}
    return lora.plan_from_axes(params, lora.LoraConfig(**config), axes)


def trained(params, **config):
    """A plan and an adapter that is zero nowhere."""
    plan = planned(params, **config)
    rng = np.random.default_rng(1)

    def normal(std, shape):
        return jnp.asarray(rng.normal(0, std, shape), jnp.float32)

    return {
        s.path: lora.LoraPair(normal(0.1, s.a_shape), normal(0.2, s.b_shape)) for s in plan.sites
    }, plan


def moved(params, plan):
    """An adapter of any variants, of which every value was trained."""
    rng = np.random.default_rng(2)
    adapter = lora.init(jax.random.key(3), params, plan)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), adapter)
    adapter = lora.cast(adapter, jnp.float32)
    return {s.path: cut(adapter[s.path], s.ranks) if s.ranks else adapter[s.path]
            for s in plan.sites}  # fmt: skip


def cut(pair, ranks):
    """With zeros beyond each layer's rank."""
    inside = jnp.arange(pair.a.shape[-1]) < jnp.array(ranks)[:, None]
    return pair._replace(a=pair.a * inside[:, None, :], b=pair.b * inside[:, :, None])


def our_logits(params, adapter, plan, decoder=DECODER):
    adapted = lora.adapt(functools.partial(model_fn, decoder=decoder), plan)
    # Built in half the time and run in more: small models run once.
    options = {"xla_backend_optimization_level": 0}
    return np.asarray(jax.jit(adapted, compiler_options=options)(params, adapter, TOKENS))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def load_with_peft(params, directory, decoder=DECODER):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What PEFT calls in transformers, whatever the adapter.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return reference.PeftModel.from_pretrained(hf.to_transformers(decoder, params), directory)


def edit_config(directory, **changes):
    """As another program would: the manifest goes."""
    (directory / MANIFEST).unlink(missing_ok=True)
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    (directory / MANIFEST).unlink(missing_ok=True)
    tensors = {n: np.array(t) for n, t in torch_io.read(directory / WEIGHTS).items()}
    edit(tensors)
    torch_io.write(directory / WEIGHTS, tensors)


def save_with_peft(params, directory, config, decoder=DECODER, **kwargs):
    """A directory from PEFT, in whose adapter nothing is as it was at the start."""
    torch.manual_seed(0)
    config = reference.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference.get_peft_model(hf.to_transformers(decoder, params), config).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not re.search("lora_(embedding_)?[AB]", name):
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(directory, **{"save_embedding_layers": False, **kwargs})
    return model
