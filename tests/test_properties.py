"""What must hold for any configuration and any lengths: hypothesis on the CPU in float64 (every
random shape is a shape that the CPU backend takes), a few fixed shapes on CUDA."""

import dataclasses

import pytest
import torch
from helpers import (
    CUDA_BACKENDS,
    SMALL,
    Backend,
    Problem,
    assert_same_bits,
    assert_selection,
    backend_params,
    make_inputs,
    poisoned,
    run_forward_backward,
)
from hypothesis import given
from hypothesis import strategies as st
from operators import OPERATORS, SELECTED, SPARSE, SPARSE_SHARED, fake_selection, kernel_keywords
from problems import PACKED

import nsa_ext
from nsa_ext import NSAConfig

FLOAT64 = Backend("cpu", torch.float64)


@st.composite
def configs(draw):
    stride = draw(st.integers(1, 4))
    block = draw(st.integers(1, 4))
    select = draw(st.integers(block, 6))
    num_init, num_local = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    least = max(1, num_init + num_local)
    return NSAConfig(
        block_size=block * stride,
        block_stride=stride,
        select_size=select * stride,
        num_selected=draw(st.integers(least, least + 4)),
        num_init=num_init,
        num_local=num_local,
        window=draw(st.integers(1, 40)),
    )


lengths = st.tuples(st.integers(0, 70), st.integers(0, 90))


@st.composite
def problems(draw, packed=None, seqlens=None):
    packed = draw(st.booleans()) if packed is None else packed
    heads_kv = draw(st.integers(1, 3))
    return Problem(
        "random",
        seqlens=tuple(draw(seqlens or st.lists(lengths, min_size=1, max_size=4 if packed else 1))),
        packed=packed,
        batch=1 if packed else draw(st.integers(1, 2)),
        heads_q=heads_kv * draw(st.integers(1, 5)),
        heads_kv=heads_kv,
        dim_qk=draw(st.integers(1, 20)),
        dim_v=draw(st.integers(1, 20)),
        config=draw(configs()),
        softmax_scale=draw(st.sampled_from([None, 0.1, 2.0])),
        strided=draw(st.booleans()),
    )


def compare(a, b, name):
    """Equal up to the order of sums."""
    tolerance = 1e-12 if a.dtype == torch.float64 else 2e-2
    torch.testing.assert_close(
        a, b, rtol=tolerance, atol=tolerance, msg=lambda message: f"{name}: {message}"
    )


# Every operator against the reference.


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@given(problem=problems())
def test_matches_reference(operator, problem):
    x = make_inputs(problem, FLOAT64)
    blocks, _, _ = operator.check(problem, x)
    if blocks is not None:
        assert_selection(blocks, x["q"], x["k_cmp"], problem)


# Causality.


def check_causality(problem, backend, cut):
    """Rows up to position `cut` do not see a change of what comes later, to the bit, nor does a
    gradient of theirs reach it."""
    config, (sq, sk) = problem.config, problem.seqlens[0]
    x = make_inputs(problem, backend)
    rows = max(0, min(sq, cut + 1 - (sk - sq)))  # rows of q with t <= cut
    tokens = max(0, config.num_compressed(min(sk, cut + 1)))  # complete at cut
    past = {"k_cmp": tokens, "v_cmp": tokens, "q": rows, "gates": rows}
    changed = {}
    for name, tensor in x.items():
        begin = past.get(name, cut + 1)
        later = (torch.arange(tensor.shape[1], device=tensor.device) >= begin)[None, :, None, None]
        changed[name] = torch.where(later, tensor.flip(1) * -7 + 3, tensor)
    with poisoned(backend.device):
        out, blocks = SPARSE.kernel(problem, x)
        changed_out, changed_blocks = SPARSE.kernel(problem, changed)
    assert_same_bits(changed_out[:, :rows], out[:, :rows], "out")
    assert_same_bits(changed_blocks[:, :rows], blocks[:, :rows], "block_indices")

    dout = x["dout"].clone()
    dout[:, rows:] = 0
    _, grads = run_forward_backward(lambda y: SPARSE.run(problem, y), SPARSE.pick(x), dout)
    for name in ("k", "v", "k_win", "v_win", "k_cmp", "v_cmp"):
        assert (grads[name][:, past.get(name, cut + 1) :] == 0).all(), name


@given(problem=problems(packed=False), data=st.data())
def test_causality(problem, data):
    cut = data.draw(st.integers(0, max(0, problem.seqlens[0][1] - 1)))
    check_causality(problem, FLOAT64, cut)


# Packed batches, chunks of queries, shared K and V.


def sequence_tensors(problem, x):
    """The tensors of each sequence of a packed batch, with a batch dim of 1."""
    q, k = 0, 0
    for sq, sk in problem.seqlens:
        c = k // problem.config.block_stride
        rows = {
            "q": slice(q, q + sq),
            "k": slice(k, k + sk),
            "cmp": slice(c, c + problem.config.num_compressed(sk)),
        }
        kinds = {"q": "q", "gates": "q", "dout": "q", "k_cmp": "cmp", "v_cmp": "cmp"}
        yield rows, {name: t[None, rows[kinds.get(name, "k")]] for name, t in x.items()}
        q, k = q + sq, k + sk


def check_packed(problem, backend, operator):
    x = make_inputs(problem, backend)
    with poisoned(backend.device):
        out, grads = run_forward_backward(
            lambda y: operator.run(problem, y), operator.pick(x), x["dout"]
        )
    parts = zip(sequence_tensors(problem, x), problem.unpacked(), strict=True)
    for (rows, tensors), alone in parts:
        separate, separate_grads = run_forward_backward(
            lambda y, alone=alone: operator.run(alone, y), operator.pick(tensors), tensors["dout"]
        )
        compare(out[None, rows["q"]], separate, "out")
        for name in operator.inputs:
            which = "q" if name in ("q", "gates") else "cmp" if name.endswith("cmp") else "k"
            compare(grads[name][None, rows[which]], separate_grads[name], f"d{name}")


# SELECTED takes random indices of its own, drawn per call: it has a test below.
packable = [operator for operator in OPERATORS if operator is not SELECTED]


@pytest.mark.parametrize("operator", packable, ids=str)
@given(problem=problems(packed=True))
def test_packed_equals_separate(operator, problem):
    check_packed(problem, FLOAT64, operator)


def check_packed_selected(problem, backend):
    x = make_inputs(problem, backend)
    blocks = fake_selection(problem, backend.device)
    with poisoned(backend.device):
        out = nsa_ext.selected_attn(
            x["q"], x["k"], x["v"], blocks, **kernel_keywords(problem, backend.device)
        )
    parts = zip(sequence_tensors(problem, x), problem.unpacked(), strict=True)
    for (rows, one), alone in parts:
        separate = nsa_ext.selected_attn(
            one["q"], one["k"], one["v"], blocks[None, rows["q"]],
            **kernel_keywords(alone, backend.device),
        )  # fmt: skip
        compare(out[None, rows["q"]], separate, "out")


@given(problem=problems(packed=True))
def test_packed_equals_separate_selected(problem):
    check_packed_selected(problem, FLOAT64)


def check_suffix(problem, backend, count):
    """A call with the last queries alone gives the last rows of the call with all."""
    x = make_inputs(problem, backend)
    (sq, sk) = problem.seqlens[0]
    count = min(count, sq)
    tail = {**x, **{name: x[name][:, sq - count :] for name in ("q", "gates")}}
    chunk = dataclasses.replace(problem, seqlens=((count, sk),))
    with poisoned(backend.device):
        out, blocks = SPARSE.kernel(problem, x)
        tail_out, tail_blocks = SPARSE.kernel(chunk, tail)
    if backend.dtype == torch.float64 or torch.equal(tail_blocks, blocks[:, sq - count :]):
        compare(tail_out, out[:, sq - count :], "out")
    assert_selection(tail_blocks, tail["q"], x["k_cmp"], chunk)


@given(problem=problems(packed=False), count=st.integers(0, 70))
def test_last_queries_alone(problem, count):
    check_suffix(problem, FLOAT64, count)


def check_shared(problem, backend):
    """One K and V for the selected and the window branch: the same as two equal pairs, and its
    gradient is the sum of theirs."""
    x = make_inputs(problem, backend)
    equal = {**x, "k_win": x["k"], "v_win": x["v"]}
    with poisoned(backend.device):
        out, grads = run_forward_backward(
            lambda y: SPARSE_SHARED.run(problem, y), SPARSE_SHARED.pick(x), x["dout"]
        )
        own, own_grads = run_forward_backward(
            lambda y: SPARSE.run(problem, y), SPARSE.pick(equal), x["dout"]
        )
    assert_same_bits(out, own, "out")
    for name in ("q", "k_cmp", "v_cmp", "gates"):
        compare(grads[name], own_grads[name], f"d{name}")
    for name in ("k", "v"):
        compare(grads[name], own_grads[name] + own_grads[f"{name}_win"], f"d{name}")


@given(problem=problems())
def test_shared_keys_and_values(problem):
    check_shared(problem, FLOAT64)


@given(problem=problems())
def test_linear_in_values_and_gates(problem):
    """Twice the values, or twice the gates, is twice the output: exact in binary arithmetic."""
    x = make_inputs(problem, FLOAT64)
    out = SPARSE.run(problem, x)
    doubled = {name: x[name] * 2 for name in ("v", "v_cmp", "v_win")}
    assert_same_bits(SPARSE.run(problem, {**x, **doubled}), out * 2, "values")
    assert_same_bits(SPARSE.run(problem, {**x, "gates": x["gates"] * 2}), out * 2, "gates")


# The same on CUDA, with shapes that its kernels take.

on_cuda = pytest.mark.parametrize("backend", backend_params(CUDA_BACKENDS), indirect=True)
CUDA_PROBLEM = Problem("cuda", seqlens=((200, 330),), batch=2, heads_q=8, config=SMALL)


@on_cuda
@pytest.mark.parametrize("cut", [0, 63, 129, 130, 200, 256, 328])
def test_causality_on_cuda(cut, backend):
    check_causality(CUDA_PROBLEM, backend, cut)


@on_cuda
@pytest.mark.parametrize("operator", packable, ids=str)
def test_packed_equals_separate_on_cuda(operator, backend):
    check_packed(PACKED[0], backend, operator)
    check_packed_selected(PACKED[0], backend)


@on_cuda
@pytest.mark.parametrize("count", [0, 1, 63, 64, 100])
def test_last_queries_alone_on_cuda(count, backend):
    check_suffix(CUDA_PROBLEM, backend, count)


@on_cuda
def test_shared_keys_and_values_on_cuda(backend):
    check_shared(CUDA_PROBLEM, backend)
