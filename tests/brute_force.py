"""NSA by loops, straight from the definitions: one sequence, one head, one key at a time.

Slow and obvious on purpose. It is what `nsa_ext.reference` is tested against, on tiny sizes;
everything else is tested against `nsa_ext.reference`. All functions take one sequence without a
batch axis, `(S, H, D)`, in float64.
"""

import math

import torch


def num_compressed(seqlen, config):
    count = 0
    while count * config.block_stride + config.block_size <= seqlen:
        count += 1
    return count


def gelu(x):
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def compress(x, config, *, weight=None, pos=None, w1=None, b1=None, w2=None, b2=None):
    """phi over every complete block; pooling (mean without `weight`) unless `w1` is given."""
    seqlen, heads, _ = x.shape
    rows = []
    for c in range(num_compressed(seqlen, config)):
        row = []
        for h in range(heads):

            def of_head(w, h=h):
                return None if w is None else w[h if w.shape[0] > 1 else 0]

            block = [x[c * config.block_stride + r, h] for r in range(config.block_size)]
            if pos is not None:
                block = [element + of_head(pos)[r] for r, element in enumerate(block)]
            if w1 is None:
                out = torch.zeros_like(block[0])
                for r, element in enumerate(block):
                    share = 1.0 / config.block_size if weight is None else of_head(weight)[r]
                    out = out + share * element
            else:
                out = of_head(w1) @ torch.cat(block)
                if b1 is not None:
                    out = out + of_head(b1)
                if w2 is not None:
                    hidden = torch.tensor([gelu(a.item()) for a in out], dtype=x.dtype)
                    out = of_head(w2) @ hidden
                    if b2 is not None:
                        out = out + of_head(b2)
            row.append(out)
        rows.append(torch.stack(row))
    dim_out = rows[0].shape[-1] if rows else (x.shape[-1] if w1 is None else 0)
    return torch.stack(rows) if rows else x.new_zeros(0, heads, dim_out)


def softmax_attention(query, keys, values, scale):
    """Output, LSE and probabilities of one query over a list of keys."""
    if not keys:
        return None, -math.inf, []
    scores = [scale * torch.dot(query, key).item() for key in keys]
    top = max(scores)
    total = sum(math.exp(score - top) for score in scores)
    probs = [math.exp(score - top) / total for score in scores]
    out = sum(p * value for p, value in zip(probs, values, strict=True))
    return out, top + math.log(total), probs


def overlap(c, j, config):
    """Keys that compressed token c and selection block j have in common, in strides (eq. 9)."""
    keys = range(c * config.block_stride, c * config.block_stride + config.block_size)
    common = [s for s in keys if s // config.select_size == j]
    assert len(common) % config.block_stride == 0
    return len(common) // config.block_stride


def select(importance, t, config):
    """block_indices of one row from the importance of every block (eq. 11)."""
    candidates = [j for j in range(len(importance)) if j * config.select_size <= t]
    own = t // config.select_size
    forced = [j for j in candidates if j < config.num_init or own - j < config.num_local]
    rest = [j for j in candidates if j not in forced]
    rest.sort(key=lambda j: (-importance[j], j))
    chosen = sorted(forced + rest[: config.num_selected - len(forced)])
    return chosen + [-1] * (config.num_selected - len(chosen))


def attend(q, k, v, scale, visible):
    """Attention of q (Sq, Hq, Dk) where row i of kv head g sees the keys `visible(i, g)`."""
    seqlen_q, heads_q, _ = q.shape
    group = heads_q // k.shape[1]
    out = q.new_zeros(seqlen_q, heads_q, v.shape[-1])
    lse = q.new_full((heads_q, seqlen_q), -math.inf)
    for i in range(seqlen_q):
        for h in range(heads_q):
            g = h // group
            keys = visible(i, g)
            row, lse[h, i], _ = softmax_attention(
                q[i, h], [k[s, g] for s in keys], [v[s, g] for s in keys], scale
            )
            if row is not None:
                out[i, h] = row
    return out, lse


def importance(q, k_cmp, seqlen_k, config, scale):
    """imp[i, g, j] of eq. 8-10 over all the selection blocks of the sequence."""
    seqlen_q, heads_q, _ = q.shape
    heads_kv = k_cmp.shape[1]
    group = heads_q // heads_kv
    blocks = math.ceil(seqlen_k / config.select_size)
    imp = q.new_zeros(seqlen_q, heads_kv, blocks)
    for i in range(seqlen_q):
        visible = visible_compressed(i + seqlen_k - seqlen_q, k_cmp.shape[0], config)
        for h in range(heads_q):
            g = h // group
            keys = [k_cmp[c, g] for c in visible]
            _, _, probs = softmax_attention(q[i, h], keys, keys, scale)
            for c, p in zip(visible, probs, strict=True):
                for j in range(blocks):
                    imp[i, g, j] += overlap(c, j, config) * p
    return imp


def visible_compressed(t, count, config):
    last = [c * config.block_stride + config.block_size - 1 for c in range(count)]
    return [c for c in range(count) if last[c] <= t]


def compressed_attn(q, k_cmp, v_cmp, seqlen_k, config, scale):
    """(out, lse, block_indices)"""
    shift = seqlen_k - q.shape[0]
    out, lse = attend(
        q, k_cmp, v_cmp, scale, lambda i, g: visible_compressed(i + shift, k_cmp.shape[0], config)
    )
    imp = importance(q, k_cmp, seqlen_k, config, scale)
    rows = [
        [select(imp[i, g].tolist(), i + shift, config) for g in range(imp.shape[1])]
        for i in range(imp.shape[0])
    ]
    shape = (q.shape[0], k_cmp.shape[1], config.num_selected)
    return out, lse, torch.tensor(rows, dtype=torch.int32).reshape(shape)


def selected_attn(q, k, v, block_indices, config, scale):
    seqlen_k, shift = k.shape[0], k.shape[0] - q.shape[0]

    def visible(i, g):
        blocks = set(block_indices[i, g].tolist())
        return [s for s in range(seqlen_k) if s <= i + shift and s // config.select_size in blocks]

    return attend(q, k, v, scale, visible)


def window_attn(q, k, v, config, scale):
    shift = k.shape[0] - q.shape[0]

    def visible(i, g):
        t = i + shift
        return [s for s in range(k.shape[0]) if t - config.window < s <= t]

    return attend(q, k, v, scale, visible)
