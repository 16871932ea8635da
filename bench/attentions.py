"""What bench/run.py times: NSA and its baselines as functions (q, k, v, gates) -> out."""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_ext

Attention = Callable[..., torch.Tensor]
FLA_WINDOW = importlib.util.find_spec("flash_attn") is not None
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}


@dataclass
class Inputs:
    """Of one attention call. `tensors`: q, k, v, gates, then what the compressor and the window
    read where that is not k and v."""

    kind: str
    tensors: list[torch.Tensor]
    compress: Callable
    extra: list[str] = field(default_factory=list)  # keywords of tensors[4:]
    notes: dict = field(default_factory=dict)  # for the result rows

    @property
    def q(self) -> torch.Tensor:
        return self.tensors[0]

    @property
    def kv_heads(self) -> int:
        return self.tensors[1].shape[2]


def nsa(inputs: Inputs, deterministic: bool) -> Attention:
    def run(q, k, v, gates, *extra):
        more = dict(zip(inputs.extra, extra, strict=True))
        return nsa_ext.sparse_attn(
            q, k, v, gates, inputs.compress, deterministic=deterministic, **more
        )

    return run


def selection_of(inputs: Inputs) -> torch.Tensor:
    """block_indices that NSA chooses on these inputs."""
    more = dict(zip(inputs.extra, inputs.tensors[4:], strict=True))
    with torch.no_grad():
        _, blocks = nsa_ext.sparse_attn(
            *inputs.tensors[:4], inputs.compress, return_selection=True, **more
        )
    return blocks


def dense(name: str) -> Attention:
    def run(q, k, v, gates, *extra):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPA[name]) if name in SDPA else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return run


def fla() -> Attention:
    """flash-linear-attention. Its compression blocks are its selection blocks, l = d = l' = 64, and
    its window is that of the package flash-attn: left out where that is missing (FLA_WINDOW)."""
    from fla.ops.nsa import parallel_nsa

    def run(q, k, v, gates, *extra):
        g_cmp, g_slc, g_win = gates.unbind(-1)
        return parallel_nsa(
            q,
            k,
            v,
            g_cmp=g_cmp,
            g_slc=g_slc,
            g_swa=g_win,
            block_counts=16,
            block_size=64,
            window_size=512 if FLA_WINDOW else 0,
        )

    return run


def window(name: str, length: int, size: int) -> Attention:
    """(q, k, v) -> out, the window branch alone: nsa_ext's, or torch's flex attention, compiled."""
    if name == "nsa":
        config = nsa_ext.NSAConfig(window=size)
        return lambda q, k, v: nsa_ext.window_attn(q, k, v, config=config)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def inside(batch, head, query, key):
        return (key <= query) & (query - key < size)

    mask = create_block_mask(inside, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def implementation(name: str, inputs: Inputs, deterministic: bool = False) -> Attention:
    if name.startswith("nsa"):
        return nsa(inputs, deterministic)
    return fla() if name == "fla" else dense(name)


def backend_of(name: str):
    """Context of an implementation "nsa", "nsa-sm80" or "nsa-sm90"."""
    return nsa_ext.cuda_backend(name.partition("-")[2] or "auto")


def installed(name: str) -> bool:
    if name != "fla":
        return True
    try:
        fla()
    except ImportError:
        return False
    return True
