"""Whole attention layers for bench/run.py: NSAAttention and a dense one of the same sizes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from attentions import SDPA
from torch import nn
from torch.nn.attention import sdpa_kernel

import nsa_ext
from nsa_ext._rope import inverse_frequencies, rotary_table, rotate

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
        q, k, v = self._project(x, torch.arange(x.shape[1], device=x.device))
        return self._attend(q, k, v, is_causal=True)

    def step(self, x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """The last token of caches (B, S, Hkv, D), which is written into them."""
        last = k_cache.shape[1] - 1
        q, k, v = self._project(x, torch.full((1,), last, device=x.device))
        k_cache[:, last:], v_cache[:, last:] = k, v
        return self._attend(q, k_cache, v_cache, is_causal=False)

    def _project(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        table = rotary_table(
            positions, inverse_frequencies(self.head_dim, THETA, x.dtype, x.device)
        )
        return rotate(q, table), rotate(k, table), v

    def _attend(self, q, k, v, is_causal: bool) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPA[self.backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
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
