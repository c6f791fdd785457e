"""Rotary embeddings in torch, by both orders of coordinates."""

import torch


def neighbours_rotated(x, angles):
    """RoPE of the first generation: complex numbers from neighbouring coordinates."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def halves_rotated(x, angles):
    """RoPE of Hugging Face's Llama: coordinates half a head apart."""
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
