"""Native Sparse Attention (arXiv 2502.11089) as a compiled PyTorch extension."""

from . import reference
from .attention import NSAAttention
from .cache import NSACache
from .compressor import KVCompressor
from .config import NSAConfig
from .decode import sparse_attn_with_kvcache
from .functional import (
    compress_kv,
    compressed_attn,
    select_blocks,
    selected_attn,
    sparse_attn,
    window_attn,
)
from .info import build_info, cuda_backend, supports

__all__ = [
    "KVCompressor",
    "NSAAttention",
    "NSACache",
    "NSAConfig",
    "build_info",
    "compress_kv",
    "compressed_attn",
    "cuda_backend",
    "reference",
    "select_blocks",
    "selected_attn",
    "sparse_attn",
    "sparse_attn_with_kvcache",
    "supports",
    "window_attn",
]
