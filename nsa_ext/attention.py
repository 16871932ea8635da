"""The attention layer of a transformer with Native Sparse Attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import (
    check_at_least,
    check_config,
    check_cu_seqlens,
    check_number,
    check_parameter_dtype,
)
from ._rope import inverse_frequencies, packed_positions, rotary_table, rotate
from .cache import NSACache
from .compressor import KVCompressor
from .config import DEFAULT_CONFIG, NSAConfig
from .decode import sparse_attn_with_kvcache
from .functional import sparse_attn


class NSAAttention(nn.Module):
    """Causal self-attention with Native Sparse Attention: projections, RoPE, gates, output.

    Queries, and keys and values for each branch, are projections of x. The compressed branch
    compresses the keys before they are rotated, and then rotates compressed key c at position c*d.
    The gates are a sigmoid of a projection of x, one for each query head and branch (eq. 5).

    Args:
        dim: width of x.
        num_heads, num_kv_heads: Hq and Hkv; Hkv divides Hq.
        head_dim: Dk; default: dim // num_heads.
        head_dim_v: Dv; default: head_dim.
        config: block lengths.
        compress: kind of :class:`KVCompressor`: "mlp", "linear", "weighted" or "mean".
        compress_per_head: one phi for each kv head rather than one for all.
        compress_hidden: hidden width of the "mlp" kind; default: the width of its output.
        separate_kv: each branch has its own K and V, as in the paper; else they share one pair.
        rope_theta: base of the rotary position embedding; None: no position embedding.
        bias: biases of the linear projections.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
        *,
        config: NSAConfig = DEFAULT_CONFIG,
        compress: str = "mlp",
        compress_per_head: bool = False,
        compress_hidden: int | None = None,
        separate_kv: bool = True,
        rope_theta: float | None = 10000,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_config(config)
        check_parameter_dtype(dtype)
        check_at_least("dim", dim, 1)
        check_at_least("num_heads", num_heads, 1)
        check_at_least("num_kv_heads", num_kv_heads, 1)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}"
            )
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    f"num_heads: expected a divisor of dim={dim} where head_dim is not given, "
                    f"got {num_heads}"
                )
            head_dim = dim // num_heads
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        check_at_least("head_dim", head_dim, 1)
        check_at_least("head_dim_v", head_dim_v, 1)
        if rope_theta is not None:
            if head_dim % 2:
                raise ValueError(f"head_dim: expected an even number with RoPE, got {head_dim}")
            if check_number("rope_theta", rope_theta) <= 0:
                raise ValueError(f"rope_theta: expected a positive number, got {rope_theta}")
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.config = config
        self.separate_kv = separate_kv
        self.rope_theta = rope_theta

        num_kv = 3 if separate_kv else 1
        kwargs = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, num_heads * head_dim, **kwargs)
        self.k_proj = nn.Linear(dim, num_kv * num_kv_heads * head_dim, **kwargs)
        self.v_proj = nn.Linear(dim, num_kv * num_kv_heads * head_dim_v, **kwargs)
        self.gate_proj = nn.Linear(dim, num_heads * 3, **kwargs)
        self.o_proj = nn.Linear(num_heads * head_dim_v, dim, **kwargs)
        self.compress = KVCompressor(
            head_dim,
            head_dim_v,
            kind=compress,
            config=config,
            num_kv_heads=num_kv_heads if compress_per_head else None,
            hidden=compress_hidden,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        cache: NSACache | None = None,
        counts: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: (B, S, dim), packed (total, dim); with a cache (B, T, dim), the new tokens.
            cu_seqlens: int32 (B + 1,), row offsets of the packed sequences.
            max_seqlen: their greatest length; required where cu_seqlens is on a GPU.
            cache: what :meth:`new_cache` made, this layer's own: x goes on from the tokens that it
                holds, and is added to them. Carries no gradient.
            counts: as in :meth:`NSACache.append`.

        Returns:
            The shape of x.
        """
        self._check_x(x, cu_seqlens)
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens: expected None with a cache, got a tensor")
            return self._forward_cached(x, cache, counts)
        if counts is not None:
            raise ValueError("counts: expected None without a cache")
        if cu_seqlens is not None:
            max_seqlen = check_cu_seqlens("", cu_seqlens, max_seqlen, x, "x", x.shape[0])
        q, k, v, gates = self._project(x)

        # In the order compressed, selected, window; a shared pair serves all three.
        k_cmp, v_cmp = self.compress(k[0], v[0], cu_seqlens, max_seqlen)
        if self.separate_kv:
            k, v = k[1:], v[1:]
        if self.rope_theta is not None:
            table, table_cmp = self._rotary_tables(q, k_cmp, cu_seqlens)
            q, k_cmp = rotate(q, table), rotate(k_cmp, table_cmp)
            k = [rotate(branch, table) for branch in k]
        out = sparse_attn(
            q,
            k[0],
            v[0],
            gates,
            (k_cmp, v_cmp),
            config=self.config,
            k_win=k[1] if self.separate_kv else None,
            v_win=v[1] if self.separate_kv else None,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
        )
        return self.o_proj(out.flatten(-2))

    def new_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        *,
        dtype: torch.dtype | None = None,
        **options,
    ) -> NSACache:
        """An empty :class:`NSACache` for this layer, on its device.

        Args:
            batch_size, max_seqlen: as of NSACache.
            dtype: of the activations; default: of the weights.
            options: num_pages, block_table, max_rollback, growable.
        """
        weight = self.k_proj.weight
        dtype = weight.dtype if dtype is None else dtype
        inv_freq = None
        if self.rope_theta is not None:
            inv_freq = inverse_frequencies(self.head_dim, self.rope_theta, dtype, weight.device)
        return NSACache(
            batch_size,
            max_seqlen,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim_v,
            config=self.config,
            separate_kv=self.separate_kv,
            rope_inv_freq=inv_freq,
            device=weight.device,
            dtype=dtype,
            **options,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """q, and k, v of each branch (or one shared pair), not rotated; gates."""
        num_kv = 3 if self.separate_kv else 1
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (num_kv, self.num_kv_heads, self.head_dim)).unbind(-3)
        v = self.v_proj(x).unflatten(-1, (num_kv, self.num_kv_heads, self.head_dim_v)).unbind(-3)
        gates = torch.sigmoid(self.gate_proj(x)).unflatten(-1, (self.num_heads, 3))
        return q, k, v, gates

    @torch.no_grad()
    def _forward_cached(
        self, x: Tensor, cache: NSACache, counts: Sequence[int] | Tensor | None
    ) -> Tensor:
        if not isinstance(cache, NSACache):
            raise TypeError(f"cache: expected an NSACache, got {type(cache).__name__}")
        for name in ("config", "separate_kv"):
            if getattr(cache, name) != getattr(self, name):
                raise ValueError(
                    f"cache: expected {name}={getattr(self, name)} as the layer has, "
                    f"got {getattr(cache, name)}"
                )
        if (cache.rope_inv_freq is None) != (self.rope_theta is None):
            raise ValueError("cache: expected one that new_cache of this layer made (RoPE differs)")
        q, k, v, gates = self._project(x)
        k_raw, v_raw = k[0], v[0]
        if self.separate_kv:
            k, v = k[1:], v[1:]
        if self.rope_theta is not None:
            table = rotary_table(cache.positions(x.shape[1], counts), cache.rope_inv_freq)
            q, k = rotate(q, table), [rotate(branch, table) for branch in k]
        out = sparse_attn_with_kvcache(
            q,
            cache,
            gates,
            k=k[0],
            v=v[0],
            compress=self.compress,
            k_cmp=k_raw,
            v_cmp=v_raw,
            k_win=k[1] if self.separate_kv else None,
            v_win=v[1] if self.separate_kv else None,
            counts=counts,
        )
        return self.o_proj(out.flatten(-2))

    def _rotary_tables(
        self, q: Tensor, k_cmp: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tables of the tokens, and of the compressed tokens: those sit at c*d."""
        stride = self.config.block_stride
        if cu_seqlens is None:
            positions = torch.arange(q.shape[1], device=q.device)
            positions_cmp = torch.arange(k_cmp.shape[1], device=q.device)
        else:
            starts = cu_seqlens[:-1]
            positions = packed_positions(starts, q.shape[0])
            positions_cmp = packed_positions(starts // stride, k_cmp.shape[0])
        inv_freq = inverse_frequencies(self.head_dim, self.rope_theta, q.dtype, q.device)
        return rotary_table(positions, inv_freq), rotary_table(positions_cmp * stride, inv_freq)

    def _check_x(self, x: Tensor, cu_seqlens: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        dims = 3 if cu_seqlens is None else 2
        if x.dim() != dims or x.shape[-1] != self.dim:
            expected = "(B, S, dim={})" if cu_seqlens is None else "(total, dim={}) with cu_seqlens"
            raise ValueError(f"x: expected shape {expected.format(self.dim)}, got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, head_dim_v={self.head_dim_v}, "
            f"separate_kv={self.separate_kv}, rope_theta={self.rope_theta}, {self.config}"
        )
