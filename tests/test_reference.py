"""`nsa_ext.reference` against loops written straight from the definitions, on tiny sizes."""

import dataclasses
import itertools

import brute_force
import pytest
import torch
from helpers import Backend, Problem, assert_selection_invariants, cu_seqlens, make_inputs

from nsa_ext import NSAConfig, reference

FLOAT64 = Backend("cpu", torch.float64)

CONFIGS = {
    "4-2-4": NSAConfig(4, 2, 4, num_selected=3, num_init=1, num_local=1, window=3),
    "4-2-8": NSAConfig(4, 2, 8, num_selected=2, num_init=0, num_local=1, window=8),
    "8-2-8": NSAConfig(8, 2, 8, num_selected=3, num_init=1, num_local=2, window=1),
    "3-1-5": NSAConfig(3, 1, 5, num_selected=2, num_init=0, num_local=0, window=100),
    "4-4-4": NSAConfig(4, 4, 4, num_selected=5, num_init=2, num_local=3, window=4),
    "1-1-1": NSAConfig(1, 1, 1, num_selected=4, num_init=1, num_local=1, window=2),
}
LENGTHS = [(1, 1), (3, 3), (4, 4), (17, 17), (5, 23), (1, 20), (23, 6), (2, 1), (3, 0), (0, 5)]


def problems():
    for (name, config), (sq, sk) in itertools.product(CONFIGS.items(), LENGTHS):
        yield Problem(
            f"{name}-{sq}x{sk}",
            seqlens=((sq, sk),),
            heads_q=4,
            dim_qk=3,
            dim_v=2,
            config=config,
        )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=problems(), ids=str)
def problem(request):
    return request.param


def test_compressed_attn(problem):
    x = make_inputs(problem, FLOAT64)
    seqlen_k = problem.seqlens[0][1]
    out, blocks, lse = reference.compressed_attn(
        x["q"], x["k_cmp"], x["v_cmp"], seqlen_k=seqlen_k, return_lse=True, **problem.keywords
    )
    expected = brute_force.compressed_attn(
        x["q"][0], x["k_cmp"][0], x["v_cmp"][0], seqlen_k, problem.config, problem.scale
    )
    close(out[0], expected[0])
    close(lse[0], expected[1])
    assert torch.equal(blocks[0], expected[2])
    assert_selection_invariants(blocks, problem)


def test_importance(problem):
    x = make_inputs(problem, FLOAT64)
    seqlen_k = problem.seqlens[0][1]
    imp = reference.importance(x["q"], x["k_cmp"], seqlen_k=seqlen_k, **problem.keywords)
    expected = brute_force.importance(
        x["q"][0], x["k_cmp"][0], seqlen_k, problem.config, problem.scale
    )
    close(imp[0], expected)


def test_selected_attn(problem):
    x = make_inputs(problem, FLOAT64)
    (sq, sk) = problem.seqlens[0]
    # Anybody's indices: out of range, repeated, in any order.
    blocks = torch.randint(-3, sk // problem.config.select_size + 3, (1, sq, 2, 4)).int()
    out, lse = reference.selected_attn(
        x["q"], x["k"], x["v"], blocks, return_lse=True, **problem.keywords
    )
    expected = brute_force.selected_attn(
        x["q"][0], x["k"][0], x["v"][0], blocks[0], problem.config, problem.scale
    )
    close(out[0], expected[0])
    close(lse[0], expected[1])


def test_window_attn(problem):
    x = make_inputs(problem, FLOAT64)
    out, lse = reference.window_attn(x["q"], x["k"], x["v"], return_lse=True, **problem.keywords)
    expected = brute_force.window_attn(
        x["q"][0], x["k"][0], x["v"][0], problem.config, problem.scale
    )
    close(out[0], expected[0])
    close(lse[0], expected[1])


def test_sparse_attn(problem):
    x = make_inputs(problem, FLOAT64)
    seqlen_k = problem.seqlens[0][1]
    out, blocks = reference.sparse_attn(
        x["q"], x["k"], x["v"], x["gates"], (x["k_cmp"], x["v_cmp"]),
        k_win=x["k_win"], v_win=x["v_win"], return_selection=True, **problem.keywords,
    )  # fmt: skip
    one = {name: tensor[0] for name, tensor in x.items()}
    config, scale = problem.config, problem.scale
    o_cmp, _, chosen = brute_force.compressed_attn(
        one["q"], one["k_cmp"], one["v_cmp"], seqlen_k, config, scale
    )
    o_slc, _ = brute_force.selected_attn(one["q"], one["k"], one["v"], chosen, config, scale)
    o_win, _ = brute_force.window_attn(one["q"], one["k_win"], one["v_win"], config, scale)
    gates = one["gates"]
    expected = gates[..., 0:1] * o_cmp + gates[..., 1:2] * o_slc + gates[..., 2:3] * o_win
    assert torch.equal(blocks[0], chosen)
    close(out[0], expected)


# Compression.


def phi(kind, heads, config, dim, dim_out=None, pos=True, bias=True):
    """Weights of phi by name."""
    length, hidden, dim_out = config.block_size, 5, dim_out or dim
    weights = {}
    if kind == "weighted":
        weights["weight"] = torch.randn(heads, length)
    if kind != "mean" and pos:
        weights["pos"] = torch.randn(heads, length, dim)
    if kind == "linear":
        weights["w1"] = torch.randn(heads, dim_out, length * dim)
    if kind == "mlp":
        weights["w1"] = torch.randn(heads, hidden, length * dim)
        weights["w2"] = torch.randn(heads, dim_out, hidden)
    if bias and kind in ("linear", "mlp"):
        weights["b1"] = torch.randn(heads, weights["w1"].shape[1])
    if bias and kind == "mlp":
        weights["b2"] = torch.randn(heads, dim_out)
    return {name: weight.double() for name, weight in weights.items()}


@pytest.mark.parametrize("seqlen", [0, 1, 4, 5, 18])
@pytest.mark.parametrize("plain", [False, True], ids=["pos-bias", "plain"])
@pytest.mark.parametrize("weight_heads", [1, 2])
@pytest.mark.parametrize("kind", ["mean", "weighted", "linear", "mlp"])
@pytest.mark.parametrize("config", ["4-2-4", "3-1-5", "4-4-4"])
def test_compress(config, kind, weight_heads, plain, seqlen):
    config = CONFIGS[config]
    dim_out = 3 if kind in ("mean", "weighted") else 4
    weights = phi(kind, weight_heads, config, 3, dim_out, pos=not plain, bias=not plain)
    x = torch.randn(2, seqlen, 2, 3, dtype=torch.float64)
    out = reference.compress(x, kind=kind, config=config, **weights)
    assert out.shape == (2, config.num_compressed(seqlen), 2, dim_out)
    for b in range(2):
        if out.shape[1]:
            close(out[b], brute_force.compress(x[b], config, **weights))


# The facts that the definition states with numbers.


def test_importance_weights_of_the_default_blocks():
    config = NSAConfig()
    overlap = reference.overlap(31, 8, config)
    for j in range(1, 7):
        weights = {c: overlap[c, j].item() for c in range(31) if overlap[c, j]}
        assert weights == {4 * j - 1: 1, 4 * j: 2, 4 * j + 1: 2, 4 * j + 2: 2, 4 * j + 3: 1}
    assert overlap[:, 0].tolist()[:5] == [2, 2, 2, 1, 0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_overlap(config):
    overlap = reference.overlap(9, 6, config)
    for c, j in itertools.product(range(9), range(6)):
        assert overlap[c, j] == brute_force.overlap(c, j, config)


def select(importance, **changes):
    config = NSAConfig(4, 4, 4, num_selected=4, num_init=1, num_local=1, window=1)
    config = dataclasses.replace(config, **changes)
    row = torch.tensor(importance, dtype=torch.float64)
    blocks = reference.select_blocks(
        row[None, None, None], seqlen_k=4 * len(importance), config=config
    )
    return blocks.flatten().tolist()


def test_selection_rules():
    # Forced blocks (first and last) win over any importance and count within n.
    assert select([0, 5, 9, 7, 0, 0]) == [0, 2, 3, 5]
    assert select([0, 5, 9, 7, 0, 0], num_local=3) == [0, 3, 4, 5]
    assert select([0, 5, 9, 7, 0, 0], num_init=3) == [0, 1, 2, 5]
    assert select([0, 5, 9, 7, 0, 0], num_init=0, num_local=0, num_selected=2) == [2, 3]
    # Equal importance: the lower index.
    assert select([0, 1, 1, 1, 1, 0]) == [0, 1, 2, 5]
    assert select([0, 1, 2, 1, 1, 0]) == [0, 1, 2, 5]
    assert select([0] * 6, num_init=0, num_local=0) == [0, 1, 2, 3]
    # Forced blocks that are both first and last count once.
    assert select([3, 4], num_init=2, num_local=2) == [0, 1, -1, -1]
    # Fewer candidates than n: all of them, -1 padded on the right.
    assert select([1, 2, 3]) == [0, 1, 2, -1]
    assert select([1]) == [0, -1, -1, -1]


def test_selection_candidates_start_at_or_before_t():
    # 10 keys in blocks of 4: position 7 is the last of block 1, position 8 the first of block 2.
    config = NSAConfig(4, 4, 4, num_selected=3, num_init=0, num_local=1, window=1)
    blocks = reference.select_blocks(torch.zeros(1, 10, 1, 3), config=config)[0, :, 0]
    assert blocks[7].tolist() == [0, 1, -1]
    assert blocks[8].tolist() == [0, 1, 2]


def visible_keys(attend, seqlen_q, seqlen_k):
    """The keys that each row of an attention function weighs: values are unit vectors."""
    q = torch.zeros(1, seqlen_q, 1, 2, dtype=torch.float64)
    k = torch.zeros(1, seqlen_k, 1, 2, dtype=torch.float64)
    v = torch.eye(seqlen_k, dtype=torch.float64)[None, :, None]
    return [row.nonzero().flatten().tolist() for row in attend(q, k, v)[0, :, 0]]


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_window_has_exactly_w_keys(window):
    config = NSAConfig(window=window)
    rows = visible_keys(lambda *qkv: reference.window_attn(*qkv, config=config), 6, 9)
    for i, keys in enumerate(rows):
        t = i + 3
        assert keys == list(range(max(0, t - window + 1), t + 1))
        assert len(keys) == min(window, t + 1)


def test_compressed_token_is_visible_once_complete():
    config = NSAConfig(4, 2, 4)
    q, k = torch.zeros(1, 9, 1, 2), torch.zeros(1, config.num_compressed(9), 1, 2)
    v = torch.eye(3)[None, :, None]
    out, _ = reference.compressed_attn(q, k, v, config=config)
    seen = [row.nonzero().flatten().tolist() for row in out[0, :, 0]]
    assert seen == [[], [], [], [0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]


def test_rows_that_see_nothing():
    """t < 0 where Sq > Sk: out 0, lse -inf, all indices -1, zero gradients, no NaN."""
    problem = Problem("", seqlens=((7, 3),), config=CONFIGS["4-2-4"])
    x = {name: tensor.requires_grad_() for name, tensor in make_inputs(problem, FLOAT64).items()}
    out, blocks = reference.sparse_attn(
        x["q"], x["k"], x["v"], x["gates"], (x["k_cmp"], x["v_cmp"]),
        return_selection=True, **problem.keywords,
    )  # fmt: skip
    assert (out[0, :4] == 0).all() and (out[0, 4:] != 0).any(-1).all()
    assert (blocks[0, :4] == -1).all()
    _, lse = reference.window_attn(x["q"], x["k"], x["v"], return_lse=True, **problem.keywords)
    assert (lse[..., :4] == -torch.inf).all() and torch.isfinite(lse[..., 4:]).all()
    grads = torch.autograd.grad(out.sum(), [x["q"], x["k"], x["v"], x["gates"]])
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][0, :4] == 0).all()


# Packed batches.


@pytest.mark.parametrize("kind", ["mean", "weighted", "linear", "mlp"])
def test_packed_compress_equals_separate(kind):
    config, lengths = CONFIGS["4-2-8"], [0, 5, 3, 13, 0, 8]
    weights = phi(kind, 1, config, 3)
    x = torch.randn(sum(lengths), 2, 3, dtype=torch.float64)
    packed = reference.compress(
        x, kind=kind, config=config, cu_seqlens=cu_seqlens(lengths), **weights
    )
    assert packed.shape == (len(x) // 2, 2, 3)
    expected, start = torch.zeros_like(packed), 0
    for length in lengths:
        tokens = reference.compress(
            x[None, start : start + length], kind=kind, config=config, **weights
        )[0]
        expected[start // 2 : start // 2 + len(tokens)] = tokens
        start += length
    close(packed, expected)


def test_packed_equals_separate():
    problem = Problem(
        "packed",
        seqlens=((0, 0), (9, 9), (0, 5), (1, 13), (7, 2), (4, 0), (0, 0)),
        packed=True,
        dim_qk=3,
        dim_v=2,
        config=CONFIGS["4-2-8"],
    )
    x = make_inputs(problem, FLOAT64)
    kv = x["k"], x["v"], x["gates"], (x["k_cmp"], x["v_cmp"])
    out, blocks = reference.sparse_attn(
        x["q"], *kv, k_win=x["k_win"], v_win=x["v_win"], return_selection=True,
        **problem.keywords, **problem.cu_seqlens("cpu"),
    )  # fmt: skip
    q, k = 0, 0
    for sq, sk in problem.seqlens:
        c = k // 2
        rows, keys = slice(q, q + sq), slice(k, k + sk)
        tokens = slice(c, c + problem.config.num_compressed(sk))
        separate, chosen = reference.sparse_attn(
            x["q"][None, rows], x["k"][None, keys], x["v"][None, keys], x["gates"][None, rows],
            (x["k_cmp"][None, tokens], x["v_cmp"][None, tokens]),
            k_win=x["k_win"][None, keys], v_win=x["v_win"][None, keys],
            return_selection=True, **problem.keywords,
        )  # fmt: skip
        close(out[rows], separate[0])
        assert torch.equal(blocks[rows], chosen[0])
        q, k = q + sq, k + sk
    assert_selection_invariants(blocks, problem)
