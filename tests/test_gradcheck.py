"""float64 gradcheck of every differentiable input of every function, on tiny sizes."""

import dataclasses

import pytest
import torch
from helpers import Backend, Problem, make_inputs
from operators import OPERATORS, kernel_keywords, raw_keys
from test_compress import KINDS, Phi

import nsa_ext
from nsa_ext import KVCompressor, NSAConfig, reference

FLOAT64 = Backend("cpu", torch.float64)

# Every candidate fits in n: no perturbation can flip a selection.
COVERING = NSAConfig(4, 2, 4, num_selected=8, num_init=1, num_local=1, window=3)
# Selections that leave blocks out, with clear gaps (checked below).
CHOOSING = NSAConfig(4, 2, 4, num_selected=2, num_init=0, num_local=1, window=5)


def tiny(name, seqlens, config, **changes):
    packed = len(seqlens) > 1
    return Problem(
        name, seqlens=seqlens, packed=packed, dim_qk=3, dim_v=2, config=config, **changes
    )


PROBLEMS = [
    tiny("covering", ((9, 9),), COVERING),
    tiny("covering-shared-head", ((6, 11),), COVERING, heads_q=3, heads_kv=1),
    tiny("covering-scale", ((6, 9),), COVERING, softmax_scale=1.3, batch=2),
    tiny("covering-packed", ((5, 5), (0, 2), (2, 9), (3, 2)), COVERING),
    tiny("choosing", ((4, 16),), CHOOSING),
    tiny("choosing-packed", ((2, 12), (7, 7), (0, 0), (1, 16)), CHOOSING),
    tiny("sq-gt-sk", ((7, 5),), COVERING),
    tiny("strided", ((5, 9),), COVERING, strided=True),
]


def assert_clear_selection(problem, x):
    """Blocks differ in importance by far more than gradcheck's step."""
    importance = reference.importance(
        x["q"], x["k_cmp"], **raw_keys(problem), **problem.keywords, **problem.cu_seqlens("cpu")
    )
    ranked = importance.sort(dim=-1, descending=True).values
    gaps = (ranked[..., :-1] - ranked[..., 1:])[ranked[..., :-1] > 0]
    assert gaps.min() > 1e-4


def differentiable(x):
    return {name: tensor.detach().requires_grad_() for name, tensor in x.items()}


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_attention(problem, operator):
    x = make_inputs(problem, FLOAT64, seed=1)
    if problem.config is CHOOSING and operator.selects:
        assert_clear_selection(problem, x)
    leaves = differentiable(operator.pick(x))

    def function(*tensors):
        return operator.run(problem, dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
@pytest.mark.parametrize("options", [{}, {"pos": False, "bias": False}], ids=["full", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_compress(kind, options, per_head, packed):
    phi = Phi(
        kind, (9, 3, 0, 6) if packed else (9,), packed=packed, per_head=per_head, dim=3, dim_out=2,
        hidden=3, config=COVERING, **options,
    )  # fmt: skip
    inputs, _ = phi.inputs(FLOAT64)
    leaves = differentiable(inputs)

    def function(*tensors):
        return phi.kernel(dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("own", [False, True], ids=["shared-kv", "own-kv"])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_attn_with_compressor(kind, own, packed):
    """Raw K and V of every branch, gates and the weights of both phis, in one call."""
    base = PROBLEMS[3] if packed else PROBLEMS[0]
    problem = dataclasses.replace(base, seqlens=base.seqlens if packed else ((5, 7),))
    x = make_inputs(problem, FLOAT64)
    raw = {"k_raw": torch.randn_like(x["k"]), "v_raw": torch.randn_like(x["v"])}
    names = ["q", "k", "v", "gates", *(("k_win", "v_win", *raw) if own else ())]
    leaves = differentiable({name: {**x, **raw}[name] for name in names})
    compressor = KVCompressor(
        3,
        2,
        kind=kind,
        config=problem.config,
        num_kv_heads=2,
        dtype=torch.float64,
        hidden=2 if kind == "mlp" else None,
    )
    weights = dict(compressor.named_parameters())
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(torch.randn_like(weight) * 0.3)
    keywords = kernel_keywords(problem, "cpu")

    def function(*tensors):
        inputs = dict(zip(leaves, tensors, strict=False))
        phi = dict(zip(weights, tensors[len(leaves) :], strict=True))
        windows = {"k_win": inputs["k_win"], "v_win": inputs["v_win"]} if own else {}
        raws = {"k_cmp": inputs["k_raw"], "v_cmp": inputs["v_raw"]} if own else {}

        def compress(k, v, **keywords):
            return torch.func.functional_call(compressor, phi, (k, v), keywords)

        return nsa_ext.sparse_attn(
            inputs["q"], inputs["k"], inputs["v"], inputs["gates"], compress, **windows, **raws,
            **keywords,
        )  # fmt: skip

    arguments = (*leaves.values(), *weights.values())
    assert torch.autograd.gradcheck(function, arguments, atol=1e-6, rtol=1e-4)
