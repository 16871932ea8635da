"""Loads the compiled library and gives its operators fake kernels and derivatives.

The operators are ``torch.ops.nsa_ext.*``; their schemas and CPU and CUDA kernels are registered in
C++ (csrc/torch). They return freshly allocated contiguous tensors, but for cache_append and
cache_store_*, which change their arguments; an optional result that does not exist has shape (0,).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.library import register_autograd

from ._layout import rows_aligned


def _load_library() -> None:
    # NSA_EXT_LIBRARY is a developer's switch: a library that lies elsewhere.
    path = os.environ.get("NSA_EXT_LIBRARY") or str(Path(__file__).with_name("_C.abi3.so"))
    if not Path(path).is_file():
        raise ImportError(
            f"nsa_ext: the compiled library {path} does not exist. Build it with `pip install .` "
            "(or `pip install -e .`) in the source tree, and import nsa_ext from outside that tree "
            "unless it was an editable install."
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"nsa_ext: cannot load the compiled library {path} with torch {torch.__version__}: "
            f"{error}"
        ) from error


_load_library()


# Fake kernels: shapes, dtypes and strides of the results.


def _fake(*names: str) -> Callable[[Callable], Callable]:
    """Registers a function as the fake kernel of ``nsa_ext::<name>``, for tensors of one device."""

    def register(kernel: Callable) -> Callable:
        def checked(*args):
            devices = {str(x.device) for x in args if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise ValueError(f"nsa_ext::{names[0]}: tensors on several devices: {devices}")
            return kernel(*args)

        for name in names:
            torch.library.register_fake(f"nsa_ext::{name}", checked)
        return kernel

    return register


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _empty_like(x: Tensor | None, like: Tensor) -> Tensor:
    """A contiguous tensor of x's shape; of shape (0,) where x is absent."""
    return _absent(like) if x is None else x.new_empty(x.shape)


def _compressed(x: Tensor, dim: int, packed: bool, block_size: int, block_stride: int) -> Tensor:
    *rows, num_heads, _ = x.shape
    if packed:
        num_tokens = rows[-1] // block_stride
    elif rows[-1] < block_size:
        num_tokens = 0
    else:
        num_tokens = (rows[-1] - block_size) // block_stride + 1
    return x.new_empty(*rows[:-1], num_tokens, num_heads, dim)


def _new_out(q: Tensor, v: Tensor, *leading: int) -> Tensor:
    return q.new_empty(*leading, *q.shape[:-1], v.shape[-1])


def _new_lse(q: Tensor, *leading: int) -> Tensor:
    *batch, seqlen, num_heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*leading, *batch, num_heads, seqlen, dtype=dtype)


def _new_block_indices(q: Tensor, k: Tensor, config: list[int]) -> Tensor:
    num_selected = config[3]
    return q.new_empty(*q.shape[:-2], k.shape[-2], num_selected, dtype=torch.int32)


@_fake("compress_pool_fwd")
def _(x, weight, pos, cu_seqlens, max_seqlen, block_size, block_stride):
    return _compressed(x, x.shape[-1], cu_seqlens is not None, block_size, block_stride)


@_fake("compress_pool_bwd")
def _(dout, x, weight, pos, cu_seqlens, max_seqlen, block_size, block_stride):
    return _empty_like(x, x), _empty_like(weight, x), _empty_like(pos, x)


@_fake("compress_mlp_fwd")
def _(x, pos, w1, b1, w2, b2, cu_seqlens, max_seqlen, block_size, block_stride):
    dim_out = w1.shape[1] if w2 is None else w2.shape[1]
    return _compressed(x, dim_out, cu_seqlens is not None, block_size, block_stride)


@_fake("compress_mlp_bwd")
def _(dout, x, pos, w1, b1, w2, b2, cu_seqlens, max_seqlen, block_size, block_stride):
    return tuple(_empty_like(p, x) for p in (x, pos, w1, b1, w2, b2))


@_fake("compressed_attn_fwd")
def _(q, k_cmp, v_cmp, cu_q, cu_k, max_q, max_k, config, softmax_scale, deterministic):
    return _new_out(q, v_cmp), _new_lse(q), _new_block_indices(q, k_cmp, config)


@_fake("select_blocks")
def _(q, k_cmp, cu_q, cu_k, max_q, max_k, config, softmax_scale):
    return _new_block_indices(q, k_cmp, config)


@_fake("selected_attn_fwd")
def _(q, k, v, block_indices, cu_q, cu_k, max_q, max_k, select_size, softmax_scale, deterministic):
    return _new_out(q, v), _new_lse(q)


@_fake("window_attn_fwd")
def _(q, k, v, cu_q, cu_k, max_q, max_k, window, softmax_scale, deterministic):
    return _new_out(q, v), _new_lse(q)


@_fake("compressed_attn_bwd", "selected_attn_bwd", "window_attn_bwd")
def _(dout, q, k, v, *rest):
    return tuple(_empty_like(x, x) for x in (q, k, v))


@_fake("sparse_attn_fwd")
def _(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_q, cu_k, max_q, max_k, config,
      softmax_scale, save_branches, deterministic):  # fmt: skip
    branches = 3 if save_branches else 0
    return (
        _new_out(q, v_slc),
        _new_out(q, v_slc, branches),
        _new_lse(q, branches),
        _new_block_indices(q, k_slc, config),
    )


@_fake("cache_gather")
def _(k, v, tail_k, tail_v, state, counts, block_table, num_pages, config):
    block_size, block_stride = config[:2]
    blocks = -(-k.shape[1] // block_stride)
    rows = (blocks - 1) * block_stride + block_size if k.shape[1] else 0
    batch, _, num_heads, _ = k.shape
    return (
        k.new_empty(batch, rows, num_heads, k.shape[-1]),
        v.new_empty(batch, rows, num_heads, v.shape[-1]),
        state.new_empty(batch, 3),
    )


@_fake("cache_append", "cache_store_mlp", "cache_store_pool")
def _(*args):
    return None


@_fake("decode_fwd")
def _(q, k_cmp_pages, v_cmp_pages, k_pages, v_pages, k_win_pages, v_win_pages, gates, seqlens,
      block_table, config, softmax_scale):  # fmt: skip
    return _new_out(q, v_pages), _new_block_indices(q, k_pages, config)


@_fake("sparse_attn_bwd")
def _(dout, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, *rest):
    inputs = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    return tuple(_empty_like(x, q) for x in inputs)


# Derivatives. Every forward takes its tensors first, and of these first the ones that have a
# gradient; of its results the first alone is differentiable.


def _differentiate(
    name: str,
    *,
    differentiable: int,
    tensors: int,
    saved: slice = slice(0),
    numbers: Callable[[tuple], tuple] = lambda numbers: numbers,
) -> None:
    """Registers ``<name>_bwd(dout, <differentiable inputs>, <saved results>, <other inputs>)`` as
    the derivative of ``<name>_fwd``.

    Args:
        differentiable: how many of the inputs have a gradient, the first ones.
        tensors: how many of the inputs are tensors (or absent), the first ones.
        saved: the results of the forward that the backward needs.
        numbers: those of the other inputs that the backward takes.
    """
    backward_op = getattr(torch.ops.nsa_ext, f"{name}_bwd").default

    def setup_context(ctx, inputs, output) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], *outputs[saved])
        ctx.numbers = inputs[tensors:]

    def backward(ctx, dout, *_):
        without_grad = (tensors - differentiable + len(ctx.numbers)) * (None,)
        if dout is None:
            return (*(differentiable * (None,)), *without_grad)
        if (dout.shape[-1] != 1 and dout.stride(-1) != 1) or not rows_aligned(dout):
            dout = dout.contiguous()
        stored = ctx.saved_tensors  # read once: activation checkpointing recomputes at each read
        inputs, results = stored[:tensors], stored[tensors:]
        grads = backward_op(
            dout,
            *inputs[:differentiable],
            *results,
            *inputs[differentiable:],
            *numbers(ctx.numbers),
        )
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return (*(grad if need else None for grad, need in needed), *without_grad)

    def second_backward(ctx, *_):
        raise NotImplementedError(f"nsa_ext::{name}: second derivatives are not implemented")

    register_autograd(f"nsa_ext::{name}_fwd", backward, setup_context=setup_context)
    register_autograd(f"nsa_ext::{name}_bwd", second_backward)


_differentiate("compress_pool", differentiable=3, tensors=4)
_differentiate("compress_mlp", differentiable=6, tensors=7)
_differentiate("compressed_attn", differentiable=3, tensors=5, saved=slice(2))
_differentiate("selected_attn", differentiable=3, tensors=6, saved=slice(2))
_differentiate("window_attn", differentiable=3, tensors=5, saved=slice(2))
_differentiate(
    "sparse_attn",
    differentiable=8,
    tensors=10,
    saved=slice(1, 4),
    numbers=lambda numbers: (*numbers[:-2], numbers[-1]),  # all but save_branches
)
