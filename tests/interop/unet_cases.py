"""Two components of a pipeline as a small tree: linear layers and a convolution."""

import jax.numpy as jnp
import numpy as np
import torch

from interop.keymaps import Keymap, Rule

UNET = Keymap((
    Rule("attn/to_q/kernel", "unet.mid_block.attn.to_q.weight", (1, 0), "linear"),
    Rule("attn/to_out/kernel", "unet.mid_block.attn.to_out.0.weight", (1, 0), "linear"),
    Rule("conv_in/kernel", "unet.conv_in.weight", (3, 2, 0, 1), "conv"),
    Rule("text/kernel", "text_encoder.layers.0.self_attn.q_proj.weight", (1, 0), "linear"),
))  # fmt: skip
FLAT = {
    "unet.mid_block.attn.to_q": "lora_unet_mid_block_attn_to_q",
    "unet.mid_block.attn.to_out.0": "lora_unet_mid_block_attn_to_out_0",
    "unet.conv_in": "lora_unet_conv_in",
    "text_encoder.layers.0.self_attn.q_proj": "lora_te_layers_0_self_attn_q_proj",
}
SHAPES = {"attn/to_q": (8, 6), "attn/to_out": (6, 8), "conv_in": (3, 3, 4, 5), "text": (6, 6)}


def unet_params():
    """Random parameters of the tree."""
    rng = np.random.default_rng(0)
    leaves = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
    return {
        "attn": {name: {"kernel": leaves[f"attn/{name}"]} for name in ("to_q", "to_out")},
        "conv_in": {"kernel": leaves["conv_in"]},
        "text": {"kernel": leaves["text"]},
    }


def torch_weights(params):
    """The base's weights by module, as torch has them."""
    conv = np.asarray(params["conv_in"]["kernel"]).transpose(3, 2, 0, 1)
    linears = (params["attn"]["to_q"], params["attn"]["to_out"], params["text"])
    q, out, text = (torch.tensor(np.asarray(each["kernel"]).T) for each in linears)
    return dict(zip(FLAT, (q, out, torch.tensor(conv.copy()), text), strict=True))
