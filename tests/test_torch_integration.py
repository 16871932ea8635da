"""opcheck, torch.compile, export, fake and meta tensors, autocast."""

import pytest
import torch
from helpers import (
    CUDA_BACKENDS,
    Backend,
    Problem,
    assert_same_bits,
    backend_params,
    make_inputs,
    run_forward_backward,
)
from operators import OPERATORS, SPARSE, WINDOW, fake_selection, op_seqlens
from test_compress import KINDS, Phi
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import nsa_ext
from nsa_ext import KVCompressor, NSAAttention, NSAConfig

ops = torch.ops.nsa_ext

# Tiny on the CPU; on CUDA the smallest that its kernels take.
CONFIGS = {
    "cpu": NSAConfig(4, 2, 4, 3, 1, 1, 6),
    "cuda": NSAConfig(num_selected=3, num_init=1, num_local=1, window=40),
}
backends = pytest.mark.parametrize(
    "backend", backend_params([Backend("cpu", torch.float32), CUDA_BACKENDS[0]]), indirect=True
)
layouts = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)


def problem_of(backend, packed, seqlen=None):
    dim = 8 if backend.device == "cpu" else 64
    long = seqlen or (21 if backend.device == "cpu" else 210)
    return Problem(
        "integration",
        seqlens=((5, long), (0, 3), (long, long)) if packed else ((9, long),),
        packed=packed,
        dim_qk=dim,
        dim_v=6 if backend.device == "cpu" else 64,
        config=CONFIGS[backend.device],
    )


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# opcheck: schema, fake kernel (shapes, strides, dtypes), autograd registration, AOT dispatch.


def differentiable(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def forward_calls(problem, x, device):
    """name -> arguments of each attention operator, inputs requiring grad."""
    seqlens = op_seqlens(problem, device)
    blocks = fake_selection(problem, device)
    config, scale = problem.config, problem.scale
    t = dict(zip(x, differentiable(*x.values()), strict=True))
    common = (t["q"], t["k_cmp"], t["v_cmp"], t["k"], t["v"])
    rest = (t["gates"], *seqlens, config.as_list(), scale, True, True)
    return {
        "window_attn_fwd": (t["q"], t["k"], t["v"], *seqlens, config.window, scale, True),
        "selected_attn_fwd": (
            t["q"], t["k"], t["v"], blocks, *seqlens, config.select_size, scale, True,
        ),
        "compressed_attn_fwd": (
            t["q"], t["k_cmp"], t["v_cmp"], *seqlens, config.as_list(), scale, True,
        ),
        "select_blocks": (x["q"], x["k_cmp"], *seqlens, config.as_list(), scale),
        "sparse_attn_fwd": (*common, t["k_win"], t["v_win"], *rest),
        "sparse_attn_fwd/shared": (*common, None, None, *rest),
    }  # fmt: skip


ATTENTION_OPS = (
    "window_attn_fwd", "selected_attn_fwd", "compressed_attn_fwd", "select_blocks",
    "sparse_attn_fwd", "sparse_attn_fwd/shared",
)  # fmt: skip


@backends
@layouts
@pytest.mark.parametrize("name", ATTENTION_OPS)
def test_opcheck_forward(name, packed, backend):
    problem = problem_of(backend, packed)
    arguments = forward_calls(problem, make_inputs(problem, backend), backend.device)[name]
    torch.library.opcheck(getattr(ops, name.split("/")[0]).default, arguments)


@backends
@layouts
@pytest.mark.parametrize("name", [name for name in ATTENTION_OPS if name != "select_blocks"])
def test_opcheck_backward(name, packed, backend):
    problem = problem_of(backend, packed)
    x = make_inputs(problem, backend)
    name, _, shared = name.partition("/")
    arguments = forward_calls(problem, x, backend.device)[name + (shared and f"/{shared}")]
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    results = getattr(ops, name)(*arguments)
    if name == "sparse_attn_fwd":
        tensors, numbers = arguments[:8], arguments[8:]
        numbers = [*numbers[:-2], numbers[-1]]
        call = (x["dout"], *tensors, *results[1:], *numbers)
    else:
        count = 4 if name == "selected_attn_fwd" else 3
        call = (x["dout"], *arguments[:3], *results[:2], *arguments[3:count], *arguments[count:])
    # The derivative of a backward raises by design, so there is no AOT dispatch of one.
    torch.library.opcheck(
        getattr(ops, name.replace("_fwd", "_bwd")).default,
        call,
        test_utils=("test_schema", "test_faketensor"),
    )


@backends
@layouts
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_compression(kind, packed, backend):
    config, dim = CONFIGS[backend.device], 8 if backend.device == "cpu" else 64
    phi = Phi(
        kind, (150, 0, 3) if packed else (150,), packed=packed, dim=dim, dim_out=dim, hidden=dim,
        config=config,
    )  # fmt: skip
    inputs, dout = phi.inputs(backend)
    names = ("weight", "pos") if kind in ("mean", "weighted") else ("pos", "w1", "b1", "w2", "b2")
    op = "compress_pool" if kind in ("mean", "weighted") else "compress_mlp"
    x, *weights = differentiable(inputs["x"], *(inputs.get(name) for name in names))
    tail = (
        phi.offsets(backend.device), max(phi.seqlens), config.block_size, config.block_stride,
    )  # fmt: skip
    torch.library.opcheck(getattr(ops, f"{op}_fwd").default, (x, *weights, *tail))
    weights = [None if w is None else w.detach() for w in weights]
    torch.library.opcheck(
        getattr(ops, f"{op}_bwd").default,
        (dout, x.detach(), *weights, *tail),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_every_operator_is_checked():
    """A new operator must come with an opcheck."""
    registered = {
        name.removeprefix("nsa_ext::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nsa_ext::")
    }
    checked = {name.split("/")[0] for name in ATTENTION_OPS}
    checked |= {name.replace("_fwd", "_bwd") for name in checked}
    checked |= {f"compress_{kind}_{way}" for kind in ("pool", "mlp") for way in ("fwd", "bwd")}
    queries = {"build_info", "supports", "set_cuda_backend", "max_decode_rows"}
    cache = {"cache_gather", "cache_append", "cache_store_mlp", "cache_store_pool"}
    cache.add("decode_fwd")
    assert registered == checked | queries | cache  # those of the cache: test_cache_ops.py


# torch.compile


@backends
@layouts
@every_operator
def test_compile(operator, packed, backend):
    """fullgraph, forward and backward, the bits of eager."""
    problem = problem_of(backend, packed)
    x = make_inputs(problem, backend)
    if operator.name == "selected":
        fake_selection(problem, backend.device)
    problem.cu_seqlens(backend.device)
    kernel = operator_function(operator, problem, backend.device)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    expected, grads = run_forward_backward(kernel, operator.pick(x), x["dout"])
    out, compiled_grads = run_forward_backward(compiled, operator.pick(x), x["dout"])
    assert_same_bits(out, expected, "out")
    for name in operator.inputs:
        assert_same_bits(compiled_grads[name], grads[name], f"d{name}")


def operator_function(operator, problem, device):
    """The operator as a function of its tensors alone; nothing else is made while compiling."""
    lengths = {**problem.cu_seqlens(device), **problem.max_seqlens()}
    keywords = {**problem.keywords, **lengths, "deterministic": True}
    raw = {} if problem.packed else {"seqlen_k": problem.seqlens[0][1]}
    blocks = fake_selection(problem, device)

    def function(x):
        if operator.name == "window":
            return nsa_ext.window_attn(x["q"], x["k"], x["v"], **keywords)
        if operator.name == "selected":
            return nsa_ext.selected_attn(x["q"], x["k"], x["v"], blocks, **keywords)
        if operator.name == "compressed":
            return nsa_ext.compressed_attn(x["q"], x["k_cmp"], x["v_cmp"], **raw, **keywords)[0]
        windows = {name: x[name] for name in ("k_win", "v_win") if name in x}
        return nsa_ext.sparse_attn(
            x["q"], x["k"], x["v"], x["gates"], (x["k_cmp"], x["v_cmp"]), **windows, **keywords
        )

    return function


@backends
@layouts
@pytest.mark.parametrize("kind", KINDS)
def test_compile_module(kind, packed, backend):
    """The whole layer, parameters included."""
    module = layer(backend, kind)
    seqlens = [30, 0, 11] if packed else [41]
    x, keywords = layer_input(backend, seqlens, packed)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = list(module.parameters())
    expected = module(x, **keywords)
    expected_grads = torch.autograd.grad(expected.float().square().sum(), [x, *parameters])
    out = compiled(x, **keywords)
    grads = torch.autograd.grad(out.float().square().sum(), [x, *parameters])
    tolerance = 1e-5 if backend.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for grad, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, right, rtol=10 * tolerance, atol=10 * tolerance)


def layer(backend, kind="mlp", **options):
    dim = 32 if backend.device == "cpu" else 256
    return NSAAttention(
        dim, 4, 2, dim // 4, config=CONFIGS[backend.device], compress=kind, device=backend.device,
        dtype=backend.dtype, **options,
    )  # fmt: skip


def layer_input(backend, seqlens, packed):
    dim = 32 if backend.device == "cpu" else 256
    shape = (sum(seqlens), dim) if packed else (2, seqlens[0], dim)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator).to(backend.device, backend.dtype)
    keywords = {}
    if packed:
        offsets = torch.tensor([0, *seqlens]).cumsum(0).int().to(backend.device)
        keywords = {"cu_seqlens": offsets, "max_seqlen": max(seqlens)}
    return x.requires_grad_(), keywords


@backends
def test_dynamic_shapes_compile_once(backend):
    config = CONFIGS[backend.device]

    def function(q, k, v, gates, k_cmp, v_cmp):
        return nsa_ext.sparse_attn(q, k, v, gates, (k_cmp, v_cmp), config=config)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for seqlen in (130, 77, 201, 330):
        x = make_inputs(problem_of(backend, False, seqlen), backend)
        arguments = [x[name] for name in ("q", "k", "v", "gates", "k_cmp", "v_cmp")]
        arguments = differentiable(*arguments)
        expected = function(*arguments)
        expected_grads = torch.autograd.grad(expected, arguments, x["dout"])
        out = compiled(*arguments)
        assert_same_bits(out, expected, "out")
        grads = torch.autograd.grad(out, arguments, x["dout"])
        if backend.device == "cpu":
            for grad, right in zip(grads, expected_grads, strict=True):
                assert_same_bits(grad, right, "gradient")
    assert counter.frame_count == 1, "recompiled for another length"


@backends
def test_dynamic_shapes_of_the_module(backend):
    module = layer(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    tolerance = 1e-5 if backend.dtype == torch.float32 else 3e-2
    for seqlen in (130, 77, 201):
        x, _ = layer_input(backend, [seqlen], False)
        out = compiled(x)
        torch.testing.assert_close(out, module(x), rtol=tolerance, atol=tolerance)
        out.sum().backward()
    assert counter.frame_count == 1, "recompiled for another length"


@backends
def test_inductor(backend):
    module = layer(backend)
    x, _ = layer_input(backend, [41], False)
    try:
        compiled = torch.compile(module, fullgraph=True)
        out = compiled(x)
        grads = torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, torch._inductor.exc.InvalidCxxCompiler):
            pytest.skip("inductor finds no C++ compiler")
        raise
    expected = module(x)
    right = torch.autograd.grad(expected.float().square().sum(), [x, *module.parameters()])
    tolerance = 1e-4 if backend.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for grad, other in zip(grads, right, strict=True):
        torch.testing.assert_close(grad, other, rtol=10 * tolerance, atol=10 * tolerance)


# Export, fake and meta tensors


@backends
def test_export(backend):
    """With a free sequence length; the exported program runs on another one."""
    module = layer(backend)
    x, _ = layer_input(backend, [130], False)
    seqlen = torch.export.Dim("seqlen", min=70, max=4096)
    program = torch.export.export(module, (x.detach(),), dynamic_shapes=({1: seqlen},))
    assert any("nsa_ext.sparse_attn_fwd" in str(node.target) for node in program.graph.nodes)
    other, _ = layer_input(backend, [203], False)
    with torch.no_grad():
        out = program.module()(other)
        torch.testing.assert_close(out, module(other), rtol=1e-2, atol=1e-2)


@layouts
@every_operator
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_fake_tensors_have_the_real_metadata(operator, packed, strided):
    backend = Backend("cpu", torch.bfloat16)
    problem = problem_of(backend, packed)
    x = make_inputs(problem, backend)
    if strided:
        x = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in x.items()}
    function = operator_function(operator, problem, "cpu")
    real, real_grads = run_forward_backward(function, operator.pick(x), x["dout"])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_x = {name: mode.from_tensor(tensor) for name, tensor in x.items()}
    with mode:
        fake, fake_grads = run_forward_backward(function, operator.pick(fake_x), fake_x["dout"])
    for name, a, b in [
        ("out", real, fake),
        *((n, real_grads[n], fake_grads[n]) for n in real_grads),
    ]:
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), name


@every_operator
def test_meta_tensors(operator):
    problem = problem_of(Backend("cpu", torch.float16), False)
    x = make_inputs(problem, Backend("meta", torch.float16))
    out, grads = run_forward_backward(
        operator_function(operator, problem, "meta"), operator.pick(x), x["dout"]
    )
    assert out.shape == x["dout"].shape and out.dtype == torch.float16 and out.is_meta
    assert all(grads[name].shape == x[name].shape for name in operator.inputs)


# Autocast, grad modes, hooks


@backends
def test_autocast(backend):
    """A float32 layer under autocast runs in the 16-bit dtype and keeps float32 gradients."""
    module = layer(Backend(backend.device, torch.float32))
    x, _ = layer_input(Backend(backend.device, torch.float32), [75], False)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
    if backend.device == "cpu":
        torch.testing.assert_close(out.float(), module(x), rtol=5e-2, atol=5e-2)


def test_no_grad_and_inference_mode():
    backend = Backend("cpu", torch.float32)
    problem = problem_of(backend, False)
    x = make_inputs(problem, backend)
    x["q"].requires_grad_()
    expected = SPARSE.run(problem, x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = SPARSE.run(problem, x)
        assert not out.requires_grad
        assert_same_bits(out.clone(), expected.detach(), "out")


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    backend = Backend("cpu", torch.float32)
    problem = problem_of(backend, False)
    x = make_inputs(problem, backend)

    def plain(tensors):
        return SPARSE.run(problem, tensors)

    def checkpointed(tensors):
        names = list(tensors)
        return checkpoint(
            lambda *t: plain(dict(zip(names, t, strict=True))),
            *tensors.values(),
            use_reentrant=False,
        )

    _, grads = run_forward_backward(plain, SPARSE.pick(x), x["dout"])
    _, again = run_forward_backward(checkpointed, SPARSE.pick(x), x["dout"])
    for name in SPARSE.inputs:
        assert_same_bits(again[name], grads[name], f"d{name}")


def test_gradients_accumulate():
    backend = Backend("cpu", torch.float64)
    problem = problem_of(backend, False)
    x = make_inputs(problem, backend)
    q = x["q"].requires_grad_()
    for _ in range(2):
        WINDOW.run(problem, x).sum().backward()
    (once,) = torch.autograd.grad(WINDOW.run(problem, x).sum(), q)
    torch.testing.assert_close(q.grad, 2 * once)


def test_a_threaded_call_gives_the_bits_of_one_thread():
    backend = Backend("cpu", torch.float32)
    problem = Problem("", seqlens=((0, 0), (150, 300), (1, 70), (65, 65)), packed=True)
    x = make_inputs(problem, backend)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                run_forward_backward(lambda y: SPARSE.run(problem, y), SPARSE.pick(x), x["dout"])
            )
    finally:
        torch.set_num_threads(threads)
    for out, grads in results[1:]:
        assert_same_bits(out, results[0][0], "out")
        for name in SPARSE.inputs:
            assert_same_bits(grads[name], results[0][1][name], f"d{name}")


def test_the_compressor_compiles():
    phi = KVCompressor(8, config=CONFIGS["cpu"])
    k, v = torch.randn(2, 19, 2, 8), torch.randn(2, 19, 2, 8)
    compiled = torch.compile(phi, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(k, v), phi(k, v), strict=True):
        assert_same_bits(a, b, "tokens")
