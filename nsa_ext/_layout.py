"""How the kernels want tensors to lie in memory."""

from torch import Tensor


def rows_aligned(x: Tensor) -> bool:
    """Whether x's rows lie as its device's kernels read them: on CUDA 16 bytes at a time."""
    if not x.is_cuda:
        return True
    per_read = 16 // x.element_size()
    aligned = x.storage_offset() % per_read == 0
    for size, step in zip(x.shape, x.stride()[:-1], strict=False):
        aligned = aligned and (size <= 1 or step % per_read == 0)
    return aligned
