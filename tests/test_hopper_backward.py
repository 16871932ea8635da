"""The Hopper backward: by the correctness rule, and against the portable one on the same outputs.

The forward is the portable one throughout: only the backward's kernels are in question.
"""

import dataclasses

import helpers
import pytest
import torch
from helpers import Backend, Problem, assert_same_bits, poisoned, rms
from operators import OPERATORS, SELECTED, SPARSE, SPARSE_SHARED
from problems import CONFIGS, CROSS_LENGTHS, DIMS, LENGTHS, MANY_ROWS, PACKED, STRIDED, parametrize

import nsa_ext
from nsa_ext import NSAConfig

pytestmark = pytest.mark.gpu

BF16, FP16 = Backend("cuda", torch.bfloat16), Backend("cuda", torch.float16)
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)

GROUPS = [
    Problem(f"group{g}-dims{dk}", seqlens=((150, 411),), heads_q=2 * g, dim_qk=dk, dim_v=dv)
    for g in (1, 2, 4, 6, 8, 12, 16, 32, 64)
    for dk, dv in [(64, 64), (128, 128), (192, 128)]
]
WHOLE = [*LENGTHS, *CROSS_LENGTHS, *DIMS, *PACKED, *STRIDED, *CONFIGS, *GROUPS]
# Tasks of several pieces, lists of many tiles, rings that go round.
LONG = [
    Problem("long", seqlens=((8192, 8192),), heads_q=16, heads_kv=1, dim_qk=128, dim_v=128,
            config=NSAConfig()),
    Problem("long-192", seqlens=((5000, 5000),), batch=2, heads_q=16, heads_kv=1, dim_qk=192,
            dim_v=128, config=NSAConfig()),
    Problem("long-packed", seqlens=((4000, 4000), (0, 70), (1, 900), (3000, 3000)), packed=True,
            heads_q=8, heads_kv=2, config=NSAConfig()),
]  # fmt: skip


def run_with(kernels):
    """run_forward_backward with the portable forward, and `kernels` for the backward."""

    def run(function, inputs, dout):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        with nsa_ext.cuda_backend("sm80"):
            out = function(leaves)
        with nsa_ext.cuda_backend(kernels):
            grads = torch.autograd.grad(
                out, list(leaves.values()), dout.to(out.dtype), allow_unused=True
            )
        return out.detach(), dict(zip(leaves, grads, strict=True))

    return run


@pytest.fixture(autouse=True)
def hopper():
    """Skips where these kernels do not run."""
    Backend("cuda", torch.bfloat16, "sm90").active()


def gradients(operator, problem, x, kernels):
    with poisoned(x["q"].device.type):
        _, grads = run_with(kernels)(
            lambda inputs: operator.run(problem, inputs), operator.pick(x), x["dout"]
        )
    return grads


def assert_agree(grads, expected, floor=1e-6, bf16_dk=5e-3):
    """Both sum the same rounded products in float32: they differ by the order, and by the last bit
    of the results. 2e-3 is half of a bfloat16's last place; `floor` is absolute. For dK the
    portable kernels make dS of a P that is rounded first: that rounding, and the two of dS that
    then fall apart, are 1.7e-3 each in bfloat16 (RMS; 3.9e-3 at most), an eighth in float16."""
    for name, grad in grads.items():
        limit = bf16_dk if name.startswith("k") and grad.dtype == torch.bfloat16 else 2e-3
        assert torch.isfinite(grad).all(), f"d{name} is not finite"
        size = rms(expected[name].double()) if grad.numel() else 0.0
        error = rms(grad.double() - expected[name].double()) if grad.numel() else 0.0
        assert error <= limit * size + floor, f"d{name}: RMS {error / max(size, 1e-30):.1e}"


@every_operator
@parametrize(WHOLE)
def test_matches_reference(problem, operator, monkeypatch):
    monkeypatch.setattr(helpers, "run_forward_backward", run_with("sm90"))
    x = helpers.make_inputs(problem, BF16)
    operator.check(problem, x)


@pytest.mark.parametrize("operator", [SPARSE, SPARSE_SHARED], ids=str)
@parametrize([*GROUPS, *LONG, *MANY_ROWS])
def test_agrees_with_the_portable_kernels(problem, operator):
    for backend in (BF16, FP16):
        x = helpers.make_inputs(problem, backend)
        assert_agree(
            gradients(operator, problem, x, "sm90"), gradients(operator, problem, x, "sm80")
        )


@parametrize([*LONG, *PACKED])
def test_repeated_calls_give_the_same_bits(problem):
    x = helpers.make_inputs(problem, BF16)
    first = gradients(SPARSE, problem, x, "sm90")
    for name, grad in gradients(SPARSE, problem, x, "sm90").items():
        assert_same_bits(grad, first[name], f"d{name}")


@parametrize([Problem("wild", seqlens=((500, 900),), heads_q=16, heads_kv=2), PACKED[0]])
def test_any_indices(problem):
    """Out of range, repeated, ahead of the query, in any order."""
    x = helpers.make_inputs(problem, BF16)
    blocks = torch.randint(
        -3, 20, (*problem.lead("q"), problem.heads_kv, 40), dtype=torch.int32, device="cuda"
    )
    seqlens = {**problem.cu_seqlens("cuda"), **problem.max_seqlens()}

    def run(inputs):
        return nsa_ext.selected_attn(
            inputs["q"], inputs["k"], inputs["v"], blocks, config=problem.config, **seqlens
        )

    inputs = SELECTED.pick(x)
    assert_agree(
        run_with("sm90")(run, inputs, x["dout"])[1], run_with("sm80")(run, inputs, x["dout"])[1]
    )


def test_expanded_inputs_are_refused_or_left_to_the_portable_kernels():
    """The copy engine takes no stride of 0."""
    problem = dataclasses.replace(DIMS[1], heads_q=32, heads_kv=2)
    x = helpers.make_inputs(problem, BF16)
    x["k_cmp"] = x["k_cmp"][..., :1, :].expand_as(x["k_cmp"])
    assert 0 in x["k_cmp"].stride()
    with pytest.raises((RuntimeError, ValueError), match="strides"):
        gradients(SPARSE, problem, x, "sm90")
    expected = gradients(SPARSE, problem, x, "sm80")
    for name, grad in gradients(SPARSE, problem, x, "auto").items():
        assert_same_bits(grad, expected[name], f"d{name}")
