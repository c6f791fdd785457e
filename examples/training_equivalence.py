"""The same training three times: lora_jax, PEFT with torch's AdamW, and a LoRA written in torch.

    python examples/training_equivalence.py

trains a small random decoder on the rows of examples/data/identity.jsonl, from the same weights
and on the same batches, and prints how far loss, gradient norm, A and B are apart after each
update. The picture goes to examples/training_equivalence.png.
"""

import argparse
import math
from pathlib import Path

import jax

import lora_jax as lora
from interop import pretrained
from interop.comparison_plot import plot_training
from interop.comparison_tables import training_table
from interop.decoder_training import Start, row_batches, train_on_all_sides
from interop.keymaps import LLAMA
from interop.side_by_side import TrainingComparison
from interop.torch_training import Recipe, cosine_schedule
from lora_jax.data.chat import ChatFormat
from lora_jax.paths import path_key

HERE = Path(__file__).parent
ROWS = HERE / "data" / "identity.jsonl"
PICTURE = HERE / "training_equivalence.png"
LOSS_LIMIT, PARAMETER_LIMIT = 1e-5, 1e-4


def compare_training(
    model: str = "tiny",
    steps: int = 100,
    peak: float = 2e-3,
    rank: int = 8,
    batch_size: int = 2,
    b_std: float = 0.0,
) -> dict[str, TrainingComparison]:
    """Train on all sides, from B = 0 or a random B; each comparison by its torch side's name."""
    base = pretrained.load(model, dtype="float32")
    special = {f"{role}_token": text for role, text in base.special_tokens.items()}
    chat = ChatFormat(base.tokenizer, base.chat_template, special)
    batches = row_batches(chat, base.config.vocab_size, ROWS, steps=steps, batch_size=batch_size)

    config = lora.LoraConfig(rank=rank, alpha=2 * rank, targets=r".*_proj/kernel")
    plan = lora.plan_from_axes(base.params, config, {"layers/.*": "stack in out"})
    key, normal = jax.random.key(0), jax.random.normal
    adapter = {
        path: pair._replace(b=b_std * normal(path_key(key, path), pair.b.shape))
        for path, pair in lora.init(key, base.params, plan).items()
    }
    start = Start(base.config, base.params, adapter, plan, LLAMA)
    warmup = math.ceil(steps / 10)
    return train_on_all_sides(start, batches, Recipe(cosine_schedule(peak, steps, warmup)))


def main() -> int:
    """Print the tables and draw the picture; the exit status is 1 if a limit doesn't hold."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--peak", type=float, default=2e-3, help="learning rate after the warm-up")
    parser.add_argument("--plot", type=Path, default=PICTURE)
    options = parser.parse_args()
    found = compare_training(options.model, options.steps, options.peak)
    console = Console()
    for name, each in found.items():
        console.print(training_table(f"lora_jax and {name}", each))
        console.print(f"largest difference of the loss {each.loss_gap:.1e}, limit {LOSS_LIMIT:g}")
        console.print(f"furthest of A and B {each.parameter_gap:.1e}, limit {PARAMETER_LIMIT:g}")
    title = f"{options.steps} updates of the {options.model} decoder on {ROWS.name}, float32"
    limits = {"loss_limit": LOSS_LIMIT, "parameter_limit": PARAMETER_LIMIT}
    plot_training(options.plot, found, title=title, **limits)
    console.print(f"picture: {options.plot}")
    holds = [e.loss_gap < LOSS_LIMIT and e.parameter_gap < PARAMETER_LIMIT for e in found.values()]
    return 0 if all(holds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
