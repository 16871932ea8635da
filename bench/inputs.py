"""Inputs of the benchmarks: random and coherent queries, and how much neighbours agree."""

import torch

CHUNK = 256


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
    batch: int,
    seqlen: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
    *,
    rho: float = 0.0,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and gates (sigmoids of normals); rho > 0: the queries of a head are an AR(1) walk."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    q = normal(batch, seqlen, num_heads, head_dim)
    if rho:
        q = ar1(q, rho)
    k = normal(batch, seqlen, num_kv_heads, head_dim)
    v = normal(batch, seqlen, num_kv_heads, head_dim_v)
    gates = normal(batch, seqlen, num_heads, 3).sigmoid()
    return q, k, v, gates


def shared_fraction(block_indices: torch.Tensor, select_size: int, num_forced: int) -> float:
    """Share of its unforced blocks that a query has in common with its predecessor.

    Over the last quarter of the sequence.

    Args:
        block_indices: (B, S, Hkv, n) int32, full rows.
        select_size: l'; pairs across a block border have other forced blocks and are left out.
        num_forced: num_init + num_local.
    """
    seqlen, n = block_indices.shape[1], block_indices.shape[-1]
    t = torch.arange(3 * seqlen // 4 + 1, seqlen, device=block_indices.device)
    t = t[t % select_size != 0]
    here, before = block_indices[:, t], block_indices[:, t - 1]
    shared = (here[..., :, None] == before[..., None, :]).any(-1).sum(-1).float()
    return ((shared - num_forced) / (n - num_forced)).mean().item()
