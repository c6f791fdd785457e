"""MiniMind from nothing to an adapter: pretraining, conversations, LoRA.

python examples/minimind/three_stages.py --config examples/minimind/minimind.yaml
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from interop import hf, torch_io
from interop.conversion import to_torch
from interop.families import keymap_of
from interop.tokenizer import read_tokenizer
from lora_jax.cli.parsing import parse
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig

from minimind_adapter import train_adapter
from minimind_log import Lesson, Outcome, moved, printer
from minimind_modes import MODES, Batch, next_token
from minimind_options import Options, model_config, schooling_of
from minimind_rows import TokenRow, encoded, first_rows, texts_of, trained_tokenizer
from minimind_training import Apply, fresh_params, judge_of, model_function, train

STAGES = ("pretrain", "sft", "lora")


def main(words: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Run all three stages; each stage's outcome by its name."""
    options = parse(Options, sys.argv[1:] if words is None else words, "three_stages.py", __doc__)
    tokenizer, lessons = lessons_of(options)
    config = model_config(options)
    print(f"device {jax.default_backend()}, {tokenizer.get_vocab_size()} tokens, {options.mode}")
    params, outcomes = fresh_params(jax.random.key(options.seed), config), {}
    for stage in STAGES[:2]:
        print(f"-- {stage}")
        params, outcomes[stage] = _train_whole(stage, lessons[stage], params, config, options)
    print("-- lora")
    outcomes["lora"] = train_adapter(lessons["lora"], params, config, options)
    picture = options.save_dir / "loss.png"
    draw(picture, outcomes, f"MiniMind, {options.mode} mode")
    print(f"picture: {picture}")
    return outcomes


def draw(path: Path, outcomes: dict[str, Outcome], title: str) -> None:
    """The loss of every update of the three stages, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    figure.suptitle(title)
    for axes, (stage, outcome) in zip(figure.subplots(1, 3), outcomes.items(), strict=True):
        updates = range(1, len(outcome.records) + 1)
        axes.plot(updates, [record.loss for record in outcome.records], marker="o")
        axes.set(title=stage, xlabel="update", ylabel="loss, nats a token")
    figure.savefig(path, dpi=120)


def lessons_of(options: Options) -> tuple[Tokenizer, dict[str, Lesson]]:
    """The tokenizer, and the batches of each stage."""
    files = (options.pretrain_data, options.sft_data, options.lora_data)
    tokenizer = _tokenizer_of(options, files)
    lessons = {}
    for stage, path in zip(STAGES, files, strict=True):
        rows = first_rows(path, options.rows)
        encode = partial(encoded, tokenizer, rows, options.max_seq_len)
        mode, size = MODES[options.mode], options.batch_size
        learnt = encode(mode.mark, roles_by_turn=mode.roles_by_turn)
        # The notebook of pretraining doesn't move its targets twice.
        targets = next_token if stage == "pretrain" else mode.targets
        right = encode(MODES["default"].mark)
        lessons[stage] = Lesson(_batched(learnt, size, targets), _batched(right, size, next_token))
    return tokenizer, lessons


def _tokenizer_of(options: Options, files: Sequence[Path]) -> Tokenizer:
    if options.tokenizer is not None:
        return read_tokenizer(options.tokenizer).tokenizer
    texts = [text for path in files for text in texts_of(first_rows(path, None))]
    return trained_tokenizer(texts, options.vocab_size)


def _batched(
    rows: list[TokenRow], size: int, targets: Callable[[Sequence[TokenRow]], Batch]
) -> list[Batch]:
    if size < 1 or len(rows) % size:
        raise InputError(f"{len(rows)} rows are no whole number of batches of {size}")
    return [targets(rows[first : first + size]) for first in range(0, len(rows), size)]


def _train_whole(
    stage: str, lesson: Lesson, params: Any, config: DecoderConfig, options: Options
) -> tuple[Any, Outcome]:
    """Train all weights, and hand them on through a file, as the notebooks do."""
    apply, schooling = _whole_model(config), schooling_of(options)
    judge = judge_of(apply, lesson.judged)
    before = judge(params, None)
    params, records = train(
        apply, params, None, lesson.trained, options.epochs, schooling, printer(lesson, options)
    )
    path = options.save_dir / f"minimind_{stage}_{options.dim}{'_moe' * options.use_moe}.pth"
    params = _through_file(path, config, params, schooling.mode.saved_dtype)
    after = judge(params, None)
    print(f"weights saved to {path}; {moved(before, after)}")
    return params, Outcome(records, before, after)


@cache
def _whole_model(config: DecoderConfig) -> Apply:
    model_fn = model_function(config)
    return lambda params, _, inputs: model_fn(params, inputs)


def _through_file(path: Path, config: DecoderConfig, params: Any, dtype: str) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
    torch_io.write_pickle(path, to_torch(stored, keymap_of(config)))
    read = hf.params_of(config, torch_io.read(path), dtype="float32")
    return jax.tree.map(jnp.asarray, read)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"three_stages.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
