"""Attention of new tokens over a KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_aligned, check_softmax_scale, check_supported, check_tensor
from .cache import NSACache
from .functional import Compress

_MAX_DECODE_ROWS = torch.ops.nsa_ext.max_decode_rows()


@torch.compiler.disable
@torch.no_grad()
def sparse_attn_with_kvcache(
    q: Tensor,
    cache: NSACache,
    gates: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    compress: Compress | None = None,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    counts: Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`sparse_attn` of T new tokens over a cache: one token (decode), a few (speculative
    decode) or many (chunked prefill). With ``k``, ``v`` and ``compress`` it appends them first.

    Query i of sequence b sits at position cache.seqlens[b] - T + i, so the numbers are those of
    :func:`sparse_attn` over all tokens that the cache holds; causal within the T. Where the new
    tokens are fewer than T (``counts``) they are the last rows, and what comes out of the others
    means nothing. Carries no gradient. Inside of ``torch.compile`` it breaks the graph.

    Few rows T * Hq / Hkv (up to ``torch.ops.nsa_ext.max_decode_rows()``) run on the decode kernels.
    Longer chunks run on those of sparse_attn; on a GPU a paged cache is copied for them, as far as
    its block table reaches, which costs memory and time in proportion.

    Args:
        q: (B, T, Hq, Dk), any T.
        cache: :class:`NSACache` of B sequences.
        gates: (B, T, Hq, 3), as in sparse_attn.
        k, v, compress, k_cmp, v_cmp, k_win, v_win, counts: of :meth:`NSACache.append`; all None: it
            appends nothing.
        softmax_scale: default Dk**-0.5.
        return_selection: also return which blocks were selected.

    Returns:
        out (B, T, Hq, Dv) in q's dtype. With return_selection also block_indices, int32
        (B, T, Hkv, n), as in sparse_attn.

    Raises:
        TypeError, ValueError: an argument does not fit, or new tokens find no room; the message
            names it, and the cache is as it was.
    """
    _check_query(q, cache, gates)
    scale = check_softmax_scale(softmax_scale, q)
    new = {
        "k": k, "v": v, "compress": compress, "k_cmp": k_cmp, "v_cmp": v_cmp, "k_win": k_win,
        "v_win": v_win, "counts": counts,
    }  # fmt: skip
    given = [name for name, value in new.items() if value is not None]
    if given:
        for name in ("k", "v", "compress"):
            if new[name] is None:
                raise ValueError(f"{name}: expected a value with {given[0]}, got None")
        if isinstance(k, Tensor) and k.dim() == 4 and k.shape[1] != q.shape[1]:
            raise ValueError(f"k: expected the {q.shape[1]} rows of q, got {k.shape[1]}")
        cache.append(**new)

    pools = [cache.pages(name) for name in ("k_cmp", "v_cmp", "k", "v", "k_win", "v_win")]
    table = cache.block_table
    rows = q.shape[1] * (q.shape[2] // cache.num_kv_heads)
    if table is not None and q.device.type == "cuda" and rows > _MAX_DECODE_ROWS:
        pages = table.clamp(min=0).flatten()
        pools = [None if pool is None else pool[pages] for pool in pools]
        table = None
    out, block_indices = torch.ops.nsa_ext.decode_fwd(
        q, *pools, gates, cache.seqlens, table, cache.config.as_list(), scale
    )
    return (out, block_indices) if return_selection else out


def _check_query(q: Tensor, cache: NSACache, gates: Tensor) -> None:
    if not isinstance(cache, NSACache):
        raise TypeError(f"cache: expected an NSACache, got {type(cache).__name__}")
    like = cache.seqlens
    check_tensor(
        "q", q, ("B", "T", "Hq", "Dk"), (cache.batch_size, None, None, cache.head_dim), like=like,
        dtype=cache.dtype, fits_to="the cache",
    )  # fmt: skip
    check_aligned("q", q)
    if q.shape[2] < 1 or q.shape[2] % cache.num_kv_heads:
        raise ValueError(
            f"q: expected a multiple of the {cache.num_kv_heads} heads of the cache, "
            f"got {q.shape[2]} heads"
        )
    check_supported(q, cache.num_kv_heads, cache.head_dim_v, cache.config)
    check_tensor("gates", gates, ("B", "T", "Hq", "branches"), (*q.shape[:-1], 3), like=q)
