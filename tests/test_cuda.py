"""What only a GPU can get wrong: 64-bit offsets, graph capture, streams, forced backends."""

import pytest
import torch
from helpers import (
    CUDA_BACKENDS,
    SMALL,
    Problem,
    assert_same_bits,
    backend_params,
    make_inputs,
    poisoned,
    run_forward_backward,
)
from operators import COMPRESSED, OPERATORS, SELECTED, SPARSE, WINDOW
from test_compress import KINDS, Phi

import nsa_ext
from nsa_ext import NSAConfig

pytestmark = pytest.mark.gpu

BF16 = CUDA_BACKENDS[0]
on_cuda = pytest.mark.parametrize(
    "backend", backend_params([BF16, *CUDA_BACKENDS[2:]]), indirect=True
)
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)
PROBLEM = Problem("graph", seqlens=((130, 130), (0, 5), (40, 300)), packed=True, config=SMALL)


@on_cuda
@pytest.mark.parametrize(
    "operator",
    [COMPRESSED, SELECTED, WINDOW, SPARSE],
    ids=["compressed", "selected", "window", "sparse"],
)
def test_offsets_past_2_31_elements(operator, backend):
    """q of 2**31 + 2**25 elements, as a view of memory where rows are far apart: the last rows lie
    past the range of int32. Against the same call on compact memory."""
    problem = Problem("", seqlens=((264, 300),), heads_q=8, heads_kv=2, config=SMALL)
    x = make_inputs(problem, backend)
    row = 2**23  # elements between rows: 264 rows span 2**31 + 2**26
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    memory = torch.empty(264 * row, dtype=backend.dtype, device="cuda")
    far = memory.as_strided(x["q"].shape, (0, row, 64, 1))
    far.copy_(x["q"])

    def run(tensors):
        return run_forward_backward(
            lambda y: operator.run(problem, y, deterministic=True),
            operator.pick(tensors),
            x["dout"],
        )

    with poisoned(backend.device):
        out, grads = run(x)
    far_out, far_grads = run({**x, "q": far})
    assert_same_bits(far_out, out, "out")
    for name in operator.inputs:
        assert_same_bits(far_grads[name], grads[name], f"d{name}")


@on_cuda
def test_tensors_of_more_than_2_31_elements(backend):
    """Contiguous q, out and dq that are themselves larger than int32 can count."""
    seqlen, heads = 2**18 + 64, 128
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    config = NSAConfig(window=64)
    tail = Problem("", seqlens=((64, 128),), heads_q=heads, heads_kv=4, config=config)
    x = make_inputs(tail, backend)
    q = torch.zeros(1, seqlen, heads, 64, dtype=backend.dtype, device="cuda")
    assert q.numel() > 2**31
    k, v = (torch.zeros(1, seqlen, 4, 64, dtype=backend.dtype, device="cuda") for _ in range(2))
    q[:, -64:], k[:, -128:], v[:, -128:] = x["q"], x["k"], x["v"]
    q.requires_grad_()
    out = nsa_ext.window_attn(q, k, v, config=config)
    dout = torch.zeros_like(out)
    dout[:, -64:] = x["dout"]
    (dq,) = torch.autograd.grad(out, q, dout)
    expected, grads = run_forward_backward(lambda y: WINDOW.run(tail, y), WINDOW.pick(x), x["dout"])
    torch.testing.assert_close(out[:, -64:], expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dq[:, -64:], grads["q"], rtol=2e-2, atol=2e-2)
    assert (out[:, : 2**17] == 0).all() and (dq[:, : 2**17] == 0).all()


def captured(function):
    """A CUDA graph of function() and what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@on_cuda
@every_operator
def test_graph_capture(operator, backend):
    """Forward and backward in one graph; replays follow new values of the inputs."""
    x = make_inputs(PROBLEM, backend)
    tensors, dout = operator.pick(x), x["dout"]
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}

    def function():
        out = operator.run(PROBLEM, leaves, deterministic=True)
        return out, torch.autograd.grad(out, list(leaves.values()), dout)

    graph, (out, grads) = captured(function)
    for seed in (0, 7):
        fresh = make_inputs(PROBLEM, backend, seed)
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(fresh[name])
        graph.replay()
        expected, expected_grads = run_forward_backward(
            lambda y: operator.run(PROBLEM, y, deterministic=True), operator.pick(fresh), dout
        )
        assert_same_bits(out, expected, "out")
        for name, grad in zip(leaves, grads, strict=True):
            assert_same_bits(grad, expected_grads[name], f"d{name}")


@on_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_graph_capture_of_compression(kind, backend):
    phi = Phi(kind, (300,), per_head=True)
    inputs, dout = phi.inputs(backend)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}

    def function():
        out = phi.kernel(leaves)
        return out, torch.autograd.grad(out, list(leaves.values()), dout)

    graph, (out, grads) = captured(function)
    with torch.no_grad():
        leaves["x"].mul_(-0.5)
    graph.replay()
    expected, expected_grads = run_forward_backward(phi.kernel, leaves, dout)
    assert_same_bits(out, expected, "out")
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, expected_grads[name], rtol=2e-2, atol=2e-2)


@on_cuda
@every_operator
def test_several_streams(operator, backend):
    """Concurrent calls on several streams do not disturb each other."""
    problems = [
        Problem("", seqlens=((n, 2 * n),), heads_q=8, heads_kv=2, config=SMALL)
        for n in (100, 257, 513, 300)
    ]
    inputs = [make_inputs(problem, backend, seed) for seed, problem in enumerate(problems)]

    def run(problem, x):
        return run_forward_backward(
            lambda y: operator.run(problem, y, deterministic=True), operator.pick(x), x["dout"]
        )

    expected = [run(*call) for call in zip(problems, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(5):
        results = []
        for stream, problem, x in zip(streams, problems, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(problem, x))
        torch.cuda.synchronize()
        for (out, grads), (right, right_grads) in zip(results, expected, strict=True):
            assert_same_bits(out, right, "out")
            for name in operator.inputs:
                assert_same_bits(grads[name], right_grads[name], f"d{name}")


@on_cuda
@every_operator
def test_no_host_synchronisation(operator, backend):
    x = make_inputs(PROBLEM, backend)

    def run():
        run_forward_backward(lambda y: operator.run(PROBLEM, y), operator.pick(x), x["dout"])

    run()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_the_required_shapes_are_supported():
    BF16.active()
    for dims in [(64, 64), (128, 128), (192, 128)]:
        for group in (1, 2, 4, 6, 8, 12, 16, 32):
            reasons = nsa_ext.supports(
                num_heads=2 * group, num_kv_heads=2, head_dim=dims[0], head_dim_v=dims[1]
            )
            assert reasons == [], (dims, group, reasons)
