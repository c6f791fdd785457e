"""MiniMind's first generation in torch, its dataset and its losses, written from their description.

Names of parameters are those of its files, so that a state dict loads strictly.
"""

import json

import torch
from torch import nn
from torch.nn import functional as F

from interop.torch_training import Batch

SYSTEM = "你是 MiniMind，是一个有用的人工智能助手。"


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * normed.type_as(x)


def turned(x):
    """(rows, time, heads, features): neighbours as complex numbers, turned by their position."""
    features = x.shape[-1]
    frequencies = 1e6 ** (-torch.arange(0, features, 2)[: features // 2].float() / features)
    angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.features = heads, kv_heads, dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.features, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.features, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        rows, time, dim = x.shape
        query = turned(self.wq(x).view(rows, time, self.heads, -1))
        key = turned(self.wk(x).view(rows, time, self.kv_heads, -1))
        value = self.wv(x).view(rows, time, self.kv_heads, -1)
        key, value = (t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (key, value))
        heads = (t.transpose(1, 2) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(rows, time, dim))


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        width = 64 * -(-int(2 * (4 * dim) / 3) // 64)
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Gate(nn.Module):
    def __init__(self, dim, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))


class Mixture(nn.Module):
    """Four experts of which a token meets two, and one that it always meets."""

    def __init__(self, dim, experts=4, per_token=2):
        super().__init__()
        self.per_token = per_token
        self.gate = Gate(dim, experts)
        self.experts = nn.ModuleList([FeedForward(dim) for _ in range(experts)])
        self.shared_experts = FeedForward(dim)

    def forward(self, x):
        scores = F.linear(x, self.gate.weight).softmax(-1)
        weights, chosen = scores.topk(self.per_token, dim=-1)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        made = torch.stack([expert(x) for expert in self.experts], dim=2)
        met = made.gather(2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        self.aux = self.balance(scores, chosen)
        return (met * weights[..., None]).sum(2) + self.shared_experts(x)

    def balance(self, scores, chosen):
        time, experts = scores.shape[1:]
        counts = torch.stack([torch.bincount(row.flatten(), minlength=experts) for row in chosen])
        load = counts / (time * self.per_token / experts)
        return (load * scores.mean(1)).sum(1).mean()


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, use_moe):
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads)
        self.attention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)
        self.feed_forward = Mixture(dim) if use_moe else FeedForward(dim)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class MiniMind(nn.Module):
    def __init__(self, dim, vocab_size, use_moe):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        blocks = [Block(dim, 8, 2, use_moe) for _ in range(2)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.tok_embeddings.weight = self.output.weight

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))

    def aux_loss(self):
        """The balance of all layers, of the last call."""
        found = [layer.feed_forward for layer in self.layers]
        return sum(each.aux for each in found if isinstance(each, Mixture))


def dataset(path, tokenizer, count, length, faithful):
    """(X, Y, loss_mask) of each row, as the notebook's dataset gives them, or with a right mask."""
    begin, end = (tokenizer.encode(t).ids for t in ("<s>assistant\n", "</s>\n"))
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        turns = json.loads(line)["conversations"]
        spoken = [
            ("user" if n % 2 == 0 else "assistant", t["content"]) for n, t in enumerate(turns)
        ]
        text = "".join(f"<s>{role}\n{said}</s>\n" for role, said in [("system", SYSTEM), *spoken])
        ids = tokenizer.encode(text).ids[:length]
        ids += [0] * (length - len(ids))
        mask, at = [0] * length, 0
        while at < length:
            if ids[at : at + len(begin)] != begin:
                at += 1
                continue
            start = stop = at + len(begin)
            while stop < length and ids[stop : stop + len(end)] != end:
                stop += 1
            for place in range(start + faithful, min(stop + len(end) + faithful, length)):
                mask[place] = 1
            at = stop + len(end)
        yield ids[:-1], ids[1:], mask[1:]


def loader(path, tokenizer, count, length, size, faithful):
    """Batches of the dataset, in its order."""
    rows = [*dataset(path, tokenizer, count, length, faithful)]
    groups = [zip(*rows[first : first + size], strict=True) for first in range(0, count, size)]
    return [Batch(torch.tensor(x), torch.tensor(y), torch.tensor(m).float()) for x, y, m in groups]


def notebook_loss(model, batch, alpha=0.1):
    """What the notebook minimises, its second shift included."""
    logits = model(batch.inputs)[..., :-1, :]
    labels, mask = batch.targets[..., 1:], batch.weights[..., 1:].flatten()
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (each * mask).sum() / (mask.sum() + 1e-8) + alpha * model.aux_loss()


def right_loss(model, batch, alpha=0.1):
    """The mean over the tokens that are learnt, each predicted from those before it."""
    logits, mask = model(batch.inputs), batch.weights.flatten()
    each = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    return (each * mask).sum() / mask.sum() + alpha * model.aux_loss()
