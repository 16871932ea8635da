"""The Hopper backward on shapes drawn at random, against the portable one, and again and again."""

import random

import pytest
import torch
from helpers import Backend, Problem, assert_same_bits
from operators import SPARSE, SPARSE_SHARED
from test_hopper_backward import assert_agree

import nsa_ext
from nsa_ext import NSAConfig

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def hopper():
    """Skips where these kernels do not run."""
    Backend("cuda", torch.bfloat16, "sm90").active()


def draw_problem(draw: random.Random) -> Problem:
    stride, select = draw.choice([16, 32]), draw.choice([32, 64, 64, 128])
    local, init = draw.randint(0, 2), draw.randint(0, 1)
    config = NSAConfig(
        block_size=min(stride * draw.choice([1, 2]), select),
        block_stride=stride,
        select_size=select,
        num_selected=draw.choice([max(1, local + init), 4, 16, 24]),
        num_init=init,
        num_local=local,
        window=draw.choice([1, 64, 100, 512]),
    )
    dim_qk, dim_v = draw.choice([(64, 64), (128, 128), (128, 128), (192, 128)])
    heads_kv, group = draw.randint(1, 3), draw.choice([1, 2, 4, 6, 8, 12, 16, 16, 16, 32, 64])
    packed = draw.random() < 0.4

    def lengths():
        longest = draw.choice([20, 200, 1200 if group <= 16 else 300])
        seqlen_k = draw.randint(1, longest)
        return draw.choice([seqlen_k, seqlen_k, draw.randint(1, longest)]), seqlen_k

    return Problem(
        "random",
        seqlens=tuple(lengths() for _ in range(draw.randint(1, 4) if packed else 1)),
        packed=packed,
        batch=1 if packed else draw.randint(1, 2),
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        dim_qk=dim_qk,
        dim_v=dim_v,
        config=config,
    )


def draw_inputs(problem, operator, dtype):
    def normal(lead, *dims):
        return torch.randn(*problem.lead(lead), *dims, device=DEVICE, dtype=dtype)

    p = problem
    inputs = {"q": normal("q", p.heads_q, p.dim_qk), "gates": normal("q", p.heads_q, 3)}
    for suffix, lead in ("_cmp", "cmp"), ("", "k"), ("_win", "k"):
        inputs["k" + suffix] = normal(lead, p.heads_kv, p.dim_qk)
        inputs["v" + suffix] = normal(lead, p.heads_kv, p.dim_v)
    leaves = {name: x.requires_grad_() for name, x in operator.pick(inputs).items()}
    return leaves, normal("q", p.heads_q, p.dim_v)


def forward(problem, operator, leaves):
    with nsa_ext.cuda_backend("sm80"):
        return operator.run(problem, leaves)


def backward(out, leaves, dout, kernels):
    with nsa_ext.cuda_backend(kernels):
        return torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True)


@pytest.mark.parametrize("seed", range(10))
def test_random_shapes_agree_with_the_portable_kernels(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(100):
        problem, dtype = draw_problem(draw), draw.choice(DTYPES)
        operator = draw.choice([SPARSE, SPARSE_SHARED])
        leaves, dout = draw_inputs(problem, operator, dtype)
        out = forward(problem, operator, leaves)
        grads = backward(out, leaves, dout, "sm90")
        expected = backward(out, leaves, dout, "sm80")
        # Where rows see one key, gradients of q and k are rounding alone: 1e-4 of what they are
        # made of. Where dK comes from few scores, each rounding may be near its most.
        assert_agree(
            dict(zip(leaves, grads, strict=True)),
            dict(zip(leaves, expected, strict=True)),
            floor=1e-4,
            bf16_dk=1e-2,
        )


@pytest.mark.parametrize("seed", range(2))
def test_a_hundred_calls_give_the_same_bits(seed):
    torch.manual_seed(seed)
    problem = Problem(
        "again", seqlens=((2100, 2100),), heads_q=16, heads_kv=1, dim_qk=128, dim_v=128,
        config=NSAConfig(),
    )  # fmt: skip
    operator = [SPARSE, SPARSE_SHARED][seed]
    leaves, dout = draw_inputs(problem, operator, torch.bfloat16)
    out = forward(problem, operator, leaves)
    first = backward(out, leaves, dout, "sm90")
    for _ in range(99):
        for name, x, right in zip(leaves, backward(out, leaves, dout, "sm90"), first, strict=True):
            assert_same_bits(x, right, f"d{name}")
