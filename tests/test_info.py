"""build_info, supports and cuda_backend."""

import pytest
import torch
from helpers import CPU_BACKENDS, has_kernel

import nsa_ext
from nsa_ext import NSAConfig

SIZES = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}


def test_build_info():
    info = nsa_ext.build_info()
    assert set(info) == {"version", "cpu_isa", "cuda_archs", "cuda_backend"}
    assert info["version"].count(".") >= 2
    assert info["cpu_isa"] in ("avx512", "avx2", "baseline")
    assert info["cuda_backend"] in ("auto", "sm80", "sm90")
    assert (info["cuda_archs"] is not None) == has_kernel("window_attn_fwd", "CUDA")


@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=str)
def test_the_cpu_supports_every_shape(backend):
    for head_dim, head_dim_v in [(64, None), (1, 1), (192, 128), (7, 300)]:
        sizes = {**SIZES, "head_dim": head_dim, "head_dim_v": head_dim_v}
        assert nsa_ext.supports(device="cpu", dtype=backend.dtype, **sizes) == []


def test_supports_gives_all_reasons_at_once():
    reasons = nsa_ext.supports(
        device="cpu", dtype=torch.float32, num_heads=3, num_kv_heads=2, head_dim=0
    )
    assert len(reasons) == 2
    assert all(reason and "\n" not in reason for reason in reasons)
    assert any("head" in reason for reason in reasons)


def test_supports_names_an_unknown_dtype():
    assert any("int32" in r for r in nsa_ext.supports(device="cpu", dtype=torch.int32, **SIZES))


def test_supports_without_a_device():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert len(nsa_ext.supports(**SIZES)) == 1


def test_a_supported_call_runs():
    for config in (NSAConfig(), NSAConfig(3, 1, 5, 2, 0, 1, 7)):
        assert nsa_ext.supports(device="cpu", dtype=torch.float32, config=config, **SIZES) == []
        q, k = torch.randn(1, 9, 8, 64), torch.randn(1, 9, 2, 64)
        assert nsa_ext.window_attn(q, k, k, config=config).shape == q.shape


def test_cuda_backend_is_restored():
    before = nsa_ext.build_info()["cuda_backend"]
    with nsa_ext.cuda_backend("sm80"):
        assert nsa_ext.build_info()["cuda_backend"] == "sm80"
        with nsa_ext.cuda_backend("sm90"):
            assert nsa_ext.build_info()["cuda_backend"] == "sm90"
        assert nsa_ext.build_info()["cuda_backend"] == "sm80"
        with pytest.raises(ZeroDivisionError), nsa_ext.cuda_backend("auto"):
            raise ZeroDivisionError
        assert nsa_ext.build_info()["cuda_backend"] == "sm80"
    assert nsa_ext.build_info()["cuda_backend"] == before


def test_unknown_cuda_backend():
    with pytest.raises((ValueError, RuntimeError), match="sm70"), nsa_ext.cuda_backend("sm70"):
        pass
