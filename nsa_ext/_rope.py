"""Rotary position embedding, for plain and packed batches."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_positions(starts: Tensor, rows: int) -> Tensor:
    """Position of each packed row within its sequence: (rows,).

    Args:
        starts: (B,), the row where each sequence starts. Of sequences that start at the same row
            the last one owns it, the others are empty.
    """
    row = torch.arange(rows, device=starts.device, dtype=starts.dtype)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    return row - starts[sequence]


def inverse_frequencies(dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """theta**(-2i / dim): (dim / 2,), float32 or, for float64, float64."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, dim, 2, device=device, dtype=dtype) / dim
    return theta**-exponent


def rotary_table(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """cos and sin of position * inv_freq, of (..., rows) positions: (2, ..., rows, 1, dim / 2)."""
    angle = positions.to(inv_freq.dtype)[..., None, None] * inv_freq
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of (..., rows, H, D) by the angles of ``table``."""
    cos, sin = table
    a, b = x.to(table.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
