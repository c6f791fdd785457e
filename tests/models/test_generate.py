"""Generation against transformers' generate and samplers, and its contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.generate import LanguageModel, generate, language_model
from lora_jax.models.sampling import Sampling, choose, truncated

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=False,  # tied random weights repeat themselves
    max_positions=64,
)
PROMPTS = [[5, 17, 80], [1], [9, 60, 33] * 4, list(range(20, 36))]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def reference(llama):
    return llama(CONFIG, seed=1)


@pytest.fixture(scope="module")
def answer(reference):
    """generate() on the reference weights."""
    defaults = {"max_new_tokens": NEW_TOKENS}

    def run(prompts=PROMPTS, **options):
        return generate(language_model(CONFIG), reference.params, prompts, **defaults | options)

    return run


@functools.cache
def torch_greedy(model, prompt, eos=None):
    tokens = torch.tensor([prompt])
    whole = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return whole[0, len(prompt) :].tolist()


def test_greedy_tokens_equal_transformers_row_by_row(reference, answer):
    expected = [torch_greedy(reference.torch_model, tuple(prompt)) for prompt in PROMPTS]
    assert all(len(set(row)) > 3 for row in expected)  # no row is stuck on a token
    assert answer() == expected
    assert answer([*PROMPTS[1:], PROMPTS[0]]) == [*expected[1:], expected[0]]


def test_rows_end_at_an_end_token_as_transformers_do(reference, answer):
    first = torch_greedy(reference.torch_model, tuple(PROMPTS[0]))
    eos = (first[5], first[11])
    expected = [torch_greedy(reference.torch_model, tuple(p), eos) for p in PROMPTS]
    assert len(expected[0]) <= 6
    assert max(map(len, expected)) > len(expected[0])
    assert answer(eos_ids=eos) == expected


def test_a_first_token_may_end_the_row(answer):
    (first, *_), *_ = answer()
    assert answer(eos_ids=[first, first])[0] == [first]


def counting(model: LanguageModel) -> tuple[LanguageModel, dict[str, int]]:
    """The same model, and how often its function was traced and run."""
    counts = {"traced": 0, "run": 0}

    def apply(*args):
        counts["traced"] += 1
        jax.debug.callback(lambda: counts.update(run=counts["run"] + 1))
        return model.apply(*args)

    return model._replace(apply=apply), counts


def test_one_program_serves_a_bucket_of_prompts_and_all_sampling_options(reference):
    model, counts = counting(language_model(CONFIG))
    run = functools.partial(generate, model, reference.params, max_new_tokens=3)
    run([[1], [2, 3]])
    compiled = counts["traced"]
    run([[4] * 9, [5] * 16])
    run([[4] * 7, [5]], temperature=0.7, top_k=3, top_p=0.5, key=jax.random.key(0))
    assert counts["traced"] == compiled
    run([[4] * 17, [5]])
    assert counts["traced"] == 2 * compiled


def test_decoding_stops_when_every_row_has_ended(reference, answer):
    row = answer()[0]
    model, counts = counting(language_model(CONFIG))
    generate(model, reference.params, PROMPTS[:1], max_new_tokens=NEW_TOKENS, eos_ids=[row[4]])
    jax.effects_barrier()
    assert counts["run"] == 1 + row.index(row[4])


def test_an_equal_config_gives_the_same_model():
    again = DecoderConfig(**vars(CONFIG))
    assert language_model(again) is language_model(CONFIG)


def test_any_pytree_of_params_and_any_apply_will_do(reference, answer):
    model = language_model(CONFIG)

    def adapted(base_and_shift, *args):
        base, shift = base_and_shift
        logits, cache = model.apply(base, *args)
        return logits + shift, cache

    def run(shift):
        bundle = (reference.params, shift)
        changed = model._replace(apply=adapted)
        return generate(changed, bundle, PROMPTS, max_new_tokens=NEW_TOKENS)

    assert run(np.zeros(96, np.float32)) == answer()
    assert run(1e6 * np.eye(96, dtype=np.float32)[42]) == [[42] * NEW_TOKENS] * len(PROMPTS)


def test_sampling_is_reproducible_by_key(answer):
    draw = functools.partial(answer, temperature=1.0)
    assert draw(key=jax.random.key(1)) == draw(key=jax.random.key(1))
    assert draw(key=jax.random.key(1)) != draw(key=jax.random.key(2))
    assert draw(key=jax.random.key(1)) != answer()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_sampling_is_greedy(answer, options):
    options = {"temperature": 1.0, "key": jax.random.key(3)} | options
    assert answer(**options) == answer()


def sampling(temperature=1.0, top_k=0, top_p=1.0):
    return Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


@pytest.mark.parametrize("temperature", [0.5, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 500])
@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95, 1.0])
def test_truncation_equals_transformers(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32) * 2
    warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
    if top_k:
        warpers.insert(1, TopKLogitsWarper(top_k))
    expected = torch.from_numpy(logits)
    for warper in warpers:
        expected = warper(torch.zeros(8, 1, dtype=torch.long), expected)
    actual = truncated(jnp.asarray(logits), sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)


def test_draws_follow_the_softmax_of_what_is_kept():
    logits = jnp.array([[0.0, 1.0, 2.0, -1.0, 1.5]])
    settings = sampling(temperature=0.8, top_k=3)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(lambda key: choose(logits, settings, key)[0])(keys)
    frequencies = np.bincount(drawn, minlength=5) / len(keys)
    expected = np.asarray(jax.nn.softmax(truncated(logits, settings))[0])
    assert expected.tolist().count(0.0) == 2
    np.testing.assert_allclose(frequencies, expected, atol=0.015)  # four standard deviations
    assert (frequencies[expected == 0] == 0).all()


@pytest.mark.parametrize(
    ("prompts", "options", "named"),
    [
        ([], {}, ["no prompts"]),
        ([[1], []], {"max_new_tokens": 0}, ["rows [1] are empty", "max_new_tokens=0"]),
        (
            [[1], [2] * 50],
            {"max_new_tokens": 20},
            ["{1: 50}", "max_new_tokens=20", "max_positions=64"],
        ),
        ([[3, -1]], {}, ["rows [0] hold negative"]),
        ([[1]], {"temperature": 0.5}, ["key=jax.random.key(seed)"]),
        (
            [[1]],
            {"temperature": float("nan"), "top_k": -1, "top_p": 0.0},
            ["temperature=nan", "top_k=-1", "top_p=0.0"],
        ),
    ],
)
def test_bad_arguments_are_named_together_before_any_computation(prompts, options, named):
    unused = language_model(CONFIG)._replace(apply=None, init_cache=None)  # calling either fails
    with pytest.raises(InputError) as raised:
        generate(unused, None, prompts, **{"max_new_tokens": 4} | options)
    assert all(part in str(raised.value) for part in named)


def test_a_prompt_may_fill_the_model_to_its_last_position(answer):
    assert len(answer([[7] * 40])[0]) == NEW_TOKENS
    with pytest.raises(InputError, match="max_positions=64"):
        answer([[7] * 41])


def test_nan_logits_are_an_error_that_names_the_rows(answer):
    with pytest.raises(InputError, match=r"rows \[1, 3\] are NaN"):
        answer([[1], [2, 96], [3], [1000]])
