"""Native Sparse Attention as functions: the whole operator, and its parts.

Symbols: B batch, Sq/Sk query/key length, Hq/Hkv query/key-value heads, G = Hq / Hkv, Dk/Dv head
dims, Tc compressed tokens; l, d, l', n, w the fields of :class:`NSAConfig`. "eq. n" is an equation
of the paper, arXiv 2502.11089. Query i of a sequence sits at position t = i + (Sk - Sq).

Common to all functions:

- Tensors are (B, S, H, D), or packed (total, H, D) with ``cu_seqlens_q`` and ``cu_seqlens_k``:
  int32 row offsets (B + 1,) that start at 0 and end at the number of rows. The last dim must be
  contiguous, other strides are free; on CUDA the rows of q, K and V start at multiples of 16 bytes.
  All tensors share q's device and dtype: float64, float32, bfloat16 or float16 on the CPU, bfloat16
  or float16 on CUDA.
- ``max_seqlen_q`` and ``max_seqlen_k``, upper bounds of the packed sequences' lengths, are required
  where cu_seqlens are on a GPU; elsewhere they default to what cu_seqlens say.
- Compressed tokens of a packed sequence that starts at key row r start at row r // d of
  total_k // d rows; rows that hold no token are zero.
- ``softmax_scale`` defaults to Dk**-0.5.
- ``deterministic=True``, or ``torch.use_deterministic_algorithms(True)``, makes the gradients
  bit-reproducible. Results of the forward always are.
- A query that sees no key gets a zero result.
- Bad arguments raise TypeError or ValueError before anything is launched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _ops  # noqa: F401  (registers the operators)
from ._checks import (
    check_at_least,
    check_block_indices,
    check_compress_input,
    check_config,
    check_cu_seqlens,
    check_gates,
    check_k,
    check_kv,
    check_q,
    check_seqlens,
    check_softmax_scale,
    check_supported,
)
from .config import DEFAULT_CONFIG, NSAConfig

Compress = Callable[..., tuple[Tensor, Tensor]]
"""``compress(k, v, cu_seqlens_k=..., max_seqlen_k=...) -> (k_cmp, v_cmp)``, a KVCompressor."""


def sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    compress: Compress | tuple[Tensor, Tensor],
    *,
    config: NSAConfig = DEFAULT_CONFIG,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention: g_cmp * o_cmp + g_slc * o_slc + g_win * o_win (eq. 5).

    o_cmp attends to the compressed tokens c with c*d + l - 1 <= t (eq. 7), o_slc to the keys s <= t
    of the n blocks that are most important to the compressed branch (eq. 8-12), o_win to the last w
    keys. Differentiable in q, every K and V, gates and the compressor's weights; the choice of
    blocks carries no gradient.

    Args:
        q: (B, Sq, Hq, Dk), packed (total_q, Hq, Dk).
        k: (B, Sk, Hkv, Dk), packed (total_k, Hkv, Dk): keys of the selected branch, and of the
            others where they are given none of their own.
        v: (B, Sk, Hkv, Dv), packed (total_k, Hkv, Dv).
        gates: (B, Sq, Hq, 3), packed (total_q, Hq, 3): factors of the compressed, selected and
            window branch, taken as they are (no sigmoid is applied).
        compress: a :class:`KVCompressor` (or a callable like it), or a pair of compressed tokens
            (B, Tc, Hkv, Dk) and (B, Tc, Hkv, Dv), packed (total_k // d, Hkv, ...).
        config: block lengths.
        k_cmp, v_cmp: raw keys and values for the compressor, shapes of k and v; default: k, v.
        k_win, v_win: keys and values of the window branch, shapes of k and v; default: k, v.
        softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic: see
            the module.
        return_selection: also return which blocks were selected.

    Returns:
        out (B, Sq, Hq, Dv), packed (total_q, Hq, Dv), in q's dtype. With return_selection also
        block_indices, int32 (B, Sq, Hkv, n), packed (total_q, Hkv, n): ascending, unique, padded
        with -1 on the right.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_config(config)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_q(q, packed)
    check_kv(("k", "v"), k, v, q, packed)
    rows_k, num_kv_heads, dim_v = k.shape[-3], k.shape[-2], v.shape[-1]
    check_supported(q, num_kv_heads, dim_v, config)
    check_gates(gates, q, packed)
    seqlens = check_seqlens(q, rows_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if k_win is not None or v_win is not None:
        k_win, v_win = k if k_win is None else k_win, v if v_win is None else v_win
        check_kv(("k_win", "v_win"), k_win, v_win, q, packed, rows_k, num_kv_heads, dim_v)
    scale = check_softmax_scale(softmax_scale, q)

    if callable(compress):
        check_compressor(compress, config)
        k_raw, v_raw = k if k_cmp is None else k_cmp, v if v_cmp is None else v_cmp
        if k_cmp is not None or v_cmp is not None:
            check_kv(("k_cmp", "v_cmp"), k_raw, v_raw, q, packed, rows_k, num_kv_heads)
        compressed = compress(
            k_raw, v_raw, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=seqlens.max_seqlen_k
        )
    else:
        for name, raw in (("k_cmp", k_cmp), ("v_cmp", v_cmp)):
            if raw is not None:
                raise ValueError(
                    f"{name}: expected None where compress is a pair of compressed tokens "
                    f"({name} is what a compressor compresses), got a tensor"
                )
        compressed = compress
    k_tokens, v_tokens = check_pair(compressed)
    num_tokens = rows_k // config.block_stride if packed else config.num_compressed(rows_k)
    names = ("compress: k_cmp", "compress: v_cmp")
    check_kv(names, k_tokens, v_tokens, q, packed, num_tokens, num_kv_heads, dim_v, compressed=True)

    inputs = (q, k_tokens, v_tokens, k, v, k_win, v_win, gates)
    out, _, _, block_indices = torch.ops.nsa_ext.sparse_attn_fwd(
        *inputs,
        *seqlens,
        config.as_list(),
        scale,
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs),
        _is_deterministic(deterministic),
    )
    return (out, block_indices) if return_selection else out


def compress_kv(
    k: Tensor,
    v: Tensor,
    compress: Compress,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compressed tokens k_cmp[c] = phi_k(k[c*d : c*d + l)), and v_cmp likewise (eq. 7).

    Args:
        k: (B, Sk, Hkv, Dk), packed (total_k, Hkv, Dk).
        v: (B, Sk, Hkv, Dv), packed (total_k, Hkv, Dv).
        compress: a :class:`KVCompressor`, or a callable like it.
        cu_seqlens_k, max_seqlen_k: see the module.

    Returns:
        (B, Tc, Hkv, Dk) and (B, Tc, Hkv, Dv) with Tc = max(0, (Sk - l) // d + 1); packed
        (total_k // d, Hkv, Dk) and (total_k // d, Hkv, Dv).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if not callable(compress):
        raise TypeError(
            f"compress: expected a KVCompressor or a callable, got {type(compress).__name__}"
        )
    check_compress_input(k, v, cu_seqlens_k is not None)
    if cu_seqlens_k is not None:
        max_seqlen_k = check_cu_seqlens("_k", cu_seqlens_k, max_seqlen_k, k, "k", k.shape[0])
    return check_pair(compress(k, v, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k))


def compressed_attn(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    seqlen_k: int | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over the visible compressed tokens, c*d + l - 1 <= t, and the blocks that their
    softmax weights select (eq. 7-11). Differentiable in q, k_cmp and v_cmp.

    Args:
        q: (B, Sq, Hq, Dk), packed (total_q, Hq, Dk).
        k_cmp: (B, Tc, Hkv, Dk), packed (total_k // d, Hkv, Dk).
        v_cmp: (B, Tc, Hkv, Dv), packed (total_k // d, Hkv, Dv).
        seqlen_k: Sk, the number of raw keys; default: Sq. Not for packed batches, whose
            cu_seqlens_k and max_seqlen_k count raw keys.
        config, softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            deterministic: see the module.

    Returns:
        out (B, Sq, Hq, Dv), packed (total_q, Hq, Dv), in q's dtype, and block_indices, int32
        (B, Sq, Hkv, n), packed (total_q, Hkv, n): ascending, unique, padded with -1 on the right.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_config(config)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_q(q, packed)
    seqlen_k = _check_seqlen_k(seqlen_k, q, packed)
    num_tokens = None if packed else config.num_compressed(seqlen_k)
    check_kv(("k_cmp", "v_cmp"), k_cmp, v_cmp, q, packed, num_tokens, compressed=True)
    check_supported(q, k_cmp.shape[-2], v_cmp.shape[-1], config)
    rows_k = k_cmp.shape[0] if packed else seqlen_k
    seqlens = check_seqlens(
        q, rows_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, config.block_stride
    )
    out, _, block_indices = torch.ops.nsa_ext.compressed_attn_fwd(
        q,
        k_cmp,
        v_cmp,
        *seqlens,
        config.as_list(),
        check_softmax_scale(softmax_scale, q),
        _is_deterministic(deterministic),
    )
    return out, block_indices


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    *,
    seqlen_k: int | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """The n blocks of l' keys that matter most to each query and kv head (eq. 8-11), as
    :func:`compressed_attn` returns them, without the attention. Carries no gradient.

    The importance of block j is the softmax weight of the compressed tokens that overlap it, times
    the overlap in units of d, summed over the G heads of the group. The first num_init blocks and
    the last num_local up to the query's own are always chosen; of equal blocks the first.

    Args:
        q: (B, Sq, Hq, Dk), packed (total_q, Hq, Dk).
        k_cmp: (B, Tc, Hkv, Dk), packed (total_k // d, Hkv, Dk).
        seqlen_k: Sk, the number of raw keys; default: Sq. Not for packed batches.
        config, softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: see the
            module.

    Returns:
        int32 (B, Sq, Hkv, n), packed (total_q, Hkv, n): ascending, unique, padded with -1 on the
        right where a query has fewer than n candidates j*l' <= t.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_config(config)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_q(q, packed)
    seqlen_k = _check_seqlen_k(seqlen_k, q, packed)
    num_tokens = None if packed else config.num_compressed(seqlen_k)
    check_k("k_cmp", k_cmp, q, packed, num_tokens, compressed=True)
    rows_k = k_cmp.shape[0] if packed else seqlen_k
    seqlens = check_seqlens(
        q, rows_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, config.block_stride
    )
    return torch.ops.nsa_ext.select_blocks(
        q.detach(),
        k_cmp.detach(),
        *seqlens,
        config.as_list(),
        check_softmax_scale(softmax_scale, q),
    )


def selected_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    config: NSAConfig = DEFAULT_CONFIG,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attention over the keys s <= t of given blocks (eq. 12). Differentiable in q, k and v.

    Args:
        q: (B, Sq, Hq, Dk), packed (total_q, Hq, Dk).
        k: (B, Sk, Hkv, Dk), packed (total_k, Hkv, Dk).
        v: (B, Sk, Hkv, Dv), packed (total_k, Hkv, Dv).
        block_indices: int32 (B, Sq, Hkv, m), packed (total_q, Hkv, m), with any m >= 1: blocks
            [j*l', (j+1)*l') of keys, counted from the start of the sequence. Any order; a repeated
            index counts once, one outside [0, ceil(Sk / l')) counts as absent.
        config: select_size alone is used.
        softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic: see
            the module.

    Returns:
        (B, Sq, Hq, Dv), packed (total_q, Hq, Dv), in q's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_config(config)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_q(q, packed)
    check_kv(("k", "v"), k, v, q, packed)
    check_supported(q, k.shape[-2], v.shape[-1], config)
    check_block_indices(block_indices, q, k, packed)
    seqlens = check_seqlens(q, k.shape[-3], cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, _ = torch.ops.nsa_ext.selected_attn_fwd(
        q,
        k,
        v,
        block_indices,
        *seqlens,
        config.select_size,
        check_softmax_scale(softmax_scale, q),
        _is_deterministic(deterministic),
    )
    return out


def window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: NSAConfig = DEFAULT_CONFIG,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attention over the last w keys, t - w < s <= t, the window branch. Differentiable in q, k
    and v.

    Args:
        q: (B, Sq, Hq, Dk), packed (total_q, Hq, Dk).
        k: (B, Sk, Hkv, Dk), packed (total_k, Hkv, Dk).
        v: (B, Sk, Hkv, Dv), packed (total_k, Hkv, Dv).
        config: window alone is used.
        softmax_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic: see
            the module.

    Returns:
        (B, Sq, Hq, Dv), packed (total_q, Hq, Dv), in q's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_config(config)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_q(q, packed)
    check_kv(("k", "v"), k, v, q, packed)
    check_supported(q, k.shape[-2], v.shape[-1], config)
    seqlens = check_seqlens(q, k.shape[-3], cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, _ = torch.ops.nsa_ext.window_attn_fwd(
        q,
        k,
        v,
        *seqlens,
        config.window,
        check_softmax_scale(softmax_scale, q),
        _is_deterministic(deterministic),
    )
    return out


def _is_deterministic(deterministic: bool) -> bool:
    return bool(deterministic) or torch.are_deterministic_algorithms_enabled()


def check_pair(compressed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(compressed, (tuple, list)) or len(compressed) != 2:
        raise TypeError(
            "compress: expected a KVCompressor, a callable that returns (k_cmp, v_cmp), or such a "
            f"pair, got {type(compressed).__name__}"
        )
    return compressed[0], compressed[1]


def check_compressor(compress: Compress, config: NSAConfig) -> None:
    """A compressor built for other block lengths than the call's is a mistake."""
    own = getattr(compress, "config", config)
    for name in ("block_size", "block_stride"):
        if getattr(own, name) != getattr(config, name):
            raise ValueError(
                f"compress: expected a compressor of {name}={getattr(config, name)} as in config, "
                f"got {getattr(own, name)}"
            )


def _check_seqlen_k(seqlen_k: int | None, q: Tensor, packed: bool) -> int:
    """Sk of a batch that is not packed."""
    if packed:
        if seqlen_k is not None:
            raise ValueError(f"seqlen_k: expected None with cu_seqlens, got {seqlen_k}")
        return 0
    if seqlen_k is None:
        return q.shape[1]
    check_at_least("seqlen_k", seqlen_k, 0)
    return seqlen_k
