"""What was compiled, what it supports, and which CUDA backend runs."""

import contextlib
import json
from collections.abc import Iterator

import torch

from . import _ops  # noqa: F401  (loads the library)
from .config import NSAConfig


def build_info() -> dict[str, str | None]:
    """What this build of nsa_ext contains.

    Returns:
        ``version``; ``cpu_isa``, the instruction set that the CPU kernels run on here ("avx512",
        "avx2" or "baseline"); ``cuda_archs``, the targets that the CUDA kernels were compiled for,
        None for a build without CUDA; ``cuda_backend``, what :func:`cuda_backend` set ("auto",
        "sm80" or "sm90").
    """
    return json.loads(torch.ops.nsa_ext.build_info())


def supports(
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int | None = None,
    config: NSAConfig | None = None,
) -> list[str]:
    """Why an attention call of these sizes would be refused: all reasons, none where it would run.

    Args:
        device: "cpu" or a CUDA device; "cuda" is the current one.
        dtype: dtype of q, k and v.
        num_heads, num_kv_heads: Hq and Hkv.
        head_dim, head_dim_v: Dk, and Dv (default: Dk).
        config: block lengths, default ``NSAConfig()``.
    """
    device = torch.device(device)
    capability = 0
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return ["this machine has no CUDA device, or this torch was built without CUDA"]
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    reasons = torch.ops.nsa_ext.supports(
        device.type,
        str(dtype).removeprefix("torch."),
        num_heads,
        num_kv_heads,
        head_dim,
        head_dim if head_dim_v is None else head_dim_v,
        (config or NSAConfig()).as_list(),
        capability,
    )
    return reasons.splitlines()


@contextlib.contextmanager
def cuda_backend(name: str) -> Iterator[None]:
    """Forces the CUDA kernels of calls inside the ``with`` block, for the whole process.

    Args:
        name: "sm80" (portable, any GPU from compute capability 8.0 on), "sm90" (Hopper, in builds
            for 9.0a) or "auto": on Hopper each kernel of a call is the one that was measured to be
            faster. A call that the forced backend does not support raises, with one exception:
            "sm90" ranks blocks of l' = 4 d, l <= 2 d, up to 32 indices and groups of 4 and more
            (the paper's lengths among them); other rankings are the portable kernels'. The
            environment variable ``NSA_EXT_CUDA_BACKEND`` sets the default.
    """
    previous = torch.ops.nsa_ext.set_cuda_backend(name)
    try:
        yield
    finally:
        torch.ops.nsa_ext.set_cuda_backend(previous)
