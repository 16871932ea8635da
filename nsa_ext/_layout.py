"""How the kernels want tensors to lie in memory."""

from torch import Tensor


def rows_aligned(x: Tensor) -> bool:
    """Whether x's rows lie as its device's kernels read them: on CUDA 16 bytes at a time."""
    if x.device.type != "cuda":
        return True
    per_read = 16 // x.element_size()
    strides = [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]
    return all(step % per_read == 0 for step in (x.storage_offset(), *strides[:-1]))
