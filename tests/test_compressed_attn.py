"""compressed_attn and select_blocks: output, gradients, LSE and the selection."""

import dataclasses

import pytest
import torch
from helpers import Problem, assert_same_bits, assert_selection, poisoned
from operators import (
    COMPRESSED,
    assert_lse,
    kernel_keywords,
    op_seqlens,
    oracle_keywords,
    raw_keys,
)
from problems import LONG, MANY_ROWS, PROBLEMS, parametrize, setup

import nsa_ext
from nsa_ext import NSAConfig, reference


@parametrize(PROBLEMS)
def test_matches_reference(problem, backend):
    x = setup(problem, backend)
    blocks, _, _ = COMPRESSED.check(problem, x)
    assert_selection(blocks, x["q"], x["k_cmp"], problem)


@parametrize(LONG + MANY_ROWS)
def test_large(problem, device_backend):
    x = setup(problem, device_backend)
    blocks, _, _ = COMPRESSED.check(problem, x)
    assert_selection(blocks, x["q"], x["k_cmp"], problem)


@parametrize(PROBLEMS)
def test_select_blocks(problem, backend):
    """The selection alone is the one that compressed_attn returns, to the bit."""
    x = setup(problem, backend)
    keywords = {**raw_keys(problem), **kernel_keywords(problem, backend.device)}
    with poisoned(backend.device):
        blocks = nsa_ext.select_blocks(x["q"], x["k_cmp"], **keywords)
        _, same = nsa_ext.compressed_attn(x["q"], x["k_cmp"], x["v_cmp"], **keywords)
    assert_selection(blocks, x["q"], x["k_cmp"], problem)
    assert_same_bits(blocks, same, "block_indices")


@parametrize(PROBLEMS)
def test_lse(problem, backend):
    x = setup(problem, backend)
    with poisoned(backend.device):
        _, lse, _ = torch.ops.nsa_ext.compressed_attn_fwd(
            x["q"], x["k_cmp"], x["v_cmp"], *op_seqlens(problem, backend.device),
            problem.config.as_list(), problem.scale, False,
        )  # fmt: skip
    _, _, expected = reference.compressed_attn(
        x["q"].double(), x["k_cmp"].double(), x["v_cmp"].double(), return_lse=True,
        **raw_keys(problem), **oracle_keywords(problem, backend.device),
    )  # fmt: skip
    assert lse.dtype == (torch.float64 if backend.dtype == torch.float64 else torch.float32)
    assert_lse(lse, expected)


def select(problem, backend, q, k_cmp):
    keywords = {**raw_keys(problem), **kernel_keywords(problem, backend.device)}
    with poisoned(backend.device):
        return nsa_ext.select_blocks(q, k_cmp, **keywords)


def test_equal_importance_selects_the_lower_index(backend):
    """All compressed keys equal: every block but the first and last has the same importance."""
    config = NSAConfig(num_selected=5, num_init=1, num_local=1)
    problem = Problem("", seqlens=((3, 1024),), config=config)
    x = setup(problem, backend)
    blocks = select(problem, backend, x["q"], torch.zeros_like(x["k_cmp"]))
    assert blocks.flatten(0, 2).tolist() == [[0, 1, 2, 3, 15]] * 6


def test_equal_blocks_select_the_lower_index(backend):
    """Pairs of equal blocks: where only one of a pair fits, it is the first."""
    config = NSAConfig(32, 32, 32, num_selected=4, num_init=0, num_local=1)
    problem = Problem("", seqlens=((1, 16 * 32),), batch=8, heads_q=2, heads_kv=1, config=config)
    x = setup(problem, backend)
    half = x["k_cmp"][:, :8]
    blocks = select(problem, backend, x["q"], torch.cat([half, half], dim=1)).cpu()
    for row in blocks[:, 0, 0].tolist():
        free = [j for j in row if j != 15]
        assert all(j - 8 in free for j in free if j >= 8 and j != 15), row


def test_a_clear_winner_is_selected(backend):
    """One compressed token that a query likes far more than the others brings in its block, and,
    where it straddles two blocks, both."""
    config = NSAConfig(num_selected=4, num_init=1, num_local=1)
    problem = Problem("", seqlens=((1, 1024),), heads_q=2, heads_kv=1, config=config)
    x = setup(problem, backend)
    q = torch.ones_like(x["q"])
    for c in range(4, 55):
        k_cmp = torch.zeros_like(x["k_cmp"])
        k_cmp[:, c] = 2.0
        blocks = select(problem, backend, q, k_cmp).flatten().tolist()
        assert c // 4 in blocks and (c % 4 < 3 or c // 4 + 1 in blocks), (c, blocks)


def test_group_shares_one_selection(backend):
    """The importance sums over the heads of a group: permuting them changes nothing."""
    problem = Problem("", seqlens=((33, 900),), heads_q=8, heads_kv=2)
    x = setup(problem, backend)
    permuted = x["q"].unflatten(2, (2, 4)).flip(3).flatten(2, 3)
    blocks = select(problem, backend, permuted, x["k_cmp"])
    assert_selection(blocks, x["q"], x["k_cmp"], problem)
    assert blocks.shape[2] == 2
    assert (blocks[:, :, 0] != blocks[:, :, 1]).any(), "kv heads select on their own"


@pytest.mark.parametrize("num_selected", [1, 2, 8, 15, 16, 17, 31, 32, 33, 64])
def test_numbers_of_selected_blocks(num_selected, device_backend):
    local = min(2, num_selected - num_selected // 2)
    config = NSAConfig(num_selected=num_selected, num_init=num_selected // 3, num_local=local)
    problem = Problem("", seqlens=((9, 2500),), config=config)
    x = setup(problem, device_backend)
    assert_selection(
        select(problem, device_backend, x["q"], x["k_cmp"]), x["q"], x["k_cmp"], problem
    )


def test_no_gradient_through_the_selection(device_backend):
    problem = Problem("", seqlens=((5, 300),))
    x = setup(problem, device_backend)
    q, k_cmp = x["q"].requires_grad_(), x["k_cmp"].requires_grad_()
    keywords = {**raw_keys(problem), **kernel_keywords(problem, device_backend.device)}
    assert not nsa_ext.select_blocks(q, k_cmp, **keywords).requires_grad
    out, blocks = nsa_ext.compressed_attn(q, k_cmp, x["v_cmp"], **keywords)
    assert out.requires_grad and not blocks.requires_grad


def test_extreme_scores(backend):
    problem = dataclasses.replace(PROBLEMS[0], seqlens=((130, 700),), softmax_scale=6.0)
    x = setup(problem, backend)
    blocks, _, _ = COMPRESSED.check(problem, x)
    assert_selection(blocks, x["q"], x["k_cmp"], problem)
