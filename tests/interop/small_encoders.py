"""Small random models of transformers' own making: BERT and RoBERTa, bare and as classifiers."""

import numpy as np
import torch
import transformers

COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
CASES = {
    "bert": ("BertForSequenceClassification", {"num_labels": 3, "pad_token_id": 0}),
    "roberta": ("RobertaForSequenceClassification", {"num_labels": 2, "pad_token_id": 1}),
    "bert bare": ("BertModel", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    "roberta bare": ("RobertaModel", {"type_vocab_size": 1, "hidden_act": "relu"}),
}
FILL = {"bert": 0, "roberta": 1}


def torch_encoder(architecture, changes, **options):
    """Eval mode, weights large enough that every leaf shows in the output."""
    made = getattr(transformers, architecture)
    model = made(made.config_class(**COMMON | changes), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if weight.ndim == 1 or "embedding" in name else weight.shape[-1] ** -0.5
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            weight.normal_(centre, scale, generator=generator)
    return model.eval()


def padded_batch(model_type, types=2, time=12):
    """Tokens of rows of unequal length, their mask and their token types."""
    generator = np.random.default_rng(0)
    lengths = np.array([time, 7, 3])
    mask = np.arange(time) < lengths[:, None]
    tokens = np.where(mask, generator.integers(3, 40, mask.shape), FILL[model_type])
    token_types = generator.integers(0, types, mask.shape) * mask
    return tokens.astype(np.int32), mask.astype(np.int32), token_types.astype(np.int32)


def torch_outputs(model, tokens, mask, token_types):
    """Hidden states of every layer, pooled or logits, as NumPy arrays."""
    batch = {
        "input_ids": torch.from_numpy(tokens).long(),
        "attention_mask": torch.from_numpy(mask).long(),
        "token_type_ids": torch.from_numpy(token_types).long(),
    }
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    layers = np.stack([hidden.numpy() for hidden in out.hidden_states[1:]])
    last = out.logits if "logits" in out else out.pooler_output
    return layers, None if last is None else last.numpy()
