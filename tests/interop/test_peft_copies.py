"""What PEFT stores beside an adapter: tensors of the base, and trained ones a second time."""

import numpy as np
import pytest

import lora_jax as lora
from interop import peft, peft_file, torch_io
from interop.comparison import compare
from interop.peft import WEIGHTS

from peft_cases import edit_tensors
from peft_table import (
    KINDS,
    TIE,
    Case,
    base_outputs,
    base_params,
    outputs_of,
    outputs_there,
    relative,
    save_with_peft,
)

EMBEDDINGS = dict(save_embedding_layers=True)
STORED = {
    "biases of a saved layer": (
        Case("mlp", dict(target_modules=["0"], modules_to_save=["4"], bias="all")), {},
        ["4.modules_to_save.bias", "4.original_module.bias"],
    ),
    "biases of a classifier": (
        Case("BERT", dict(target_modules=["query"], task_type="SEQ_CLS", bias="all")), {},
        ["classifier.modules_to_save.bias", "classifier.original_module.bias"],
    ),
    "embeddings": (
        Case("Llama", dict(target_modules=["q_proj"])), EMBEDDINGS,
        ["model.embed_tokens.weight", "lm_head.weight"],
    ),
    "tied embeddings": (
        Case("tied Llama", dict(target_modules=["q_proj"])), EMBEDDINGS,
        ["model.embed_tokens.weight", "lm_head.weight"],
    ),
    "embeddings of which one is saved": (
        Case("Llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])), EMBEDDINGS,
        ["lm_head.modules_to_save.weight", "lm_head.original_module.weight"],
    ),
    "an embedding with a magnitude": (
        Case("BERT", dict(target_modules=["query", "word_embeddings"], use_dora=True)), EMBEDDINGS,
        ["bert.embeddings.word_embeddings.lora_magnitude_vector.weight"],
    ),
    "an embedding with trained tokens": (
        Case("Llama", dict(target_modules=["q_proj"], trainable_token_indices=[1, 4])), EMBEDDINGS,
        ["model.embed_tokens.token_adapter.base_layer.weight", "lm_head.weight"],
    ),
    "a tied embedding with trained tokens": (
        Case("tied Llama", dict(target_modules=["q_proj"], trainable_token_indices=[1, 4])),
        EMBEDDINGS, ["lm_head.token_adapter.trainable_tokens_delta"],
    ),
    "a tied pair": (
        Case("tied Llama", dict(target_modules=["embed_tokens"], ensure_weight_tying=True)),
        EMBEDDINGS, ["lm_head.base_layer.weight"],
    ),
    "a tied embedding that is saved": (
        Case("GPT-2", dict(target_modules=["c_attn"], modules_to_save=["lm_head"], **TIE)),
        EMBEDDINGS, ["transformer.wte.modules_to_save.weight", "lm_head.original_module.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "saving", "copies"), STORED.values(), ids=STORED)
def test_copies_count_for_nothing_and_have_to_be_equal(tmp_path, case, saving, copies):
    model = save_with_peft(case, tmp_path, **saving)
    params, keymap = base_params(case.kind), KINDS[case.kind].keymap
    adapter, plan = peft.read(tmp_path, params, keymap=keymap)
    theirs = outputs_there(case, model)
    ours = outputs_of(case.kind, lora.merge(params, adapter, plan))
    assert relative(ours, theirs) < 1e-5 < relative(base_outputs(case.kind), theirs)
    peft.write(tmp_path / "own", adapter, plan, keymap=keymap, params=params)
    files = (peft_file.read(path).adapter for path in (tmp_path, tmp_path / "own"))
    assert compare(*files).beyond(1e-6) == []
    names = [f"base_model.model.{name}" for name in copies]
    assert {*names} <= {*torch_io.read(tmp_path / WEIGHTS)}
    for name in names:
        edit_tensors(tmp_path, lambda tensors, name=name: np.add(tensors[name], 1, tensors[name]))
    with pytest.raises(lora.InputError) as raised:
        peft.read(tmp_path, params, keymap=keymap)
    assert any(f"{name} differs from" in str(raised.value) for name in names)


def test_what_a_rebased_head_has_left_is_no_other_base(tmp_path):
    case = Case("Llama", dict(target_modules=["q_proj", "lm_head"]), "pissa")
    theirs = outputs_there(case, save_with_peft(case, tmp_path, **EMBEDDINGS))
    assert "base_model.model.lm_head.base_layer.weight" in torch_io.read(tmp_path / WEIGHTS)
    params = base_params("Llama")
    read = peft.read(tmp_path, params, keymap=KINDS["Llama"].keymap)
    assert relative(outputs_of("Llama", lora.merge(params, *read)), theirs) < 1e-5
