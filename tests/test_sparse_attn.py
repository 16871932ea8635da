"""sparse_attn, the whole operator: output, selection, and the gradients of all its inputs."""

import dataclasses

import pytest
import torch
from helpers import (
    Problem,
    assert_close_to_reference,
    assert_same_bits,
    assert_selection,
    poisoned,
    run_forward_backward,
)
from operators import (
    OPERATORS,
    SPARSE,
    SPARSE_SHARED,
    kernel_keywords,
    op_seqlens,
    oracle_keywords,
    raw_keys,
)
from problems import LONG, MANY_ROWS, PACKED, PROBLEMS, parametrize, setup

import nsa_ext
from nsa_ext import NSAConfig, reference

both_forms = pytest.mark.parametrize("operator", [SPARSE, SPARSE_SHARED], ids=str)


@both_forms
@parametrize(PROBLEMS)
def test_matches_reference(problem, operator, backend):
    x = setup(problem, backend)
    blocks, _, _ = operator.check(problem, x)
    assert_selection(blocks, x["q"], x["k_cmp"], problem)


@parametrize(LONG + MANY_ROWS)
def test_large(problem, device_backend):
    x = setup(problem, device_backend)
    blocks, _, _ = SPARSE.check(problem, x)
    assert_selection(blocks, x["q"], x["k_cmp"], problem)


@parametrize([PROBLEMS[6], PACKED[0]])
def test_selection_is_that_of_the_parts(problem, backend):
    x = setup(problem, backend)
    with poisoned(backend.device):
        _, blocks = SPARSE.kernel(problem, x)
        alone = nsa_ext.select_blocks(
            x["q"], x["k_cmp"], **raw_keys(problem), **kernel_keywords(problem, backend.device)
        )
    assert_same_bits(blocks, alone, "block_indices")


@parametrize([PROBLEMS[6], PACKED[0]])
def test_one_gate_is_one_branch(problem, backend):
    """With gates 1, 0, 0 (and so on) the output is that branch's, as the parts compute it."""
    x = setup(problem, backend)
    keywords = kernel_keywords(problem, backend.device)
    oracles = oracle_keywords(problem, backend.device)
    blocks = nsa_ext.select_blocks(x["q"], x["k_cmp"], **raw_keys(problem), **keywords)
    to64 = {name: tensor.double() for name, tensor in x.items()}

    def branch(x, which):
        if which == 0:
            return reference.compressed_attn(
                x["q"], x["k_cmp"], x["v_cmp"], **raw_keys(problem), **oracles
            )[0]
        if which == 1:
            return reference.selected_attn(x["q"], x["k"], x["v"], blocks, **oracles)
        return reference.window_attn(x["q"], x["k_win"], x["v_win"], **oracles)

    for which in range(3):
        gates = torch.zeros_like(x["gates"])
        gates[..., which] = 1
        with poisoned(backend.device):
            out = SPARSE.run(problem, {**x, "gates": gates})
        assert_close_to_reference(out, branch(to64, which), branch(x, which), name=f"{which}")


def test_without_a_selection_the_output_is_the_same(device_backend):
    problem = PROBLEMS[6]
    x = setup(problem, device_backend)
    with poisoned(device_backend.device):
        out = nsa_ext.sparse_attn(
            x["q"], x["k"], x["v"], x["gates"], (x["k_cmp"], x["v_cmp"]),
            k_win=x["k_win"], v_win=x["v_win"], **kernel_keywords(problem, device_backend.device),
        )  # fmt: skip
    assert_same_bits(out, SPARSE.run(problem, x), "out")


@parametrize([PROBLEMS[6], PACKED[0]])
def test_needs_only_the_gradients_asked_for(problem, device_backend):
    """Any subset of the inputs may require grad; the gradients are the same as of all of them."""
    x = setup(problem, device_backend)
    _, grads = run_forward_backward(
        lambda inputs: SPARSE.run(problem, inputs, deterministic=True), SPARSE.pick(x), x["dout"]
    )
    for name in SPARSE.inputs:
        leaf = x[name].detach().requires_grad_()
        out = SPARSE.run(problem, {**x, name: leaf}, deterministic=True)
        with poisoned(device_backend.device):
            (grad,) = torch.autograd.grad(out, leaf, x["dout"])
        assert_same_bits(grad, grads[name], f"d{name}")


@both_forms
@parametrize([PROBLEMS[6], PACKED[0]])
def test_saved_branches(problem, operator, device_backend):
    """branch_out and branch_lse of the operator are those of the parts; absent unless asked for."""
    x = setup(problem, device_backend)
    windows = (x["k_win"], x["v_win"]) if operator is SPARSE else (None, None)

    def call(save):
        with poisoned(device_backend.device):
            return torch.ops.nsa_ext.sparse_attn_fwd(
                x["q"], x["k_cmp"], x["v_cmp"], x["k"], x["v"], *windows, x["gates"],
                *op_seqlens(problem, device_backend.device), problem.config.as_list(),
                problem.scale, save, False,
            )  # fmt: skip

    out, branch_out, branch_lse, blocks = call(True)
    bare = call(False)
    assert_same_bits(bare[0], out, "out")
    assert_same_bits(bare[3], blocks, "block_indices")
    assert bare[1].shape == (0, *branch_out.shape[1:]) and bare[2].shape == (
        0,
        *branch_lse.shape[1:],
    )
    assert branch_out.shape == (3, *out.shape)
    seqlens = op_seqlens(problem, device_backend.device)
    tail = (problem.scale, False)
    k_win, v_win = windows if operator is SPARSE else (x["k"], x["v"])
    ops = torch.ops.nsa_ext
    parts = [
        ops.compressed_attn_fwd(
            x["q"], x["k_cmp"], x["v_cmp"], *seqlens, problem.config.as_list(), *tail
        ),
        ops.selected_attn_fwd(
            x["q"], x["k"], x["v"], blocks, *seqlens, problem.config.select_size, *tail
        ),
        ops.window_attn_fwd(x["q"], k_win, v_win, *seqlens, problem.config.window, *tail),
    ]
    for branch, part in enumerate(parts):
        torch.testing.assert_close(branch_out[branch], part[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(branch_lse[branch], part[1], rtol=1e-5, atol=1e-5)
    gated = (branch_out.movedim(0, -1).double() * x["gates"].double().unsqueeze(-2)).sum(-1)
    wide = x["q"].dtype == torch.float32
    tolerance = 1e-5 if wide else 2e-2
    torch.testing.assert_close(out.double(), gated, rtol=tolerance, atol=tolerance)


# What holds for every operator.

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)
VARIED = Problem("varied", seqlens=((0, 0), (150, 150), (1, 700), (90, 420)), packed=True)


@every_operator
def test_same_bits_twice(operator, backend):
    """Always in the forward; in the backward with deterministic=True (on the CPU always)."""
    x = setup(VARIED, backend)

    def run(deterministic):
        return run_forward_backward(
            lambda inputs: operator.run(VARIED, inputs, deterministic=deterministic),
            operator.pick(x),
            x["dout"],
        )

    with poisoned(backend.device):
        out, grads = run(True)
        for _ in range(3):
            again, grads_again = run(True)
            assert_same_bits(again, out, "out")
            for name in operator.inputs:
                assert_same_bits(grads_again[name], grads[name], f"d{name}")
    for _ in range(3):
        free, free_grads = run(False)
        assert_same_bits(free, out, "out")
        if backend.device == "cpu":
            for name in operator.inputs:
                assert_same_bits(free_grads[name], grads[name], f"d{name}")


@every_operator
def test_deterministic_matches_reference(operator, backend):
    operator.check(VARIED, setup(VARIED, backend), deterministic=True)


@every_operator
def test_summed_output(operator, device_backend):
    """The gradient that sum() sends has stride 0 in every dim."""
    problem = dataclasses.replace(PROBLEMS[6])
    x = setup(problem, device_backend)
    x["dout"] = torch.ones((), device=device_backend.device).expand(x["dout"].shape)
    operator.check(problem, x)


@every_operator
def test_broadcast_batch(operator, device_backend):
    """K and V with stride 0 in the batch: one cache for all queries."""
    problem = Problem("", seqlens=((40, 300),), batch=3)
    x = setup(problem, device_backend)
    for name in ("k", "v", "k_cmp", "v_cmp", "k_win", "v_win"):
        x[name] = x[name][:1].expand(x[name].shape)
    operator.check(problem, x)


@every_operator
def test_heads_first_memory(operator, device_backend):
    """(B, H, S, D) memory seen as (B, S, H, D), and q, k, v as slices of one projection."""
    problem = Problem("", seqlens=((130, 130),), batch=2, heads_q=4, heads_kv=4)
    x = setup(problem, device_backend)
    heads_first = {
        name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in x.items()
    }
    operator.check(problem, heads_first)
    fused = torch.cat([x["q"], x["k"], x["v"]], dim=-1)
    slices = dict(zip(("q", "k", "v"), fused.split(64, dim=-1), strict=True))
    operator.check(problem, {**x, **slices})


@every_operator
def test_inputs_are_not_written(operator, device_backend):
    problem = PROBLEMS[6]
    x = setup(problem, device_backend)
    before = {name: tensor.clone() for name, tensor in x.items()}
    run_forward_backward(lambda inputs: operator.run(problem, inputs), operator.pick(x), x["dout"])
    for name, tensor in before.items():
        assert_same_bits(x[name], tensor, name)


@every_operator
def test_many_sequences(operator, device_backend):
    """A packed batch of sequences of one length gives the bits of a dense batch; on CUDA with more
    of them than a grid's y and z take."""
    on_cuda = device_backend.device == "cuda"
    dense = Problem(
        "",
        seqlens=((1, 64),) if on_cuda else ((1, 2),),
        batch=66_000 if on_cuda else 1_500,
        heads_q=1,
        heads_kv=1,
        dim_qk=64 if on_cuda else 8,
        dim_v=64 if on_cuda else 8,
        # One compressed token per stride of keys, so that its rows have the same layout packed.
        config=NSAConfig(32, 32, 64, 2, 1, 1, 2) if on_cuda else NSAConfig(1, 1, 1, 2, 1, 1, 2),
    )
    packed = dataclasses.replace(dense, packed=True, batch=1, seqlens=dense.seqlens * dense.batch)
    x = setup(dense, device_backend)
    flat = {name: tensor.flatten(0, 1) for name, tensor in x.items()}
    # The indices of SELECTED, which sees two blocks at most, are the same for all sequences.
    with poisoned(device_backend.device):
        out, grads = run_forward_backward(
            lambda inputs: operator.run(dense, inputs, deterministic=True),
            operator.pick(x),
            x["dout"],
        )
        flat_out, flat_grads = run_forward_backward(
            lambda inputs: operator.run(packed, inputs, deterministic=True),
            operator.pick(flat),
            flat["dout"],
        )
    assert_same_bits(flat_out, out.flatten(0, 1), "out")
    for name in operator.inputs:
        assert_same_bits(flat_grads[name], grads[name].flatten(0, 1), f"d{name}")
