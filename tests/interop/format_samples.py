"""For every format an adapter that it holds, and what its readers have to be told."""

import numpy as np

from interop.adapter_file import FileAdapter
from interop.adapter_format import BaseModule, Given

from module_cases import pair

LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")]
UNET = ["unet.mid.attn.to_q", "unet.mid.attn.to_out.0", "text_encoder.layers.0.q_proj"]
TOLD = Given(alpha=6, head_dim=4)
# By format: a file's suffix, names, and whether it holds DoRA, kernels and tables.
SAMPLES = {
    "loralib": (".pt", LAYERS, ("conv", "embedding")),
    "lora_layer": (".pth", LAYERS, ()),
    "minimind": (".pth", LAYERS, ()),
    "kohya": (".safetensors", UNET, ("dora", "conv")),
    "diffusers": (".safetensors", UNET, ("dora", "conv")),
    "mlx": ("", LAYERS, ("dora", "embedding")),
    "torchtune": (".safetensors", LAYERS, ("dora",)),
}


def sample(format, feature="", dtype=np.float32):
    """An adapter that the format holds."""
    _, names, _ = SAMPLES[format]
    dora = feature == "dora"
    modules = {name: pair(3, (8,), 8, 2.0, dora=dora, dtype=dtype) for name in names}
    if feature == "conv":
        modules["unet.conv_in"] = pair(3, (4, 3, 3), 8, 2.0, "conv", dtype=dtype)
    if feature == "embedding":
        modules["model.embed_tokens"] = pair(3, (11,), 8, 2.0, "embedding", dtype=dtype)
    if format == "minimind":
        modules = {name: module._replace(scale=1.0) for name, module in modules.items()}
    return FileAdapter("mine", modules)


def told(file):
    """What readers of the sample have to know: its modules too."""
    shapes = {
        name: (m.b.shape[0], *m.a.shape[1:]) if m.kind != "embedding" else (11, 8)
        for name, m in file.modules.items()
    }
    base = {name: BaseModule(file.modules[name].kind, shape) for name, shape in shapes.items()}
    return TOLD._replace(base=base)


def bytes_of(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name if path.is_dir() else "", file.read_bytes()) for file in files]


def many_entries(name, count=100_000):
    """The bytes of a safetensors file of so many tensors of one zero each."""
    entries = (
        f'"{name.format(k)}":{{"dtype":"F32","shape":[1,1],"data_offsets":[{4 * k},{4 * k + 4}]}}'
        for k in range(count)
    )
    header = "{" + ",".join(entries) + "}"
    return len(header).to_bytes(8, "little") + header.encode() + bytes(4 * count)
