"""Our decoder's training beside torch's on real rows: with PEFT, and with torch_lora.py.

All start from one adapter and see the batches that ``lora-jax train`` would see.
"""

import os
import tempfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from interop import hf, peft
from interop.decoder_sides import token_loss, torch_token_loss
from interop.keymaps import Keymap
from interop.peft_layout import Base, adapted_settings
from interop.side_by_side import (
    TrainingComparison,
    adamw_run,
    compare_runs,
    jax_run,
    torch_lora_run,
)
from interop.torch_lora import apply_lora, by_name
from interop.torch_training import Recipe
from interop.trained_tensors import load, our_tensors
from lora_jax.adapter import Adapter
from lora_jax.data.arranging import arrange_rows
from lora_jax.data.batch_plan import plan_batches
from lora_jax.data.batches import Batch, train_batches
from lora_jax.data.chat import ChatFormat, encode_rows
from lora_jax.data.fitting import fit_rows
from lora_jax.data.formats import read_file
from lora_jax.models.config import DecoderConfig
from lora_jax.paths import named_leaves
from lora_jax.site import Plan

if TYPE_CHECKING:
    from torch import nn

PEFT, TORCH_LORA = "PEFT + torch AdamW", "torch_lora"


class Start(NamedTuple):
    """What every side starts from."""

    config: DecoderConfig
    """In float32."""
    params: Any
    adapter: Adapter
    plan: Plan
    keymap: Keymap


def row_batches(
    chat: ChatFormat,
    vocab_size: int,
    path: str | os.PathLike,
    *,
    steps: int,
    batch_size: int = 2,
    max_length: int = 256,
    seed: int = 0,
) -> list[Batch]:
    """The first batches of a run over the rows of a file, packed, as many epochs as it takes.

    Args:
      chat: how the model writes a conversation.
      vocab_size: of the model.
      path: the rows.
      steps: how many batches.
      batch_size: sequences in each.
      max_length: of a sequence; a longer row is refused.
      seed: of the order.

    Raises:
      InputError: rows that can't be read, are too long or train nothing.
    """
    encoded = encode_rows(chat, read_file(Path(path)).rows, "all")
    rows = fit_rows(encoded, max_length, "error").rows
    packed = arrange_rows(
        rows, max_length=max_length, vocab_size=vocab_size, sequences_per_step=batch_size
    )
    epoch = plan_batches(packed, batch_size=batch_size).steps
    plan = plan_batches(packed, batch_size=batch_size, epochs=-(-steps // epoch))
    return [*islice(train_batches(packed, plan, seed=seed), steps)]


def train_on_all_sides(
    start: Start, batches: list[Batch], recipe: Recipe
) -> dict[str, TrainingComparison]:
    """Our run beside PEFT with ``torch.optim.AdamW`` and beside torch_lora with its own loop.

    Raises:
      InputError: the adapter has a form that PEFT or torch_lora lacks.
    """
    config, params, adapter, plan, keymap = start
    ours = jax_run(token_loss(config, plan), params, adapter, plan, batches, recipe, keymap=keymap)
    theirs = {
        PEFT: adamw_run(peft_model(start), torch_token_loss, batches, recipe),
        TORCH_LORA: torch_lora_run(torch_lora_model(start), torch_token_loss, batches, recipe),
    }
    return compare_runs(ours, theirs, our_tensors(adapter, plan, params, keymap))


def peft_model(start: Start) -> "nn.Module":
    """The base in transformers, with the adapter loaded by PEFT from the directory we write."""
    from peft import PeftModel

    base = hf.to_transformers(start.config, start.params)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter"
        adapter, plan = start.adapter, start.plan
        peft.write(directory, adapter, plan, keymap=start.keymap, params=start.params)
        return PeftModel.from_pretrained(base, os.fspath(directory), is_trainable=True).eval()


def torch_lora_model(start: Start) -> "nn.Module":
    """The base in transformers, adapted by `interop.torch_lora`, with the adapter copied in."""
    model = hf.to_transformers(start.config, start.params)
    base = Base(start.keymap, named_leaves(start.params))
    settings = adapted_settings(start.plan, base)
    for rank, scale in dict.fromkeys(settings.values()):
        modules = [name for name, setting in settings.items() if setting == (rank, scale)]
        apply_lora(model, by_name(*modules), rank=rank, alpha=scale * rank)
    load(model, our_tensors(start.adapter, start.plan, start.params, start.keymap))
    return model
