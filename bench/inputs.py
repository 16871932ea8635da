"""Inputs of the benchmarks: random and coherent queries, and how much neighbours agree."""

import torch
from attentions import Inputs

import nsa_ext

CHUNK = 256
# Neighbours then share about 3/4 of their unforced blocks at 65536 tokens (each row has its share).
COHERENT_RHO = 0.975


def ar1(x: torch.Tensor, rho: float) -> torch.Tensor:
    """Slow random walk along dim 1: y[t] = rho * y[t-1] + sqrt(1 - rho^2) * x[t].

    Args:
        x: (B, S, H, D) standard normal.
    """
    batch, seqlen, heads, dim = x.shape
    pad = -seqlen % CHUNK
    noise = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad)).float() * (1 - rho**2) ** 0.5
    noise[:, 0] = x[:, 0].float()
    noise = noise.reshape(batch, -1, CHUNK, heads * dim)
    steps = torch.arange(CHUNK, device=x.device)
    lags = steps[:, None] - steps
    kernel = torch.where(lags >= 0, rho ** lags.clamp(min=0).float(), 0.0)
    out = torch.empty_like(noise)
    carry = torch.zeros(batch, heads * dim, device=x.device)
    for chunk in range(noise.shape[1]):
        out[:, chunk] = kernel @ noise[:, chunk] + rho ** (steps[:, None] + 1) * carry[:, None]
        carry = out[:, chunk, -1]
    return out.reshape(batch, -1, heads, dim)[:, :seqlen].to(x.dtype)


def make_inputs(
    kind: str,
    batch: int,
    seqlen: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
    *,
    compress: str = "mean",
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Inputs:
    """Normal q, k, v, sigmoids of normals as gates. "coherent": the queries of a head are an AR(1)
    walk."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    q = normal(batch, seqlen, num_heads, head_dim)
    if kind == "coherent":
        q = ar1(q, COHERENT_RHO)
    k = normal(batch, seqlen, num_kv_heads, head_dim)
    v = normal(batch, seqlen, num_kv_heads, head_dim_v)
    gates = normal(batch, seqlen, num_heads, 3).sigmoid()
    phi = nsa_ext.KVCompressor(head_dim, head_dim_v, kind=compress, device=device, dtype=dtype)
    return Inputs(kind, [q, k, v, gates], phi)


def shared_fraction(
    block_indices: torch.Tensor, config: nsa_ext.NSAConfig, distance: int = 1
) -> float:
    """Share of its unforced blocks that a query has in common with the one `distance` before it.

    Over the last quarter of the sequence and full rows. Blocks that were forced for either query
    do not count.

    Args:
        block_indices: (B, S, Hkv, n) int32.

    Returns:
        NaN where there is no such query.
    """
    seqlen = block_indices.shape[1]
    t = torch.arange(3 * seqlen // 4 + distance, seqlen, device=block_indices.device)
    shared = unforced = 0
    for part in t.split(4096):
        here, before = block_indices[:, part], block_indices[:, part - distance]
        own = ((part - distance) // config.select_size)[:, None, None]  # of the earlier query
        chosen = (here >= config.num_init) & (here <= own - config.num_local)
        common = (here[..., :, None] == before[..., None, :]).any(-1)
        shared += int((common & chosen).sum())
        unforced += int(chosen.sum())
    return shared / unforced if unforced else float("nan")


def distinct_blocks(block_indices: torch.Tensor, tokens: int) -> float:
    """Mean number of distinct blocks that `tokens` consecutive queries of a kv head name.

    Over the last quarter of the sequence.

    Args:
        block_indices: (B, S, Hkv, n) int32.
    """
    last = block_indices[:, 3 * block_indices.shape[1] // 4 :]
    tiles = last.shape[1] // tokens
    tiled = last[:, : tiles * tokens].unflatten(1, (tiles, tokens)).transpose(2, 3)
    total = 0
    for part in tiled.split(512, dim=1):
        row = part.flatten(-2).sort(dim=-1).values  # (B, tiles, Hkv, tokens * n)
        new = (row[..., 1:] != row[..., :-1]).sum(-1) + 1
        total += int((new - (row[..., 0] < 0).int()).sum())
    return total / (last.shape[0] * tiles * last.shape[2])
