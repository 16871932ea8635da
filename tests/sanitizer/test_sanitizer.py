"""Every CUDA kernel once, on sizes small enough for compute-sanitizer (run.sh beside this file).

The sizes are odd on purpose: tails of tiles, rows without keys, empty sequences, wild indices. What
the kernels compute is tested elsewhere; here the results only have to be finite and used, so that
initcheck sees a read of every element.
"""

import dataclasses

import pytest
import torch
from cache_helpers import Sequences
from helpers import CUDA_BACKENDS, Problem, backend_params, make_inputs
from operators import OPERATORS, SELECTED, kernel_keywords
from test_compress import KINDS, Phi

import nsa_ext
from nsa_ext import NSAConfig

pytestmark = pytest.mark.gpu

KERNELS = [backend for backend in CUDA_BACKENDS if backend.dtype == torch.bfloat16]
on_cuda = pytest.mark.parametrize("backend", backend_params(KERNELS), indirect=True)

CONFIG = NSAConfig(num_selected=3, num_init=1, num_local=1, window=37)
DENSE = Problem("dense", seqlens=((67, 197),), heads_q=4, heads_kv=2, config=CONFIG)
PACKED = Problem(
    "packed",
    seqlens=((0, 0), (33, 33), (5, 2), (0, 7), (1, 161)),
    packed=True,
    heads_q=4,
    heads_kv=1,
    config=CONFIG,
)
WIDE = dataclasses.replace(DENSE, name="wide", dim_qk=192, dim_v=128, heads_q=2, heads_kv=2)
EMPTY = Problem("empty", seqlens=((9, 0),), heads_q=2, heads_kv=1, config=CONFIG)


def use(out, leaves, dout):
    grads = torch.autograd.grad(out, leaves, dout)
    for tensor in (out, *grads):
        assert torch.isfinite(tensor).all()


@on_cuda
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("problem", [DENSE, PACKED, WIDE, EMPTY], ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_attention(operator, problem, deterministic, backend):
    x = make_inputs(problem, backend)
    leaves = {name: tensor.requires_grad_() for name, tensor in operator.pick(x).items()}
    out = operator.run(problem, leaves, deterministic=deterministic)
    use(out, list(leaves.values()), x["dout"])


@on_cuda
def test_wild_indices(backend):
    x = make_inputs(DENSE, backend)
    leaves = [tensor.requires_grad_() for tensor in SELECTED.pick(x).values()]
    shape = (*DENSE.lead("q"), DENSE.heads_kv, 5)
    indices = torch.randint(-2, 6, shape).int()
    indices[..., 1], indices[..., 3] = 2**31 - 1, -(2**31)
    out = nsa_ext.selected_attn(*leaves, indices.cuda(), **kernel_keywords(DENSE, "cuda"))
    use(out, leaves, x["dout"])


@on_cuda
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("kind", KINDS)
def test_cache(kind, paged, backend):
    """Chunks, then steps of decode that complete a block, that complete none, without room."""
    sequences = Sequences(backend, 70, batch=3, kind=kind, per_head=paged, separate=paged)
    cache = sequences.cache(**({"num_pages": 6} if paged else {"growable": False}))
    cache.append(**sequences.rows(0, 45)[2], counts=[45, 0, 31])
    for begin, end in ((45, 46), (46, 47), (47, 63)):
        out, _ = sequences.step(cache, begin, end)
        assert torch.isfinite(out).all()
    cache.reserve(cache.capacity)
    lengths = torch.tensor([cache.capacity, 1, 0], dtype=torch.int32, device="cuda")
    cache._storage.state[0] = lengths
    out, _ = sequences.step(cache, 63, 64)
    assert cache.seqlens.tolist() == [cache.capacity, 2, 1]


@on_cuda
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_compression(kind, packed, backend):
    seqlens = (0, 49, 31, 81) if packed else (83,)
    inputs, dout = (phi := Phi(kind, seqlens, packed=packed, per_head=packed)).inputs(backend)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    use(phi.kernel(leaves), list(leaves.values()), dout)
