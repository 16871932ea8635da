import hypothesis
import pytest
import torch
from helpers import CPU_BACKENDS, CUDA_BACKENDS, Backend, backend_params

hypothesis.settings.register_profile(
    "nsa_ext",
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("nsa_ext")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device (skips by itself without one)")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=backend_params(CPU_BACKENDS + CUDA_BACKENDS))
def backend(request):
    """Every (device, dtype) that the package supports."""
    with request.param.active():
        yield request.param


@pytest.fixture(params=backend_params([Backend("cpu", torch.float32), CUDA_BACKENDS[0]]))
def device_backend(request):
    """One dtype per device, where the dtype is not the point of the test."""
    with request.param.active():
        yield request.param
