"""Whole attention layers for bench/run.py: NSAAttention and a dense one of the same sizes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from attentions import SDPA
from torch import nn
from torch.nn.attention import sdpa_kernel

import nsa_ext
from nsa_ext._rope import rotary_table, rotate

THETA = 10000.0


class DenseAttention(nn.Module):
    """Causal attention over all keys, with the heads and the RoPE of the sparse layer."""

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, backend: str, **where):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.backend = heads, kv_heads, head_dim, backend
        width = (heads + 2 * kv_heads) * head_dim
        self.qkv = nn.Linear(dim, width, bias=False, **where)
        self.out = nn.Linear(heads * head_dim, dim, bias=False, **where)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        positions = torch.arange(x.shape[1], device=x.device)
        table = rotary_table(positions, self.head_dim, THETA, x.dtype)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, table), rotate(k, table), v))
        with sdpa_kernel(SDPA[self.backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


def make_layer(
    name: str, dim: int, heads: int, kv_heads: int, head_dim: int, compress: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer of an implementation, in bfloat16 on the GPU."""
    where = {"device": "cuda", "dtype": torch.bfloat16}
    if name.startswith("nsa"):
        return nsa_ext.NSAAttention(
            dim, heads, kv_heads, head_dim, compress=compress, rope_theta=THETA, **where
        )
    return DenseAttention(dim, heads, kv_heads, head_dim, name, **where)
