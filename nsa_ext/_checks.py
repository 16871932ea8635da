"""Argument checks of the public functions: every bad input gets a TypeError or ValueError that
names the argument, what was expected and what came, before anything is launched.

They read no values from a GPU. cu_seqlens on the CPU are read, except while compiling.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._layout import rows_aligned
from .config import NSAConfig
from .info import supports

CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)


class Seqlens(NamedTuple):
    """The arguments of the attention operators that say where sequences start and end."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


def check_config(config: NSAConfig) -> None:
    if not isinstance(config, NSAConfig):
        raise TypeError(f"config: expected an NSAConfig, got {type(config).__name__}")


def check_tensor(
    name: str,
    x: Any,
    dims: tuple[str, ...],
    sizes: tuple[int | None, ...],
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
    fits_to: str = "",
) -> None:
    """x is a tensor of these sizes (None: any), contiguous in its last dim, on the device of
    ``like`` (q) and of its dtype, or of ``dtype``. ``fits_to`` names where the sizes come from."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    shape = x.shape
    fits = len(shape) == len(sizes)
    for actual, size in zip(shape, sizes, strict=False):
        fits = fits and (size is None or actual == size)
    if not fits:
        expected = ", ".join(
            dim if size is None else f"{dim}={size}" for dim, size in zip(dims, sizes, strict=True)
        )
        source = f" to fit {fits_to}" if fits_to else ""
        raise ValueError(f"{name}: expected shape ({expected}){source}, got {tuple(shape)}")
    if dtype is None and like is not None:
        dtype = like.dtype
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {x.device}")
    if shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected the last dim to be contiguous, got strides {x.stride()}"
        )


def check_floating(name: str, x: Tensor) -> None:
    """x has a dtype that its device supports."""
    device = x.device.type
    if device not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: expected a tensor on cpu or cuda, got device {x.device}")
    dtypes = CUDA_DTYPES if device == "cuda" else CPU_DTYPES
    if x.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected one of {expected} on {device}, got {x.dtype}")


def check_aligned(name: str, x: Tensor) -> None:
    """A compiled call learns of it when it runs."""
    if not torch.compiler.is_compiling() and not rows_aligned(x):
        raise ValueError(
            f"{name}: expected rows that start at multiples of 16 bytes on CUDA, "
            f"got strides {x.stride()} and storage offset {x.storage_offset()}"
        )


def check_supported(q: Tensor, num_kv_heads: int, dim_v: int, config: NSAConfig) -> None:
    """The kernels of q's GPU take these sizes. A compiled call learns that when it runs."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return
    sizes = (q.shape[-2], num_kv_heads, q.shape[-1], dim_v)
    if reasons := _unsupported(q.device, q.dtype, *sizes, config):
        raise ValueError(f"q: expected a call that the CUDA kernels take, got one where {reasons}")


@functools.lru_cache
def _unsupported(device, dtype, num_heads, num_kv_heads, head_dim, head_dim_v, config) -> str:
    if not torch.cuda.is_available():  # fake tensors
        return ""
    reasons = supports(
        device=device,
        dtype=dtype,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        config=config,
    )
    return "; ".join(reasons)


def _rows(packed: bool, letter: str) -> tuple[str, ...]:
    return (f"total_{letter}",) if packed else ("B", f"S{letter}")


def check_q(q: Tensor, packed: bool) -> None:
    """q is (B, Sq, Hq, Dk), packed (total_q, Hq, Dk)."""
    dims = (*_rows(packed, "q"), "Hq", "Dk")
    check_tensor("q", q, dims, (None,) * len(dims))
    check_floating("q", q)
    check_aligned("q", q)
    if q.shape[-1] < 1 or q.shape[-2] < 1:
        raise ValueError(f"q: expected at least one head and one dim, got {tuple(q.shape)}")


def _key_rows(packed: bool, compressed: bool) -> tuple[str, ...]:
    if compressed:
        return ("total_k // d",) if packed else ("B", "Tc")
    return _rows(packed, "k")


def check_k(
    name: str,
    k: Tensor,
    q: Tensor,
    packed: bool,
    rows: int | None = None,
    heads: int | None = None,
    compressed: bool = False,
) -> None:
    """The keys of a branch fit to q: raw ones, or compressed tokens. ``rows`` (Sk, Tc or packed
    rows) and ``heads`` are given where they are known already."""
    *batch, _, heads_q, dim_k = q.shape
    dims = (*_key_rows(packed, compressed), "Hkv", "Dk")
    check_tensor(name, k, dims, (*batch, rows, heads, dim_k), like=q)
    check_aligned(name, k)
    num_heads = k.shape[-2]
    if num_heads < 1 or heads_q % num_heads:
        raise ValueError(
            f"{name}: expected a number of heads Hkv that divides the {heads_q} heads of q, "
            f"got {num_heads}"
        )


def check_kv(
    names: tuple[str, str],
    k: Tensor,
    v: Tensor,
    q: Tensor,
    packed: bool,
    rows: int | None = None,
    heads: int | None = None,
    dim_v: int | None = None,
    compressed: bool = False,
) -> None:
    """As :func:`check_k`, and the values have the rows and heads of the keys, and ``dim_v``."""
    check_k(names[0], k, q, packed, rows, heads, compressed)
    fits_to = names[0] if dim_v is None else f"{names[0]} and v"
    check_v(names[1], v, k, (*_key_rows(packed, compressed), "Hkv", "Dv"), dim_v, fits_to)
    check_aligned(names[1], v)


def check_v(
    name: str, v: Tensor, k: Tensor, dims: tuple[str, ...], dim_v: int | None, fits_to: str
) -> None:
    """The values have the rows and heads of the keys."""
    check_tensor(name, v, dims, (*k.shape[:-1], dim_v), like=k, fits_to=fits_to)
    if v.shape[-1] < 1:
        raise ValueError(f"{name}: expected at least one dim, got {tuple(v.shape)}")


def check_gates(gates: Tensor, q: Tensor, packed: bool) -> None:
    check_tensor(
        "gates", gates, (*_rows(packed, "q"), "Hq", "branches"), (*q.shape[:-1], 3), like=q
    )


def check_block_indices(block_indices: Tensor, q: Tensor, k: Tensor, packed: bool) -> None:
    check_tensor(
        "block_indices",
        block_indices,
        (*_rows(packed, "q"), "Hkv", "n"),
        (*q.shape[:-2], k.shape[-2], None),
        like=q,
        dtype=torch.int32,
    )
    if block_indices.shape[-1] < 1:
        raise ValueError(
            f"block_indices: expected at least one index a row, got {tuple(block_indices.shape)}"
        )


def check_compress_input(
    k: Tensor,
    v: Tensor,
    packed: bool,
    dim_k: int | None = None,
    dim_v: int | None = None,
) -> None:
    """Raw k (B, Sk, Hkv, Dk) and v (B, Sk, Hkv, Dv) of a compressor, or packed."""
    rows = _rows(packed, "k")
    check_tensor("k", k, (*rows, "Hkv", "Dk"), (*((None,) * (len(rows) + 1)), dim_k))
    check_floating("k", k)
    check_v("v", v, k, (*rows, "Hkv", "Dv"), dim_v, "k")


def check_at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value}")


def check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def check_parameter_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype}")


def check_softmax_scale(softmax_scale: float | None, q: Tensor) -> float:
    if softmax_scale is None:
        return q.shape[-1] ** -0.5
    return float(check_number("softmax_scale", softmax_scale))


def check_seqlens(
    q: Tensor,
    rows_k: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    compressed_stride: int = 0,
) -> Seqlens:
    """Where the sequences are.

    Args:
        rows_k: Sk, or total_k of a packed batch; with ``compressed_stride`` d > 0 and packed
            total_k // d.
    """
    if cu_seqlens_q is None and cu_seqlens_k is None:
        for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if value is not None:
                raise ValueError(f"{name}: expected None without cu_seqlens, got {value}")
        return Seqlens(None, None, q.shape[1], rows_k)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: expected cu_seqlens_q and cu_seqlens_k together, got None")
    max_seqlen_q = check_cu_seqlens("_q", cu_seqlens_q, max_seqlen_q, q, "q", q.shape[0])
    name_k = "k_cmp" if compressed_stride else "k"
    max_seqlen_k = check_cu_seqlens(
        "_k", cu_seqlens_k, max_seqlen_k, q, name_k, rows_k, compressed_stride
    )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected shape {tuple(cu_seqlens_q.shape)} as cu_seqlens_q, "
            f"got {tuple(cu_seqlens_k.shape)}"
        )
    return Seqlens(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def check_cu_seqlens(
    suffix: str,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    like: Tensor,
    packed_name: str,
    rows: int,
    compressed_stride: int = 0,
) -> int:
    """cu_seqlens<suffix> is (B + 1,) int32 and partitions the rows of the packed tensor
    ``packed_name``. Returns max_seqlen."""
    name, max_name = f"cu_seqlens{suffix}", f"max_seqlen{suffix}"
    check_tensor(name, cu_seqlens, ("B + 1",), (None,), like=like, dtype=torch.int32)
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: expected shape (B + 1,) with B >= 0, got (0,)")
    if max_seqlen is not None:
        check_at_least(max_name, max_seqlen, 0)
    elif like.device.type == "cuda":
        raise ValueError(
            f"{max_name}: expected an int where {name} is on a CUDA device (reading it from there "
            "would wait for the device), got None"
        )
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        # Any upper bound serves; that of a compiled call on the CPU is all rows.
        bound = (rows + 1) * compressed_stride if compressed_stride else rows
        return bound if max_seqlen is None else max_seqlen

    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name}: expected the first offset to be 0, got {offsets[0]}")
    for begin, end in pairwise(offsets):
        if begin > end:
            raise ValueError(f"{name}: expected non-decreasing offsets, got {begin} before {end}")
    total = offsets[-1] // compressed_stride if compressed_stride else offsets[-1]
    if total != rows:
        what = f"total_k // d = {total}" if compressed_stride else f"the last offset, {total},"
        raise ValueError(
            f"{name}: expected {what} to be the number of rows of {packed_name}, got {rows}"
        )
    longest = max((end - begin for begin, end in pairwise(offsets)), default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"{max_name}: expected at least {longest}, the longest sequence, got {max_seqlen}"
        )
    return longest if max_seqlen is None else max_seqlen
