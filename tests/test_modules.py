"""KVCompressor and NSAAttention: against a layer of plain torch, packed batches, RoPE, training."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CUDA_BACKENDS,
    Backend,
    assert_close_to_reference,
    assert_same_bits,
    backend_params,
    cu_seqlens,
    poisoned,
)
from test_compress import KINDS
from torch import nn

import nsa_ext
from nsa_ext import KVCompressor, NSAAttention, NSAConfig, reference

CONFIG = NSAConfig(8, 4, 8, num_selected=3, num_init=1, num_local=1, window=10)
CUDA_CONFIG = NSAConfig(num_selected=3, num_init=1, num_local=1, window=50)
LENGTHS = [30, 0, 7, 53]

backends = pytest.mark.parametrize(
    "backend",
    backend_params(
        [Backend("cpu", torch.float64), Backend("cpu", torch.bfloat16), CUDA_BACKENDS[0]]
    ),
    indirect=True,
)


def layer(device="cpu", dtype=torch.float64, **options):
    torch.manual_seed(1)
    config = CONFIG if device == "cpu" else CUDA_CONFIG
    heads = {"head_dim": 8, "head_dim_v": 6} if device == "cpu" else {"head_dim": 64}
    arguments = {**heads, "config": config, "device": device, "dtype": dtype, **options}
    return NSAAttention(20, 4, 2, **arguments)


# A layer of plain torch, from the parameters of the module.


def rope(x, positions, theta):
    """Pairs (x[i], x[i + D/2]) as complex numbers, times e^(i * position * theta^(-2i/D))."""
    if theta is None:
        return x
    half = x.shape[-1] // 2
    wide = x.double()
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    turn = torch.polar(torch.ones((), dtype=torch.float64, device=x.device), positions * frequency)
    pairs = torch.complex(wide[..., :half], wide[..., half:]) * turn
    return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)


def plain_layer(module, x):
    """NSAAttention(x) for one batch that is not packed."""
    m, config = module, module.config
    branches = 3 if m.separate_kv else 1
    q = F.linear(x, m.q_proj.weight, m.q_proj.bias).unflatten(-1, (m.num_heads, m.head_dim))
    k = F.linear(x, m.k_proj.weight, m.k_proj.bias)
    v = F.linear(x, m.v_proj.weight, m.v_proj.bias)
    k = k.unflatten(-1, (branches, m.num_kv_heads, m.head_dim))
    v = v.unflatten(-1, (branches, m.num_kv_heads, m.head_dim_v))
    gates = F.linear(x, m.gate_proj.weight, m.gate_proj.bias).sigmoid()
    gates = gates.unflatten(-1, (m.num_heads, 3))
    cmp, slc, win = (0, 1, 2) if m.separate_kv else (0, 0, 0)
    k_cmp, v_cmp = reference.compress_kv(k[:, :, cmp], v[:, :, cmp], m.compress)

    def at(count, step):
        return torch.arange(count, device=x.device).double()[:, None, None] * step

    out = reference.sparse_attn(
        rope(q, at(x.shape[1], 1), m.rope_theta),
        rope(k[:, :, slc], at(x.shape[1], 1), m.rope_theta),
        v[:, :, slc],
        gates,
        (rope(k_cmp, at(k_cmp.shape[1], config.block_stride), m.rope_theta), v_cmp),
        config=config,
        k_win=rope(k[:, :, win], at(x.shape[1], 1), m.rope_theta),
        v_win=v[:, :, win],
    )
    return F.linear(out.flatten(-2), m.o_proj.weight, m.o_proj.bias)


OPTIONS = {
    "default": {},
    "shared-kv": {"separate_kv": False},
    "no-rope": {"rope_theta": None},
    "theta": {"rope_theta": 77.0},
    "bias": {"bias": True},
    "per-head": {"compress_per_head": True},
    "hidden": {"compress_hidden": 5},
    "linear": {"compress": "linear"},
    "weighted": {"compress": "weighted"},
    "mean": {"compress": "mean"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_matches_plain_torch(options):
    """In float64, where the selections are the same: output and every gradient."""
    module = layer(**options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    x = torch.randn(2, 53, 20, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 53, 20, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    with poisoned("cpu"):
        out = module(x)
        grads = torch.autograd.grad(out, inputs, dout)
    expected = plain_layer(module, x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    expected_grads = torch.autograd.grad(expected, inputs, dout)
    for grad, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "options", [OPTIONS["default"], OPTIONS["shared-kv"]], ids=["own", "shared"]
)
@backends
def test_packed_equals_separate(options, backend):
    module = layer(backend.device, backend.dtype, **options)
    lengths = LENGTHS if backend.device == "cpu" else [3 * n for n in LENGTHS]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), 20, generator=generator).to(backend.device, backend.dtype)
    with poisoned(backend.device):
        out = module(x, cu_seqlens=cu_seqlens(lengths, backend.device), max_seqlen=max(lengths))
    assert out.shape == x.shape and out.dtype == x.dtype
    tolerance = 1e-12 if backend.dtype == torch.float64 else 3e-2
    for rows, piece in zip(x.split(lengths), out.split(lengths), strict=True):
        torch.testing.assert_close(piece, module(rows[None])[0], rtol=tolerance, atol=tolerance)


def test_max_seqlen_is_optional_on_the_cpu_and_any_upper_bound():
    module = layer()
    x, offsets = torch.randn(90, 20, dtype=torch.float64), cu_seqlens(LENGTHS)
    out = module(x, offsets)
    assert_same_bits(module(x, offsets, 53), out)
    assert_same_bits(module(x, offsets, 4_000), out)
    with pytest.raises(ValueError, match="max_seqlen"):
        module(x, offsets, 52)


def test_layer_is_causal():
    module = layer()
    x = torch.randn(1, 61, 20, dtype=torch.float64)
    out = module(x)
    for cut in (0, 7, 8, 31, 59):
        changed = x.clone()
        changed[:, cut + 1 :] = torch.randn_like(changed[:, cut + 1 :])
        torch.testing.assert_close(module(changed)[:, : cut + 1], out[:, : cut + 1])


def test_rope_depends_on_distances_alone():
    """A shift of all positions by a multiple of the blocks changes nothing but for the initial
    blocks: the same 40 tokens behind 8 or 16 rows that the window cannot see."""
    config = NSAConfig(8, 4, 8, num_selected=2, num_init=0, num_local=2, window=9)
    module = layer(config=config)
    with torch.no_grad():
        # Without the compressed branch, which sees all.
        module.gate_proj.weight.zero_()
        bias = torch.tensor([-1e4, 1.0, 1.0], dtype=torch.float64).repeat(4)
        module.gate_proj.bias = nn.Parameter(bias)
    x = torch.randn(1, 40, 20, dtype=torch.float64)

    def behind(rows):
        return module(torch.cat([torch.zeros(1, rows, 20, dtype=torch.float64), x], dim=1))[
            :, rows:
        ]

    torch.testing.assert_close(behind(8)[:, 16:], behind(16)[:, 16:], rtol=1e-9, atol=1e-11)


@backends
def test_shapes_and_dtypes(backend):
    module = layer(backend.device, backend.dtype)
    for shape in [(1, 1, 20), (3, 33, 20), (2, 0, 20), (0, 5, 20)]:
        x = torch.zeros(shape, device=backend.device, dtype=backend.dtype, requires_grad=True)
        out = module(x)
        assert out.shape == shape and out.dtype == backend.dtype
        out.sum().backward()
        assert x.grad.shape == shape and torch.isfinite(x.grad).all()


def test_bfloat16_layer_is_close_to_float32():
    module = layer(dtype=torch.float32)
    x = torch.randn(2, 90, 20)
    half = copy.deepcopy(module).bfloat16()
    error = (half(x.bfloat16()).float() - module(x)).square().mean().sqrt()
    assert error < 0.05 * module(x).square().mean().sqrt()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_dict_round_trip(options):
    module = layer(**options)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    other = NSAAttention(20, 4, 2, 8, 6, config=CONFIG, dtype=torch.float64, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 40, 20, dtype=torch.float64)
    assert_same_bits(other(x), module(x))
    assert_same_bits(copy.deepcopy(module)(x), module(x))
    assert "NSAAttention" in repr(module) and "KVCompressor" in repr(module)


def test_construction_on_meta_and_materialisation():
    module = layer(device="meta", config=CONFIG, head_dim=8, head_dim_v=6)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module(torch.empty(2, 40, 20, device="meta", dtype=torch.float64)).shape == (2, 40, 20)
    module = module.to_empty(device="cpu")
    module.load_state_dict(layer().state_dict())
    x = torch.randn(1, 40, 20, dtype=torch.float64)
    assert_same_bits(module(x), layer()(x))


def test_layer_trains():
    """Repeating the first half of a sequence: only attention can find what to repeat."""
    torch.manual_seed(0)
    vocabulary, width, half = 16, 32, 20
    config = NSAConfig(4, 2, 8, num_selected=4, num_init=1, num_local=1, window=8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(vocabulary, width)
            self.attention = NSAAttention(width, 4, 2, 8, config=config)
            self.position = nn.Parameter(torch.randn(2 * half, width))
            self.head = nn.Linear(width, vocabulary)

        def forward(self, tokens):
            x = self.embedding(tokens) + self.position[: tokens.shape[1]]
            return self.head(x + self.attention(x))

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(100):
        first = torch.randint(vocabulary, (8, half))
        tokens = torch.cat([first, first], dim=1)
        logits = model(tokens[:, :-1])[:, half - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), first.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10]), losses[::10]
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


# KVCompressor


def compressor(kind, backend=None, **options):
    backend = backend or Backend("cpu", torch.float64)
    dims = (8, 6) if backend.device == "cpu" else (64, 64)
    config = CONFIG if backend.device == "cpu" else CUDA_CONFIG
    arguments = {"config": config, "device": backend.device, "dtype": backend.dtype, **options}
    return KVCompressor(*dims, kind=kind, **arguments)


def raw_pair(backend, *rows):
    dims = (8, 6) if backend.device == "cpu" else (64, 64)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*rows, 2, dim, generator=generator).to(backend.device, backend.dtype)
        for dim in dims
    ]


@pytest.mark.parametrize("per_head", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
@backends
def test_compressor_matches_reference(kind, per_head, backend):
    phi = compressor(kind, backend, num_kv_heads=per_head)
    length = 45 if backend.device == "cpu" else 145
    offsets = cu_seqlens([9, 0, length], backend.device)
    for keywords, rows in [({}, (2, length)), ({"cu_seqlens_k": offsets}, (length + 9,))]:
        pair = raw_pair(backend, *rows)
        with poisoned(backend.device):
            tokens = phi(*pair, **keywords, max_seqlen_k=length)
        wide = copy.deepcopy(phi).double()
        right = reference.compress_kv(*(x.double() for x in pair), wide, **keywords)
        low = reference.compress_kv(*pair, phi, **keywords)
        for name, *results in zip(("k_cmp", "v_cmp"), tokens, right, low, strict=True):
            assert_close_to_reference(*results, name=name)


@pytest.mark.parametrize("kind", KINDS)
def test_compress_kv_is_the_compressor(kind):
    phi = compressor(kind)
    pair = raw_pair(Backend("cpu", torch.float64), 2, 40)
    for a, b in zip(nsa_ext.compress_kv(*pair, phi), phi(*pair), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_compressor_starts_near_the_mean(kind):
    phi, mean = compressor(kind, hidden=16 if kind == "mlp" else None), compressor("mean")
    pair = raw_pair(Backend("cpu", torch.float64), 2, 400)
    for tokens, pooled in zip(phi(*pair), mean(*pair), strict=True):
        error = (tokens - pooled).square().mean().sqrt() / pooled.square().mean().sqrt()
        assert error < 0.5, error


def test_mean_has_no_parameters_and_options_drop_theirs():
    assert not list(compressor("mean").parameters())
    names = {name for name, _ in compressor("mlp", pos=False, bias=False).named_parameters()}
    assert names == {"phi_k.w1", "phi_k.w2", "phi_v.w1", "phi_v.w2"}
    names = {name for name, _ in compressor("linear").named_parameters()}
    assert names == {f"phi_{x}.{name}" for x in "kv" for name in ("pos", "w1", "b1")}
    shapes = {
        name: tuple(p.shape) for name, p in compressor("mlp", num_kv_heads=2).named_parameters()
    }
    assert shapes["phi_k.w1"] == (2, 8, 64) and shapes["phi_v.w2"] == (2, 6, 6)


def test_float32_phi_beside_16_bit_keys():
    phi = compressor("mlp", dtype=torch.float32)
    k, v = raw_pair(Backend("cpu", torch.bfloat16), 2, 40)
    k_cmp, v_cmp = phi(k, v)
    assert k_cmp.dtype == v_cmp.dtype == torch.bfloat16
    (k_cmp.float().sum() + v_cmp.float().sum()).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in phi.parameters())


def test_any_callable_compresses():
    """sparse_attn takes whatever returns (k_cmp, v_cmp), and hands it the raw K and V."""
    seen = {}

    def compress(k, v, cu_seqlens_k=None, max_seqlen_k=None):
        seen.update(k=k, v=v)
        return reference.compress_kv(k, v, phi)

    phi = compressor("weighted")
    q, gates = torch.randn(2, 40, 4, 8).double(), torch.rand(2, 40, 4, 3).double()
    k, v = raw_pair(Backend("cpu", torch.float64), 2, 40)
    out = nsa_ext.sparse_attn(q, k, v, gates, compress, config=CONFIG)
    assert seen["k"] is k and seen["v"] is v
    torch.testing.assert_close(out, nsa_ext.sparse_attn(q, k, v, gates, phi, config=CONFIG))
    k_raw, v_raw = k * 2, v * 3
    out = nsa_ext.sparse_attn(q, k, v, gates, compress, config=CONFIG, k_cmp=k_raw, v_cmp=v_raw)
    assert seen["k"] is k_raw and seen["v"] is v_raw
    expected = reference.sparse_attn(q, k, v, gates, phi, config=CONFIG, k_cmp=k_raw, v_cmp=v_raw)
    torch.testing.assert_close(out, expected)
