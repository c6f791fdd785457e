"""One optimizer update in torch with PEFT, as its users write it: the peer in benchmarks."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def peft_update(
    model: "PreTrainedModel", tokens: np.ndarray, rank: int, targets: Sequence[str]
) -> Callable[[], float]:
    """A function that does one AdamW update of a fresh PEFT adapter and returns the loss.

    Args:
      model: the base, in float32.
      tokens: (batch, time) int; each predicts the next.
      rank: of the adapter, with alpha = rank.
      targets: names of the adapted modules.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
    adapted = get_peft_model(model, config).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batch = torch.from_numpy(tokens)

    def update() -> float:
        optimizer.zero_grad()
        loss = adapted(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return update
