"""selected_attn, forward and backward, against the reference, with anybody's indices."""

import pytest
import torch
from helpers import SMALL, Problem, check_against_reference, poisoned
from operators import (
    SELECTED,
    assert_lse,
    fake_selection,
    kernel_keywords,
    op_seqlens,
    oracle_keywords,
)
from problems import LONG, MANY_ROWS, PROBLEMS, parametrize, setup

import nsa_ext
from nsa_ext import reference


@parametrize(PROBLEMS)
def test_matches_reference(problem, backend):
    SELECTED.check(problem, setup(problem, backend))


@parametrize(LONG + MANY_ROWS)
def test_large(problem, device_backend):
    SELECTED.check(problem, setup(problem, device_backend))


def check_indices(problem, backend, block_indices):
    """Forward and backward with these indices."""
    x = setup(problem, backend)

    def kernel(inputs):
        keywords = kernel_keywords(problem, backend.device)
        return nsa_ext.selected_attn(*inputs.values(), block_indices, **keywords)

    def oracle(inputs):
        keywords = oracle_keywords(problem, backend.device)
        return reference.selected_attn(*inputs.values(), block_indices, **keywords)

    return check_against_reference(kernel, oracle, SELECTED.pick(x), x["dout"])


DENSE = Problem("dense", seqlens=((150, 400),), batch=2, config=SMALL)
PACKED = Problem("packed", seqlens=((70, 70), (0, 9), (9, 3), (40, 300)), packed=True, config=SMALL)


def random_indices(problem, backend, low, high, count=7):
    generator = torch.Generator().manual_seed(1)
    shape = (*problem.lead("q"), problem.heads_kv, count)
    return torch.randint(low, high, shape, generator=generator).int().to(backend.device)


@parametrize([DENSE, PACKED])
def test_any_indices(problem, backend):
    """Out of range on both sides, repeated, unsorted, holes between them, blocks after t."""
    check_indices(problem, backend, random_indices(problem, backend, -3, 12))


@parametrize([DENSE, PACKED])
@pytest.mark.parametrize("extreme", [-(2**31), 2**31 - 1, 2**25, -(2**26)])
def test_wild_indices(problem, extreme, device_backend):
    """Products of these with the block length overflow int32."""
    indices = random_indices(problem, device_backend, -1, 7)
    indices[..., 2] = extreme
    indices[..., 5] = extreme
    check_indices(problem, device_backend, indices)


@parametrize([DENSE, PACKED])
def test_no_block_at_all(problem, backend):
    out, grads = check_indices(
        problem, backend, torch.full_like(random_indices(problem, backend, 0, 1), -1)
    )
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in grads.values())


def test_future_blocks_are_masked(device_backend):
    """Blocks that start after t give no key: the same bits as without them."""
    problem = Problem("", seqlens=((100, 320),), config=SMALL)
    x = setup(problem, device_backend)
    t = problem.positions().to(device_backend.device)[None, :, None, None]
    indices = random_indices(problem, device_backend, 0, 5)
    past = torch.where(indices * 64 <= t, indices, -1)
    assert not torch.equal(past, indices)
    keywords = kernel_keywords(problem, device_backend.device)
    with poisoned(device_backend.device):
        with_future = nsa_ext.selected_attn(x["q"], x["k"], x["v"], indices, **keywords)
        without = nsa_ext.selected_attn(x["q"], x["k"], x["v"], past, **keywords)
    assert torch.equal(with_future, without)


@pytest.mark.parametrize("layout", ["shuffled", "repeated", "holes"])
def test_order_and_repetition_do_not_matter(layout, backend):
    problem = Problem("", seqlens=((90, 400),), config=SMALL)
    x = setup(problem, backend)
    blocks = fake_selection(problem, backend.device)
    if layout == "shuffled":
        other = blocks.flip(-1)
    elif layout == "repeated":
        other = torch.cat([blocks, blocks.roll(1, -1)], dim=-1)
    else:
        other = torch.stack([torch.full_like(blocks, 99), blocks], dim=-1).flatten(-2)
    keywords = kernel_keywords(problem, backend.device)
    with poisoned(backend.device):
        out = nsa_ext.selected_attn(x["q"], x["k"], x["v"], blocks, **keywords)
        changed = nsa_ext.selected_attn(x["q"], x["k"], x["v"], other, **keywords)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(backend.dtype, 1e-2)
    torch.testing.assert_close(changed, out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 33, 64, 100])
def test_number_of_indices(count, device_backend):
    """The row of block_indices may have any width (on CUDA up to 64), whatever the configuration
    says."""
    problem = Problem("", seqlens=((40, 700),), config=SMALL, cpu_only=count > 64)
    check_indices(problem, device_backend, random_indices(problem, device_backend, 0, 11, count))


def test_every_block_is_causal_attention(backend):
    problem = Problem("", seqlens=((130, 300),), heads_q=4, heads_kv=4, config=SMALL)
    x = setup(problem, backend)
    every = torch.arange(5, dtype=torch.int32, device=backend.device).expand(1, 130, 4, 5)
    out, _ = check_indices(problem, backend, every.contiguous())
    heads_first = [x[name].double().transpose(1, 2) for name in ("q", "k", "v")]
    mask = torch.ones(130, 300, dtype=torch.bool, device=backend.device).tril(300 - 130)
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(backend.dtype, 2e-2)
    torch.testing.assert_close(out.double(), dense.transpose(1, 2), rtol=tolerance, atol=tolerance)


@parametrize(PROBLEMS)
def test_lse(problem, backend):
    x = setup(problem, backend)
    blocks = fake_selection(problem, backend.device)
    with poisoned(backend.device):
        _, lse = torch.ops.nsa_ext.selected_attn_fwd(
            x["q"], x["k"], x["v"], blocks, *op_seqlens(problem, backend.device),
            problem.config.select_size, problem.scale, False,
        )  # fmt: skip
    _, expected = reference.selected_attn(
        x["q"].double(), x["k"].double(), x["v"].double(), blocks, return_lse=True,
        **oracle_keywords(problem, backend.device),
    )  # fmt: skip
    assert lse.dtype == (torch.float64 if backend.dtype == torch.float64 else torch.float32)
    assert_lse(lse, expected)
