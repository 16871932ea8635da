"""Native Sparse Attention in plain PyTorch: documentation that runs, and the tests' oracle.

The paper is arXiv 2502.11089; "eq. n" is an equation of it. Symbols: B batch, Sq/Sk query/key
length, Hq/Hkv query/key-value heads, G = Hq / Hkv, Dk/Dv head dims, l compression block, d
compression stride, l' selection block, n selected blocks, w window, Tc compressed tokens.

Query i of a sequence sits at position t = i + (Sk - Sq). A query that sees no key has out = 0 and
lse = -inf, and sends no gradient.

Any dtype, any device; plain torch differentiates it. In float32 and float64 everything is computed
in that dtype. In 16-bit dtypes it rounds where a fused kernel rounds (softmax weights before their
product with V, the output of each branch, phi's hidden layer; for gradients see
:class:`_FusedAttention`) and accumulates in float32.

Every function takes (B, S, H, D) tensors or, with ``cu_seqlens_q``/``cu_seqlens_k`` (int32, B + 1
row offsets), packed (T, H, D) tensors. Compressed token c of a packed sequence that starts at key
row r lies in row ``r // d + c`` of ``total_k // d`` rows; rows that hold no token are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .config import DEFAULT_CONFIG, NSAConfig

if TYPE_CHECKING:
    from .compressor import KVCompressor, Phi

# Scores held at a time: queries are walked in chunks, so that long sequences fit in memory.
_MAX_SCORES = 2**25


# Compression: eq. 7.


def compress(
    x: Tensor,
    *,
    kind: str,
    config: NSAConfig,
    weight: Tensor | None = None,
    pos: Tensor | None = None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compressed tokens phi(x[c*d : c*d + l)), c = 0 .. Tc-1 (eq. 7).

    kind ``mean``:     sum_r (1/l) x[c*d + r]
    kind ``weighted``: sum_r weight[r] (x[c*d + r] + pos[r])
    kind ``linear``:   w1 vec(x + pos) + b1
    kind ``mlp``:      w2 gelu(w1 vec(x + pos) + b1) + b2

    Args:
        x: (B, Sk, Hkv, D), or packed (total_k, Hkv, D).
        weight: (Hw, l); Hw is 1 (one phi for all heads) or Hkv (one for each).
        pos: (Hw, l, D), the intra-block position encoding.
        w1: (Hw, hidden, l * D); b1: (Hw, hidden). ``linear`` has hidden = D_out.
        w2: (Hw, D_out, hidden); b2: (Hw, D_out).

    Returns:
        (B, Tc, Hkv, D_out), or packed (total_k // d, Hkv, D_out).
    """
    params = {"weight": weight, "pos": pos, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    if cu_seqlens is not None:
        return _compress_packed(x, cu_seqlens, config, dict(kind=kind, config=config, **params))

    acc = _acc_dtype(x)
    num_heads = x.shape[2]
    # Weights in the accumulation dtype, one per head: (Hkv, ...).
    weight, pos, w1, b1, w2, b2 = (
        p if p is None else p.to(acc).expand(num_heads, *p.shape[1:]) for p in params.values()
    )
    block = _blocks(x, config).to(acc)  # (B, Tc, Hkv, l, D)
    if kind == "mean":
        return block.mean(dim=3).to(x.dtype)
    if pos is not None:
        block = _round(block + pos, x.dtype)
    if kind == "weighted":
        return torch.einsum("bchrd,hr->bchd", block, weight).to(x.dtype)
    out = torch.einsum("bchm,hom->bcho", block.flatten(3), w1)
    if b1 is not None:
        out = out + b1
    if kind == "mlp":
        hidden = _round(F.gelu(out), x.dtype)
        out = torch.einsum("bchm,hom->bcho", hidden, w2)
        if b2 is not None:
            out = out + b2
    elif kind != "linear":
        raise ValueError(f"kind: expected mean, weighted, linear or mlp, got {kind!r}")
    return out.to(x.dtype)


def compress_kv(
    k: Tensor, v: Tensor, compressor: KVCompressor, *, cu_seqlens_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(k_cmp, v_cmp) of a :class:`nsa_ext.KVCompressor`, computed by :func:`compress` (eq. 7)."""

    def run(x: Tensor, phi: Phi) -> Tensor:
        weights = {n: w if w is None else w.to(x.dtype) for n, w in phi.weights().items()}
        return compress(
            x, kind=phi.kind, config=compressor.config, cu_seqlens=cu_seqlens_k, **weights
        )

    return run(k, compressor.phi_k), run(v, compressor.phi_v)


def _blocks(x: Tensor, config: NSAConfig) -> Tensor:
    """The overlapping blocks x[c*d : c*d + l): (B, S, H, D) -> (B, Tc, H, l, D)."""
    if x.shape[1] < config.block_size:
        return x[:, :0, :, None].expand(-1, -1, -1, config.block_size, -1)
    return x.unfold(1, config.block_size, config.block_stride).transpose(3, 4)


def _compress_packed(x: Tensor, cu_seqlens: Tensor, config: NSAConfig, kwargs: dict) -> Tensor:
    tokens = [compress(x[rows][None], **kwargs)[0] for rows in _rows(cu_seqlens)]
    tokens.append(compress(x[None, :0], **kwargs)[0])  # gives D_out where there is no sequence
    starts = [rows.start // config.block_stride for rows in _rows(cu_seqlens)]
    starts.append(x.shape[0] // config.block_stride)
    pieces, row = [], 0
    for start, token in zip(starts, tokens, strict=True):
        pieces += [token.new_zeros(start - row, *token.shape[1:]), token]
        row = start + len(token)
    return torch.cat(pieces)


# Which keys a query sees. A mask is (B or 1, queries, Hkv or 1, keys).


def positions(seqlen_q: int, seqlen_k: int, device=None) -> Tensor:
    """t = i + (Sk - Sq) of each query: (Sq,). Negative where Sq > Sk."""
    return torch.arange(seqlen_q, device=device) + (seqlen_k - seqlen_q)


def compressed_mask(t: Tensor, num_compressed: int, config: NSAConfig) -> Tensor:
    """A compressed token is visible once it is complete: c*d + l - 1 <= t."""
    c = torch.arange(num_compressed, device=t.device)
    return (c * config.block_stride + config.block_size - 1 <= t[:, None])[None, :, None]


def selected_mask(t: Tensor, seqlen_k: int, block_indices: Tensor, config: NSAConfig) -> Tensor:
    """Keys s <= t of the chosen blocks (eq. 12). Order is free, a repeated index counts once, an
    index outside [0, ceil(Sk / l')) counts as absent. block_indices: (B, queries, Hkv, n)."""
    num_blocks = config.num_select_blocks(seqlen_k)
    index = block_indices.long()
    index = torch.where((index >= 0) & (index < num_blocks), index, num_blocks)
    chosen = torch.zeros(*index.shape[:3], num_blocks + 1, dtype=torch.bool, device=t.device)
    chosen = chosen.scatter(-1, index, True)  # the last column collects the absent ones
    s = torch.arange(seqlen_k, device=t.device)
    return chosen[..., s // config.select_size] & (s <= t[:, None, None])


def window_mask(t: Tensor, seqlen_k: int, config: NSAConfig) -> Tensor:
    """The last w keys: t - w < s <= t."""
    s = torch.arange(seqlen_k, device=t.device)
    return ((t[:, None] - config.window < s) & (s <= t[:, None]))[None, :, None]


# Attention over visible keys.


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Callable[[slice], Tensor],
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T over the visible keys) v, the attention of every branch (eq. 3-4).

    Args:
        q: (B, Sq, Hq, Dk). k: (B, Sk, Hkv, Dk). v: (B, Sk, Hkv, Dv).
        visible: mask of the keys that a range of queries sees.

    Returns:
        out (B, Sq, Hq, Dv) and the natural-log lse (B, Hq, Sq).
    """

    def attend(rows: slice, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask, keys = _crop(visible(rows))
        k, v = k[:, keys], v[:, keys]
        score, p, total, lse = _softmax(q[:, rows], k, mask, softmax_scale)
        if p.dtype == v.dtype:
            out = torch.einsum("bihgj,bjhd->bihgd", p, v) / total
        else:
            out = _FusedAttention.apply(score, p.detach(), total.detach(), v)
        return out.flatten(2, 3), lse.flatten(2, 3).transpose(1, 2)

    out, lse = [], []
    for rows in _chunks(q, k):
        # Checkpointed: the backward computes the chunk's scores again.
        chunk_out, chunk_lse = checkpoint(
            attend, rows, q, k, v, use_reentrant=False, preserve_rng_state=False
        )
        out.append(chunk_out)
        lse.append(chunk_lse)
    return torch.cat(out, dim=1), torch.cat(lse, dim=2)


class _FusedAttention(torch.autograd.Function):
    """p v / total with 16-bit v, where p = exp(score - row maximum) and total is its row sum.

    Its gradients are those of a fused kernel, which keeps the rounded output alone, computes the
    weights again and multiplies 16-bit matrices: the weights are rounded before dv, the score's
    gradient before its products with q and k, and sum(dout * out) takes the rounded out.
    """

    @staticmethod
    def forward(ctx, score, p, total, v):
        out = torch.einsum("bihgj,bjhd->bihgd", _round(p, v.dtype), v.to(p.dtype)) / total
        out = out.to(v.dtype)
        ctx.save_for_backward(p / total, v, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        weight, v, out = ctx.saved_tensors
        dout = dout.to(weight.dtype)
        dv = torch.einsum("bihgj,bihgd->bjhd", _round(weight, v.dtype), dout).to(v.dtype)
        dweight = torch.einsum("bihgd,bjhd->bihgj", dout, v.to(weight.dtype))
        delta = (dout * out).sum(dim=-1, keepdim=True)
        return _round(weight * (dweight - delta), v.dtype), None, None, dv


def _crop(mask: Tensor) -> tuple[Tensor, slice]:
    """The mask without the keys on both sides that no query sees, and the range that is left."""
    seen = mask.flatten(0, 2).any(dim=0).nonzero()
    keys = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)
    return mask[..., keys], keys


def _softmax(
    q: Tensor, k: Tensor, visible: Tensor, softmax_scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of the visible keys (B, Sq, Hkv, G, Sk), exp(score - row maximum), its row sum
    (B, Sq, Hkv, G, 1; 1 where nothing is visible), and lse (B, Sq, Hkv, G)."""
    acc = _acc_dtype(q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    grouped = q.to(acc).unflatten(2, (k.shape[2], q.shape[2] // k.shape[2]))
    score = torch.einsum("bihgd,bjhd->bihgj", grouped, k.to(acc)) * scale
    visible = visible[..., None, :]
    score = score.masked_fill(~visible, -torch.inf)
    sees_any = visible.any(dim=-1, keepdim=True)
    if k.shape[1]:
        row_max = score.detach().amax(dim=-1, keepdim=True).masked_fill(~sees_any, 0)
    else:
        row_max = score.new_zeros(*score.shape[:-1], 1)
    p = torch.exp(score - row_max)
    total = p.sum(dim=-1, keepdim=True).masked_fill(~sees_any, 1)
    lse = (row_max + total.log()).masked_fill(~sees_any, -torch.inf)
    return score, p, total, lse.squeeze(-1)


# The branches.


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
    return_lse: bool = False,
) -> tuple[Tensor, ...]:
    """Attention over the compressed tokens, and the blocks that they select (eq. 7-11).

    Args:
        q: (B, Sq, Hq, Dk). k_cmp: (B, Tc, Hkv, Dk). v_cmp: (B, Tc, Hkv, Dv).
        seqlen_k: Sk, the number of raw keys; Sq where absent. Packed: from cu_seqlens_k.

    Returns:
        out (B, Sq, Hq, Dv), block_indices (B, Sq, Hkv, n) and with return_lse the lse (B, Hq, Sq).
    """
    kwargs = {"config": config, "softmax_scale": softmax_scale}
    if cu_seqlens_q is not None:
        parts = [
            compressed_attn(q_, k_, v_, seqlen_k=sk, return_lse=True, **kwargs)
            for q_, k_, v_, sk in _compressed_sequences(
                cu_seqlens_q, cu_seqlens_k, config, q, k_cmp, v_cmp
            )
        ]
        empty = [q.new_zeros(0, q.shape[1], v_cmp.shape[2]), _no_blocks(q, k_cmp, config)]
        out, blocks = (_cat([p[i] for p in parts], empty[i]) for i in range(2))
        lse = _cat_lse([p[2] for p in parts], q)
    else:
        seqlen_k = q.shape[1] if seqlen_k is None else seqlen_k
        t = positions(q.shape[1], seqlen_k, q.device)
        out, lse = attention(
            q, k_cmp, v_cmp, lambda rows: compressed_mask(t[rows], k_cmp.shape[1], config),
            softmax_scale,
        )  # fmt: skip
        blocks = select_blocks(
            importance(q, k_cmp, seqlen_k=seqlen_k, **kwargs), seqlen_k=seqlen_k, config=config
        )
    return (out, blocks, lse) if return_lse else (out, blocks)


def overlap(num_compressed: int, num_blocks: int, config: NSAConfig, device=None) -> Tensor:
    """overlap(c, j) = |[c*d, c*d + l) intersect [j*l', (j+1)*l')| / d: (Tc, blocks) (eq. 9)."""
    start = torch.arange(num_compressed, device=device)[:, None] * config.block_stride
    block_start = torch.arange(num_blocks, device=device) * config.select_size
    end = torch.minimum(start + config.block_size, block_start + config.select_size)
    return (end - torch.maximum(start, block_start)).clamp(min=0) // config.block_stride


@torch.no_grad()
def importance(
    q: Tensor,
    k_cmp: Tensor,
    *,
    seqlen_k: int | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Importance of each selection block for each query and kv head (eq. 8-10).

    imp[j] = sum over the G heads of the group, sum over c, of overlap(c, j) * p[c], where p is the
    softmax of the compressed branch (eq. 8).

    Returns:
        (B, Sq, Hkv, ceil(Sk / l')), packed (total_q, Hkv, ceil(max Sk / l')), zero where a
        sequence has no such block; float32, for float64 inputs float64.
    """
    kwargs = {"config": config, "softmax_scale": softmax_scale}
    if cu_seqlens_q is not None:
        parts = [
            importance(q_, k_, seqlen_k=sk, **kwargs)[0]
            for q_, k_, sk in _compressed_sequences(cu_seqlens_q, cu_seqlens_k, config, q, k_cmp)
        ]
        width = max((part.shape[2] for part in parts), default=0)
        empty = q.new_zeros(0, k_cmp.shape[1], width, dtype=_acc_dtype(q))
        return torch.cat([*(F.pad(part, (0, width - part.shape[2])) for part in parts), empty])

    seqlen_k = q.shape[1] if seqlen_k is None else seqlen_k
    t = positions(q.shape[1], seqlen_k, q.device)
    num_compressed = k_cmp.shape[1]
    weight = overlap(num_compressed, config.num_select_blocks(seqlen_k), config, q.device)
    result = []
    for rows in _chunks(q, k_cmp):
        mask = compressed_mask(t[rows], num_compressed, config)
        _, p, total, _ = _softmax(q[:, rows], k_cmp, mask, softmax_scale)
        result.append((p / total).sum(dim=3) @ weight.to(p.dtype))
    return torch.cat(result, dim=1)


@torch.no_grad()
def select_blocks(
    importance: Tensor,
    *,
    seqlen_k: int | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """The n blocks that each query attends to (eq. 11).

    Candidates are the blocks with j*l' <= t. The first num_init and the last num_local up to the
    one that holds t are forced; then highest importance first, of equal ones the lower index.

    Args:
        importance: (B, Sq, Hkv, ceil(Sk / l')), or packed, as :func:`importance` returns it.

    Returns:
        int32 (B, Sq, Hkv, n), ascending, unique, -1 padded on the right; packed (total_q, Hkv, n).
    """
    if cu_seqlens_q is not None:
        parts = [
            select_blocks(importance[rows_q][None], seqlen_k=_length(rows_k), config=config)
            for rows_q, rows_k in zip(_rows(cu_seqlens_q), _rows(cu_seqlens_k), strict=True)
        ]
        shape = (0, importance.shape[1], config.num_selected)
        return _cat(parts, torch.zeros(shape, dtype=torch.int32, device=importance.device))

    seqlen_q = importance.shape[1]
    t = positions(seqlen_q, seqlen_q if seqlen_k is None else seqlen_k, importance.device)
    t = t[:, None, None]
    j = torch.arange(importance.shape[-1], device=importance.device)
    candidate = j * config.select_size <= t
    own = t.div(config.select_size, rounding_mode="floor")
    forced = candidate & ((j < config.num_init) | (j > own - config.num_local))
    score = importance.masked_fill(forced, torch.inf).masked_fill(~candidate, -torch.inf)

    order = score.argsort(dim=-1, descending=True, stable=True)[..., : config.num_selected]
    absent = ~candidate.expand_as(score).gather(-1, order)
    chosen = order.masked_fill(absent, len(j)).sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == len(j), -1)
    padding = config.num_selected - chosen.shape[-1]
    return F.pad(chosen, (0, padding), value=-1).to(torch.int32)


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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the keys s <= t of the selected blocks (eq. 12).

    Args:
        q: (B, Sq, Hq, Dk). k: (B, Sk, Hkv, Dk). v: (B, Sk, Hkv, Dv).
        block_indices: int32 (B, Sq, Hkv, n), see :func:`selected_mask`.

    Returns:
        out (B, Sq, Hq, Dv), and with return_lse the lse (B, Hq, Sq).
    """
    kwargs = {"config": config, "softmax_scale": softmax_scale, "return_lse": True}
    if cu_seqlens_q is not None:
        parts = [
            selected_attn(
                q[rows_q][None],
                k[rows_k][None],
                v[rows_k][None],
                block_indices[rows_q][None],
                **kwargs,
            )
            for rows_q, rows_k in zip(_rows(cu_seqlens_q), _rows(cu_seqlens_k), strict=True)
        ]
        out, lse = _cat_attention(parts, q, v)
    else:
        t = positions(q.shape[1], k.shape[1], q.device)
        out, lse = attention(
            q, k, v,
            lambda rows: selected_mask(t[rows], k.shape[1], block_indices[:, rows], config),
            softmax_scale,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: NSAConfig = DEFAULT_CONFIG,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the last w keys, t - w < s <= t.

    Args:
        q: (B, Sq, Hq, Dk). k: (B, Sk, Hkv, Dk). v: (B, Sk, Hkv, Dv).

    Returns:
        out (B, Sq, Hq, Dv), and with return_lse the lse (B, Hq, Sq).
    """
    kwargs = {"config": config, "softmax_scale": softmax_scale, "return_lse": True}
    if cu_seqlens_q is not None:
        parts = [
            window_attn(q[rows_q][None], k[rows_k][None], v[rows_k][None], **kwargs)
            for rows_q, rows_k in zip(_rows(cu_seqlens_q), _rows(cu_seqlens_k), strict=True)
        ]
        out, lse = _cat_attention(parts, q, v)
    else:
        t = positions(q.shape[1], k.shape[1], q.device)
        out, lse = attention(
            q, k, v, lambda rows: window_mask(t[rows], k.shape[1], config), softmax_scale
        )
    return (out, lse) if return_lse else out


# The whole operator.


def sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    compress: KVCompressor | tuple[Tensor, Tensor],
    *,
    config: NSAConfig = DEFAULT_CONFIG,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_indices: Tensor | None = None,
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """g_cmp * o_cmp + g_slc * o_slc + g_win * o_win (eq. 5).

    Args:
        q: (B, Sq, Hq, Dk). k: (B, Sk, Hkv, Dk). v: (B, Sk, Hkv, Dv).
        gates: (B, Sq, Hq, 3) in the order compressed, selected, window.
        compress: a :class:`nsa_ext.KVCompressor`, or the pair (B, Tc, Hkv, Dk), (B, Tc, Hkv, Dv).
        k_cmp, v_cmp: raw K and V of the compressed branch; k and v where absent.
        k_win, v_win: K and V of the window branch; k and v where absent.
        block_indices: attend to these blocks instead of those that the compressed branch selects.

    Returns:
        out (B, Sq, Hq, Dv), and with return_selection the block_indices (B, Sq, Hkv, n).
    """
    kwargs = {
        "config": config,
        "softmax_scale": softmax_scale,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    if callable(compress):
        k_raw, v_raw = k if k_cmp is None else k_cmp, v if v_cmp is None else v_cmp
        compress = compress_kv(k_raw, v_raw, compress, cu_seqlens_k=cu_seqlens_k)
    seqlen_k = None if cu_seqlens_k is not None else k.shape[1]
    o_cmp, chosen = compressed_attn(q, *compress, seqlen_k=seqlen_k, **kwargs)
    if block_indices is not None:
        chosen = block_indices
    o_slc = selected_attn(q, k, v, chosen, **kwargs)
    o_win = window_attn(q, k if k_win is None else k_win, v if v_win is None else v_win, **kwargs)
    acc = _acc_dtype(q)
    branches = torch.stack([o_cmp, o_slc, o_win], dim=-1).to(acc)
    out = (branches * gates.to(acc)[..., None, :]).sum(dim=-1).to(q.dtype)
    return (out, chosen) if return_selection else out


# Precision, chunks of queries, sequences of a packed batch.


def _acc_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with the precision of ``dtype``, in x's own dtype."""
    return x.to(dtype).to(x.dtype)


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    """Ranges of queries whose scores against k number at most _MAX_SCORES; at least one range."""
    step = max(1, _MAX_SCORES // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    return [slice(i, min(i + step, q.shape[1])) for i in range(0, max(1, q.shape[1]), step)]


def _rows(cu_seqlens: Tensor) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise(cu_seqlens.tolist())]


def _length(rows: slice) -> int:
    return rows.stop - rows.start


def _compressed_sequences(cu_seqlens_q, cu_seqlens_k, config: NSAConfig, q: Tensor, *kv_cmp):
    """q, the compressed K (and V) and the number of raw keys, one sequence after the other."""
    for rows_q, rows_k in zip(_rows(cu_seqlens_q), _rows(cu_seqlens_k), strict=True):
        first = rows_k.start // config.block_stride
        rows = slice(first, first + config.num_compressed(_length(rows_k)))
        yield q[rows_q][None], *(x[rows][None] for x in kv_cmp), _length(rows_k)


def _cat(parts: list[Tensor], empty: Tensor) -> Tensor:
    return torch.cat([*(part[0] for part in parts), empty])


def _cat_lse(parts: list[Tensor], q: Tensor) -> Tensor:
    empty = q.new_zeros(q.shape[1], 0, dtype=_acc_dtype(q))
    return torch.cat([*(part[0] for part in parts), empty], dim=1)


def _cat_attention(parts, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = _cat([p[0] for p in parts], q.new_zeros(0, q.shape[1], v.shape[2]))
    return out, _cat_lse([p[1] for p in parts], q)


def _no_blocks(q: Tensor, k_cmp: Tensor, config: NSAConfig) -> Tensor:
    shape = (0, k_cmp.shape[1], config.num_selected)
    return torch.zeros(shape, dtype=torch.int32, device=q.device)
