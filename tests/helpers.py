"""What the tests share: backends, problems, poisoning, the correctness rule, selections."""

import contextlib
import dataclasses
import functools
import math

import pytest
import torch

import nsa_ext
from nsa_ext import NSAConfig, reference

# ---------------------------------------------------------------------------------------------
# Backends


@dataclasses.dataclass(frozen=True)
class Backend:
    device: str
    dtype: torch.dtype
    kernels: str = "auto"  # on CUDA: "auto", "sm80" (the portable ones) or "sm90"

    def __str__(self):
        name = f"{self.device}-{str(self.dtype).removeprefix('torch.')}"
        return name if self.kernels == "auto" else f"{name}-{self.kernels}"

    def active(self):
        """Context in which calls run on this backend; skips the test where there is none."""
        if self.device == "cuda":
            if not torch.cuda.is_available():
                pytest.skip("no CUDA device")
            if not has_kernel("sparse_attn_fwd", "CUDA"):
                pytest.skip("nsa_ext was built without CUDA")
            if self.kernels == "sm90" and not has_hopper():
                pytest.skip("no Hopper GPU, or nsa_ext was built without its kernels")
            return nsa_ext.cuda_backend(self.kernels)
        return contextlib.nullcontext()


CPU_BACKENDS = [
    Backend("cpu", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
]
CUDA_BACKENDS = [
    Backend("cuda", torch.bfloat16),
    Backend("cuda", torch.float16),
    Backend("cuda", torch.bfloat16, "sm80"),
    Backend("cuda", torch.bfloat16, "sm90"),
]


def backend_params(backends):
    return [
        pytest.param(b, id=str(b), marks=[pytest.mark.gpu] if b.device == "cuda" else [])
        for b in backends
    ]


def has_hopper():
    """Whether the Hopper kernels were compiled, and the current device is one that runs them."""
    archs = nsa_ext.build_info()["cuda_archs"] or ""
    return "9.0" in archs and torch.cuda.get_device_capability() == (9, 0)


def has_kernel(op, dispatch_key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa_ext::{op}", dispatch_key)


# ---------------------------------------------------------------------------------------------
# Problems


# n=4 instead of 16, so that a few hundred keys are enough for a selection to leave blocks out.
SMALL = NSAConfig(num_selected=4, window=40)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shape of one attention call.

    `seqlens` are (Sq, Sk) pairs: one pair, repeated `batch` times, or with `packed` one per
    sequence of a packed batch.
    """

    name: str
    seqlens: tuple = ((97, 97),)
    packed: bool = False
    batch: int = 1
    heads_q: int = 4
    heads_kv: int = 2
    dim_qk: int = 64
    dim_v: int = 64
    config: NSAConfig = SMALL
    softmax_scale: float | None = None
    strided: bool = False
    cpu_only: bool = False
    cuda_only: bool = False

    def __str__(self):
        return self.name

    @property
    def scale(self):
        return self.dim_qk**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def total_q(self):
        return sum(sq for sq, _ in self.seqlens)

    @property
    def total_k(self):
        return sum(sk for _, sk in self.seqlens)

    @property
    def keywords(self):
        """What every attention function takes beside its tensors."""
        return {"config": self.config, "softmax_scale": self.softmax_scale}

    def lead(self, which):
        """Leading dims of q ("q"), raw keys ("k") or compressed keys ("cmp")."""
        if self.packed:
            rows = {"q": self.total_q, "k": self.total_k}
            rows["cmp"] = self.total_k // self.config.block_stride
            return (rows[which],)
        seqlen_q, seqlen_k = self.seqlens[0]
        rows = {"q": seqlen_q, "k": seqlen_k, "cmp": self.config.num_compressed(seqlen_k)}
        return (self.batch, rows[which])

    @functools.lru_cache(maxsize=256)  # noqa: B019  (problems live as long as the tests)
    def cu_seqlens(self, device):
        """Row offsets of a packed call, as the reference takes them; nothing for a dense one.
        Cached, so that a repeated call copies nothing from the host."""
        if not self.packed:
            return {}
        return {
            "cu_seqlens_q": cu_seqlens([sq for sq, _ in self.seqlens], device),
            "cu_seqlens_k": cu_seqlens([sk for _, sk in self.seqlens], device),
        }

    def max_seqlens(self):
        if not self.packed:
            return {}
        return {
            "max_seqlen_q": max(sq for sq, _ in self.seqlens),
            "max_seqlen_k": max(sk for _, sk in self.seqlens),
        }

    def positions(self):
        """t of every row of q: (rows,)."""
        parts = [torch.arange(sq) + (sk - sq) for sq, sk in self.seqlens]
        return torch.cat([torch.arange(0), *parts * (1 if self.packed else self.batch)])

    def unpacked(self):
        """One dense problem per sequence."""
        return [
            dataclasses.replace(self, packed=False, batch=1, seqlens=(pair,))
            for pair in self.seqlens
        ]


def cu_seqlens(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def randn(shape, backend, *, strided=False, seed=0, scale=1.0):
    """Normal values, the same for every device; `strided` gives every stride but the last a gap."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator, dtype=torch.float32) * scale).to(
        backend.device, backend.dtype
    )
    if not strided:
        return values
    # (..., S, H, D) as a slice of (H + 1, ..., S, D + 8) memory: heads outermost, all dims gapped.
    memory = torch.full(
        (shape[-2] + 1, *shape[:-2], shape[-1] + 8),
        math.nan,
        dtype=backend.dtype,
        device=backend.device,
    )
    view = memory.movedim(0, -2)[..., 1:, 8:]
    view.copy_(values)
    return view


def make_inputs(problem, backend, seed=0):
    """All the tensors of a sparse_attn call, by name."""
    p, hkv = problem, problem.heads_kv
    shapes = {
        "q": (*p.lead("q"), p.heads_q, p.dim_qk),
        "k_cmp": (*p.lead("cmp"), hkv, p.dim_qk),
        "v_cmp": (*p.lead("cmp"), hkv, p.dim_v),
        "k": (*p.lead("k"), hkv, p.dim_qk),
        "v": (*p.lead("k"), hkv, p.dim_v),
        "k_win": (*p.lead("k"), hkv, p.dim_qk),
        "v_win": (*p.lead("k"), hkv, p.dim_v),
        "gates": (*p.lead("q"), p.heads_q, 3),
        "dout": (*p.lead("q"), p.heads_q, p.dim_v),
    }
    return {
        name: randn(shape, backend, strided=p.strided and name != "gates", seed=seed * 100 + n)
        for n, (name, shape) in enumerate(shapes.items())
    }


# ---------------------------------------------------------------------------------------------
# Poisoning


@contextlib.contextmanager
def poisoned(device):
    """Memory that torch hands out inside is full of NaN, outputs and scratch of the kernels alike,
    so that an element which nobody writes shows up in the results."""
    if device == "cuda":
        # Fills what the caching allocator will hand out, large blocks and small ones. (torch's own
        # filling, below, comes with deterministic algorithms, which would choose other kernels.)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        large = torch.full((2**26,), math.nan, device=device)
        small = [torch.full((2**17,), math.nan, device=device) for _ in range(64)]
        del large, small
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


# ---------------------------------------------------------------------------------------------
# The correctness rule

# eps of the rule has two parts. The rounding of the element itself: else an exact result, rounded
# once, fails wherever the low-precision reference rounds its largest elements luckily. And an
# absolute floor, times max(1, max|ref|): rounding noise of sums whose exact value is 0 (dq of a row
# with a single key), where the low-precision reference may be exact by luck.
EPS = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
RMS_LIMIT = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (0.005, 0.01),
    torch.float16: (0.005, 0.01),
}


def rms(x):
    return x.square().mean().sqrt().item()


def half_ulp(x, dtype):
    """By how much rounding x to `dtype` may change it (elements; normal numbers)."""
    mantissa, exponent = torch.frexp(x)  # 0.5 <= |mantissa| < 1, or 0
    return torch.ldexp((mantissa != 0).to(x.dtype) * (torch.finfo(dtype).eps / 4), exponent)


def assert_close_to_reference(x, ref64, ref_lowprec, *, name, grad=False):
    """max|x - ref64| <= 2 max|ref_lowprec - ref64| + eps, and RMS(x - ref64) / RMS(ref64) small."""
    assert x.shape == ref64.shape, f"{name}: shape {tuple(x.shape)}, expected {tuple(ref64.shape)}"
    assert x.dtype == ref_lowprec.dtype, f"{name}: {x.dtype}, expected {ref_lowprec.dtype}"
    if x.numel() == 0:
        return
    assert torch.isfinite(x).all(), f"{name}: {(~torch.isfinite(x)).sum()} elements not finite"
    limit = RMS_LIMIT[x.dtype][grad]
    error, size = x.double() - ref64, rms(ref64)
    eps = EPS[x.dtype] * max(1.0, ref64.abs().max().item())
    bound = 2 * (ref_lowprec.double() - ref64).abs().max().item() + eps
    worst = (error.abs() - half_ulp(ref64, x.dtype)).max().item()
    assert worst <= bound, f"{name}: max error {worst:.3e} beyond its rounding > {bound:.3e}"
    assert rms(error) <= limit * size + eps, f"{name}: RMS error {rms(error) / size:.3e} > {limit}"


def assert_same_bits(a, b, name=""):
    assert a.shape == b.shape and a.dtype == b.dtype, name
    differ = (a != b) & ~(a.isnan() & b.isnan())
    assert not differ.any(), f"{name}: {differ.sum()} of {differ.numel()} elements differ"


def run_forward_backward(function, inputs, dout):
    """out and the gradient of every input; `function` maps the dict of inputs to out."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype), allow_unused=True)
    return out.detach(), dict(zip(leaves, grads, strict=True))


def check_against_reference(kernel, oracle, inputs, dout):
    """out and all gradients of `kernel` by the correctness rule against `oracle`, the reference.

    Both map a dict of tensors to out; the oracle runs in float64 and in the dtype of the inputs.
    Returns what the kernel gave.
    """
    with poisoned(dout.device.type):
        out, grads = run_forward_backward(kernel, inputs, dout)
    to64 = {name: x.double() for name, x in inputs.items()}
    out64, grads64 = run_forward_backward(oracle, to64, dout.double())
    if out.dtype == torch.float64:
        out_low, grads_low = out64, grads64
    else:
        out_low, grads_low = run_forward_backward(oracle, inputs, dout)
    assert_close_to_reference(out, out64, out_low, name="out")
    for name, grad in grads.items():
        assert grad is not None, f"no gradient for {name}"
        assert_close_to_reference(grad, grads64[name], grads_low[name], name=f"d{name}", grad=True)
    return out, grads


# ---------------------------------------------------------------------------------------------
# Selections


def assert_selection_invariants(block_indices, problem):
    """Ascending, unique, -1 padded on the right, only candidates, min(n, candidates) of them, all
    the forced ones among them. Returns the mask of chosen blocks and that of the candidates."""
    config = problem.config
    index = block_indices.cpu().long()
    assert block_indices.dtype == torch.int32
    assert index.shape == (*problem.lead("q"), problem.heads_kv, config.num_selected)
    index = index.reshape(-1, problem.heads_kv, config.num_selected)
    t = problem.positions()[:, None, None]
    blocks = max(config.num_select_blocks(sk) for _, sk in problem.seqlens)
    j = torch.arange(blocks)
    candidate = (j * config.select_size <= t).expand(-1, problem.heads_kv, -1)
    own = t.div(config.select_size, rounding_mode="floor")
    forced = candidate & ((j < config.num_init) | (j > own - config.num_local))

    count = candidate.sum(-1, keepdim=True).clamp(max=config.num_selected)
    there = torch.arange(config.num_selected) < count
    assert (index[~there] == -1).all(), "not padded by -1, or more blocks than candidates"
    assert (index[there] >= 0).all(), "fewer blocks than min(n, candidates)"
    pairs = there[..., 1:]
    assert (index.diff(dim=-1)[pairs] > 0).all(), "not ascending and unique"
    assert (index * config.select_size <= t)[there].all(), "a block that starts after t"
    chosen = torch.zeros(*index.shape[:2], blocks + 1, dtype=torch.bool)
    chosen = chosen.scatter(-1, index.masked_fill(~there, blocks), True)[..., :blocks]
    assert chosen[forced].all(), "a forced block is missing"
    return chosen, candidate, forced


def assert_selection(block_indices, q, k_cmp, problem):
    """The invariants, and the score-gap rule: no block that was left out has a float64 importance
    more than 1e-3 (relative) above a chosen one that was not forced."""
    chosen, candidate, forced = assert_selection_invariants(block_indices, problem)
    importance = reference.importance(
        q.double(),
        k_cmp.double(),
        seqlen_k=None if problem.packed else problem.seqlens[0][1],
        **problem.keywords,
        **problem.cu_seqlens(q.device),
    )
    if chosen.numel() == 0:
        return
    importance = importance.cpu().reshape(chosen.shape)
    kept = importance.masked_fill(~chosen | forced, math.inf).amin(-1)
    left_out = importance.masked_fill(chosen | ~candidate, -math.inf).amax(-1)
    wrong = kept < left_out * (1 - 1e-3)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} rows select a less important block"
