"""The attention operators as functions of a problem and a dict of tensors: kernel and oracle."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from helpers import check_against_reference

import nsa_ext
from nsa_ext import reference


@dataclasses.dataclass(frozen=True)
class Operator:
    name: str
    inputs: tuple  # the differentiable ones, in the order of make_inputs
    kernel: Callable  # (problem, tensors, **keywords) -> out, or (out, block_indices)
    oracle: Callable  # (problem, tensors, block_indices) -> out
    selects: bool  # the kernel returns block_indices

    def __str__(self):
        return self.name

    def pick(self, tensors):
        return {name: tensors[name] for name in self.inputs}

    def run(self, problem, tensors, **keywords):
        """The kernel's out alone."""
        result = self.kernel(problem, tensors, **keywords)
        return result[0] if self.selects else result

    def check(self, problem, tensors, **keywords):
        """out and every gradient by the correctness rule, the oracle attending to the kernel's own
        block_indices. Returns those (None if it has none), out and the gradients."""
        chosen = []

        def kernel(inputs):
            result = self.kernel(problem, inputs, **keywords)
            if not self.selects:
                return result
            chosen.append(result[1])
            return result[0]

        def oracle(inputs):
            return self.oracle(problem, inputs, chosen[0] if chosen else None)

        out, grads = check_against_reference(kernel, oracle, self.pick(tensors), tensors["dout"])
        return chosen[0] if chosen else None, out, grads


def kernel_keywords(problem, device):
    return {**problem.keywords, **problem.cu_seqlens(device), **problem.max_seqlens()}


def oracle_keywords(problem, device):
    return {**problem.keywords, **problem.cu_seqlens(device)}


def raw_keys(problem):
    """The keyword with Sk, which the compressed tokens of a dense call do not tell."""
    return {} if problem.packed else {"seqlen_k": problem.seqlens[0][1]}


@functools.lru_cache(maxsize=64)
def fake_selection(problem, device, seed=0):
    """block_indices as a selection gives them, of a random importance. Cached like cu_seqlens."""
    blocks = max(problem.config.num_select_blocks(sk) for _, sk in problem.seqlens)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(*problem.lead("q"), problem.heads_kv, blocks, generator=generator)
    if blocks <= problem.config.num_selected:
        # Every candidate: no need to walk the sequences.
        t = problem.positions().reshape(*problem.lead("q"), 1, 1)
        j = torch.arange(problem.config.num_selected)
        chosen = torch.where((j < blocks) & (j * problem.config.select_size <= t), j, -1)
        shape = (*problem.lead("q"), problem.heads_kv, problem.config.num_selected)
        return chosen.expand(shape).int().contiguous().to(device)
    return reference.select_blocks(
        importance.to(device),
        config=problem.config,
        **raw_keys(problem),
        **problem.cu_seqlens(device),
    )


def _compressed_kernel(p, x, **keywords):
    return nsa_ext.compressed_attn(
        x["q"], x["k_cmp"], x["v_cmp"], **raw_keys(p), **kernel_keywords(p, x["q"].device),
        **keywords,
    )  # fmt: skip


def _compressed_oracle(p, x, _):
    return reference.compressed_attn(
        x["q"], x["k_cmp"], x["v_cmp"], **raw_keys(p), **oracle_keywords(p, x["q"].device)
    )[0]


def _selected_kernel(p, x, **keywords):
    return nsa_ext.selected_attn(
        x["q"], x["k"], x["v"], fake_selection(p, x["q"].device),
        **kernel_keywords(p, x["q"].device), **keywords,
    )  # fmt: skip


def _selected_oracle(p, x, _):
    blocks = fake_selection(p, x["q"].device)
    return reference.selected_attn(
        x["q"], x["k"], x["v"], blocks, **oracle_keywords(p, x["q"].device)
    )


def _window_kernel(p, x, **keywords):
    return nsa_ext.window_attn(
        x["q"], x["k"], x["v"], **kernel_keywords(p, x["q"].device), **keywords
    )


def _window_oracle(p, x, _):
    return reference.window_attn(x["q"], x["k"], x["v"], **oracle_keywords(p, x["q"].device))


def _sparse_arguments(x):
    own = {name: x[name] for name in ("k_win", "v_win") if name in x}
    return (x["q"], x["k"], x["v"], x["gates"], (x["k_cmp"], x["v_cmp"])), own


def _sparse_kernel(p, x, **keywords):
    arguments, own = _sparse_arguments(x)
    return nsa_ext.sparse_attn(
        *arguments, **own, return_selection=True, **kernel_keywords(p, x["q"].device), **keywords
    )


def _sparse_oracle(p, x, block_indices):
    arguments, own = _sparse_arguments(x)
    return reference.sparse_attn(
        *arguments, **own, block_indices=block_indices, **oracle_keywords(p, x["q"].device)
    )


COMPRESSED = Operator(
    "compressed", ("q", "k_cmp", "v_cmp"), _compressed_kernel, _compressed_oracle, True
)
SELECTED = Operator("selected", ("q", "k", "v"), _selected_kernel, _selected_oracle, False)
WINDOW = Operator("window", ("q", "k", "v"), _window_kernel, _window_oracle, False)
_SHARED = ("q", "k_cmp", "v_cmp", "k", "v", "gates")
SPARSE = Operator("sparse", (*_SHARED, "k_win", "v_win"), _sparse_kernel, _sparse_oracle, True)
SPARSE_SHARED = Operator("sparse-shared", _SHARED, _sparse_kernel, _sparse_oracle, True)
OPERATORS = [COMPRESSED, SELECTED, WINDOW, SPARSE, SPARSE_SHARED]


# Direct calls of the forward operators of torch.ops, which return lse too.


def op_seqlens(problem, device):
    """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k as the operators take them."""
    offsets = problem.cu_seqlens(device)
    longest = [max(lengths) for lengths in zip(*problem.seqlens, strict=True)]
    return offsets.get("cu_seqlens_q"), offsets.get("cu_seqlens_k"), *longest


def assert_lse(lse, expected):
    """-inf in the same places, else to 2e-5 (float64 inputs: 1e-11), of at least 1."""
    assert lse.shape == expected.shape
    assert torch.equal(lse == -torch.inf, expected == -torch.inf)
    tolerance = 1e-11 if lse.dtype == torch.float64 else 2e-5
    seen = lse != -torch.inf
    torch.testing.assert_close(
        lse[seen].double(), expected[seen].double(), rtol=tolerance, atol=tolerance
    )
