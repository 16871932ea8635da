"""window_attn, forward and backward, against the reference."""

import dataclasses

import pytest
import torch
from helpers import poisoned
from operators import WINDOW, assert_lse, op_seqlens, oracle_keywords
from problems import LONG, MANY_ROWS, PROBLEMS, parametrize, setup

from nsa_ext import NSAConfig, reference


@parametrize(PROBLEMS)
def test_matches_reference(problem, backend):
    WINDOW.check(problem, setup(problem, backend))


@parametrize(LONG + MANY_ROWS)
def test_large(problem, device_backend):
    WINDOW.check(problem, setup(problem, device_backend))


@pytest.mark.parametrize("window", [1, 2, 31, 63, 64, 65, 127, 128, 129, 299, 300, 2**31 - 1])
def test_windows(window, device_backend):
    problem = dataclasses.replace(
        PROBLEMS[0], seqlens=((140, 300),), config=NSAConfig(window=window)
    )
    WINDOW.check(problem, setup(problem, device_backend))


@parametrize(PROBLEMS)
def test_lse(problem, backend):
    x = setup(problem, backend)
    with poisoned(backend.device):
        _, lse = torch.ops.nsa_ext.window_attn_fwd(
            x["q"], x["k"], x["v"], *op_seqlens(problem, backend.device), problem.config.window,
            problem.scale, False,
        )  # fmt: skip
    _, expected = reference.window_attn(
        x["q"].double(), x["k"].double(), x["v"].double(), return_lse=True,
        **oracle_keywords(problem, backend.device),
    )  # fmt: skip
    assert lse.dtype == (torch.float64 if backend.dtype == torch.float64 else torch.float32)
    assert_lse(lse, expected)


def test_extreme_scores(backend):
    """Scores of hundreds: the softmax must not overflow, and far keys count for nothing."""
    problem = dataclasses.replace(PROBLEMS[0], seqlens=((130, 200),), softmax_scale=6.0)
    _, out, _ = WINDOW.check(problem, setup(problem, backend))
    assert torch.isfinite(out).all()
