"""NSAAttention with a cache."""

import copy

import pytest
import torch
from helpers import CUDA_BACKENDS, Backend, backend_params, rms
from test_modules import OPTIONS, layer, plain_layer

devices = pytest.mark.parametrize(
    "backend", backend_params([Backend("cpu", torch.float64), CUDA_BACKENDS[0]]), indirect=True
)


def run(module, x, cache, chunks):
    outs, begin = [], 0
    for chunk in chunks:
        outs.append(module(x[:, begin : begin + chunk], cache=cache))
        begin += chunk
    return torch.cat(outs, dim=1)


@devices
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_cached_layer_is_the_layer(options, backend):
    """Positions, rotated keys and compressed keys at c*d, a shared pair or one for each branch."""
    module = layer(backend.device, backend.dtype, **options)
    seqlen = 93 if backend.device == "cpu" else 260
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, seqlen, 20, generator=generator).to(backend.device, backend.dtype)
    with torch.no_grad():
        full = module(x)
    for paged in ({}, {"num_pages": 2 * seqlen}):
        cache = module.new_cache(2, seqlen, **paged)
        out = run(module, x, cache, [seqlen - 40, *[1] * 31, 9])
        assert_same_layer(module, x, out, full)
        assert cache.sync() == [seqlen, seqlen] and not out.requires_grad


def assert_same_layer(module, x, out, full):
    """float64: the same numbers. 16 bits, where near ties make single selections differ: no further
    from the layer in float64 than twice the uncached one."""
    if x.dtype == torch.float64:
        torch.testing.assert_close(out, full, rtol=1e-11, atol=1e-12)
        return
    with torch.no_grad():
        exact = plain_layer(copy.deepcopy(module).double(), x.double())
    assert torch.isfinite(out).all()
    assert rms(out - exact) <= 2 * rms(full - exact)


@devices
def test_sequences_of_different_lengths(backend):
    """Prompts padded on the left, then a token each: as each one alone."""
    module = layer(backend.device, backend.dtype)
    lengths = [31, 80, 5]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 100, 20, generator=generator).to(backend.device, backend.dtype)
    cache = module.new_cache(3, 100)
    prompts = torch.full_like(x[:, :80], 9.0)
    for b, length in enumerate(lengths):
        prompts[b, 80 - length :] = x[b, :length]
    outs = [module(prompts, cache=cache, counts=lengths)[:, -1:]]
    for step in range(12):
        token = torch.stack([x[b, n + step : n + step + 1] for b, n in enumerate(lengths)])
        outs.append(module(token, cache=cache))
    out = torch.cat(outs, dim=1)
    for b, length in enumerate(lengths):
        rows = x[b : b + 1, : length + 12]
        with torch.no_grad():
            alone = module(rows)
        # The prompt but for its last row comes from the layer alone.
        ours = torch.cat([alone[:, : length - 1], out[b : b + 1]], dim=1)
        assert_same_layer(module, rows, ours, alone)


def test_a_float32_layer_under_autocast():
    module = layer(dtype=torch.float32)
    x = torch.randn(1, 40, 20)
    cache = module.new_cache(1, 40, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = run(module, x, cache, [30, 5, 5])
        full = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, full, rtol=3e-2, atol=3e-2)


def test_torch_compile_goes_around_the_cache():
    """The cache breaks the graph; the numbers stay."""
    torch._dynamo.reset()
    module = layer()
    x = torch.randn(2, 30, 20, dtype=torch.float64)
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        full = module(x)
    out = run(compiled, x, module.new_cache(2, 30), [20, 1, 1, 1, 7])
    torch.testing.assert_close(out, full, rtol=1e-11, atol=1e-12)
    torch._dynamo.reset()
