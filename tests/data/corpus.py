"""Real prose that every Python carries: the docstrings of its standard library."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_jax.data.chat import ChatFormat
from lora_jax.data.formats import Row

import templates

DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
PACKAGES = ("asyncio", "collections", "email", "http", "logging", "unittest", "xml")


def docstring_rows() -> list[Row]:
    """One question and answer for each documented class and function of some packages."""
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for name in PACKAGES for file in standard_library.glob(f"{name}/**/*.py"))
    return [
        Row(
            (
                {"role": "user", "content": f"What does `{name}` do?"},
                {"role": "assistant", "content": docstring},
            ),
            file.name,
            line,
        )
        for file in files
        for name, line, docstring in _documented(ast.parse(file.read_text(encoding="utf-8")))
    ]


def chat_format(rows: list[Row]) -> ChatFormat:
    """ChatML with a byte-level BPE of a few thousand tokens, learnt from the rows themselves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    answers = (row.messages[1]["content"] for row in rows)
    tokenizer.train_from_iterator(answers, trainer)
    return ChatFormat(tokenizer, templates.CHATML, {"eos_token": "<|im_end|>"})


def _documented(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if isinstance(node, DOCUMENTED) and docstring and docstring.strip():
            yield node.name, node.lineno, docstring
