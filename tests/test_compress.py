"""compress_pool and compress_mlp, forward and backward, against `nsa_ext.reference.compress`."""

import dataclasses

import pytest
import torch
from helpers import (
    CPU_BACKENDS,
    Backend,
    assert_same_bits,
    check_against_reference,
    cu_seqlens,
    poisoned,
    randn,
    run_forward_backward,
)

from nsa_ext import NSAConfig, reference

ops = torch.ops.nsa_ext


DEFAULT = NSAConfig()


@dataclasses.dataclass(frozen=True)
class Phi:
    """One compression call: the kind of phi, its options and the shape of x."""

    kind: str
    seqlens: tuple = (113,)  # one length, or one per sequence of a packed batch
    packed: bool = False
    batch: int = 2
    heads: int = 2
    per_head: bool = False
    pos: bool = True
    bias: bool = True
    dim: int = 64
    dim_out: int = 64
    hidden: int = 48
    config: NSAConfig = DEFAULT
    strided: bool = False

    def inputs(self, backend):
        """x and phi's weights, and dout."""
        length, heads = self.config.block_size, self.heads if self.per_head else 1
        rows = (sum(self.seqlens),) if self.packed else (self.batch, self.seqlens[0])
        shapes = {"x": ((*rows, self.heads, self.dim), 1.0)}
        if self.kind == "weighted":
            shapes["weight"] = ((heads, length), length**-0.5)
        if self.kind != "mean" and self.pos:
            shapes["pos"] = ((heads, length, self.dim), 0.5)
        if self.kind in ("linear", "mlp"):
            width = self.hidden if self.kind == "mlp" else self.dim_out
            shapes["w1"] = ((heads, width, length * self.dim), (length * self.dim) ** -0.5)
            if self.bias:
                shapes["b1"] = ((heads, width), 0.5)
        if self.kind == "mlp":
            shapes["w2"] = ((heads, self.dim_out, self.hidden), self.hidden**-0.5)
            if self.bias:
                shapes["b2"] = ((heads, self.dim_out), 0.5)
        inputs = {
            name: randn(shape, backend, scale=scale, seed=n, strided=self.strided and name == "x")
            for n, (name, (shape, scale)) in enumerate(shapes.items())
        }
        tokens = (
            (rows[0] // self.config.block_stride,)
            if self.packed
            else (self.batch, self.config.num_compressed(rows[1]))
        )
        dim_out = self.dim_out if self.kind in ("linear", "mlp") else self.dim
        dout = randn((*tokens, self.heads, dim_out), backend, seed=99, strided=self.strided)
        return inputs, dout

    def offsets(self, device):
        return cu_seqlens(self.seqlens, device) if self.packed else None

    def kernel(self, inputs):
        x, c = inputs["x"], self.config
        tail = (self.offsets(x.device), max(self.seqlens), c.block_size, c.block_stride)
        if self.kind in ("mean", "weighted"):
            return ops.compress_pool_fwd(x, inputs.get("weight"), inputs.get("pos"), *tail)
        names = ("pos", "w1", "b1", "w2", "b2")
        return ops.compress_mlp_fwd(x, *(inputs.get(name) for name in names), *tail)

    def oracle(self, inputs):
        offsets = self.offsets(inputs["x"].device)
        return reference.compress(kind=self.kind, config=self.config, cu_seqlens=offsets, **inputs)


KINDS = ["mean", "weighted", "linear", "mlp"]


def check(phi, backend):
    inputs, dout = phi.inputs(backend)
    return check_against_reference(phi.kernel, phi.oracle, inputs, dout)


@pytest.mark.parametrize("seqlen", [1, 31, 32, 63, 64, 65, 113, 1023, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind, seqlen, backend):
    check(Phi(kind, (seqlen,), batch=1 if seqlen > 1000 else 2), backend)


@pytest.mark.parametrize("kind", KINDS)
def test_long(kind, device_backend):
    check(Phi(kind, (4097,), batch=1, heads=1), device_backend)


@pytest.mark.parametrize("options", [{}, {"pos": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_one_phi_per_head(kind, options, backend):
    check(Phi(kind, per_head=True, heads=3, **options), backend)


@pytest.mark.parametrize("options", [{"pos": False}, {"bias": False}, {"heads": 8}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_options(kind, options, backend):
    check(Phi(kind, **options), backend)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed(kind, per_head, backend):
    seqlens = (0, 31, 0, 65, 32, 17, 15, 128, 1, 0)
    phi = Phi(kind, seqlens, packed=True, per_head=per_head)
    out, grads = check(phi, backend)
    start = 0
    used = torch.zeros(out.shape[0], dtype=torch.bool)
    for length in seqlens:
        row = start // 16
        used[row : row + phi.config.num_compressed(length)] = True
        start += length
    assert not used.all()
    assert (out[~used.to(out.device)] == 0).all(), "rows that hold no token must be zero"
    assert (grads["x"][:31] == 0).all(), "keys of a sequence that is too short to have a token"


@pytest.mark.parametrize("kind", KINDS)
def test_packed_short_sequences_only(kind, device_backend):
    """No token at all: zero rows, and zero gradients of everything."""
    out, grads = check(Phi(kind, (31, 5, 31), packed=True), device_backend)
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (192, 192), (64, 32)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dims(kind, dims, backend):
    check(Phi(kind, (80,), dim=dims[0], dim_out=dims[1], hidden=dims[0]), backend)


@pytest.mark.parametrize("blocks", [(16, 16, 64), (64, 16, 64), (32, 32, 64), (16, 8, 32)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind, blocks, device_backend):
    check(Phi(kind, (150,), config=NSAConfig(*blocks)), device_backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [(4, 2, 4), (3, 1, 5), (6, 6, 6), (1, 1, 1)], ids=str)
def test_any_blocks_and_dims(kind, blocks):
    """The CPU backend takes any length and any dim."""
    phi = Phi(kind, (29,), dim=5, dim_out=7, hidden=3, heads=3, config=NSAConfig(*blocks))
    for backend in CPU_BACKENDS:
        check(phi, backend)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_strided(kind, packed, backend):
    check(Phi(kind, (70, 50)[: 1 + packed], packed=packed, strided=True), backend)


@pytest.mark.parametrize("kind", KINDS)
def test_summed_output(kind, device_backend):
    """The gradient that sum() sends has stride 0 in every dim."""
    phi = Phi(kind)
    inputs, dout = phi.inputs(device_backend)
    ones = torch.ones((), dtype=dout.dtype, device=dout.device).expand(dout.shape)
    check_against_reference(phi.kernel, phi.oracle, inputs, ones)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_twice(kind, backend):
    phi = Phi(kind, (0, 200, 333, 31, 64), packed=True, per_head=True)
    inputs, dout = phi.inputs(backend)
    with poisoned(backend.device):
        first, second = (run_forward_backward(phi.kernel, inputs, dout) for _ in range(2))
    assert_same_bits(first[0], second[0], "out")
    if backend.device == "cpu":
        for name in inputs:
            assert_same_bits(first[1][name], second[1][name], f"d{name}")


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_a_grid_dimension(kind, device_backend):
    """More than 65,535 compressed rows and more than 65,535 heads-times-batch."""
    config = NSAConfig(16, 16, 64)
    check(
        Phi(kind, (16,), batch=33_000, heads=2, dim=8, dim_out=8, hidden=8, config=config)
        if device_backend.device == "cpu"
        else Phi(kind, (16,), batch=66_000, heads=1, config=config, pos=False),
        device_backend,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_happens_once(kind):
    """16-bit inputs accumulate in float32: a result that is exact in float32 is exact."""
    phi = Phi(kind, (32,), batch=1, heads=1, pos=False, bias=False)
    inputs, _ = phi.inputs(Backend("cpu", torch.bfloat16))
    x = torch.ones_like(inputs["x"])
    if kind in ("mean", "weighted"):
        # 31 small terms that bfloat16 would lose one by one beside the 256.
        x[:, 0] = 256
        weight = torch.full((1, 32), 1 / 32, dtype=torch.bfloat16)
        out = phi.kernel({"x": x, **({"weight": weight} if kind == "weighted" else {})})
        assert (out == torch.tensor((256 + 31) / 32).bfloat16()).all()
    else:
        inputs["x"] = x
        inputs["w1"] = torch.full_like(inputs["w1"], 2.0**-8)
        if kind == "mlp":
            # The hidden units are gelu(8) = 8, so the terms of the output are 256 and 47 times 1.
            inputs["w2"] = torch.full_like(inputs["w2"], 1 / 8)
            inputs["w2"][..., 0] = 32
            assert (phi.kernel(inputs) == torch.tensor(256.0 + 47).bfloat16()).all()
        else:
            assert (phi.kernel(inputs) == 8).all()
