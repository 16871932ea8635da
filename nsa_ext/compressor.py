"""phi, the learned compression of blocks of keys and values (eq. 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _ops  # noqa: F401  (registers the operators)
from ._checks import (
    check_at_least,
    check_compress_input,
    check_config,
    check_cu_seqlens,
    check_parameter_dtype,
)
from .config import DEFAULT_CONFIG, NSAConfig

KINDS = ("mlp", "linear", "weighted", "mean")

# Scale of the random part of phi's initial weights, relative to a standard initialisation.
_INIT_NOISE = 0.1
_INIT_POS_STD = 0.02


class Phi(nn.Module):
    """phi of keys or of values: (B, S, Hkv, D) -> (B, Tc, Hkv, D).

    Its parameters, None where the kind has none (Hw is 1, or Hkv with one phi per head):

    - ``weight`` (Hw, l): factors of ``weighted``.
    - ``pos`` (Hw, l, D): position encoding within a block, of all kinds but ``mean``.
    - ``w1`` (Hw, hidden, l * D), ``b1`` (Hw, hidden): of ``mlp``, and ``linear`` (hidden = D).
    - ``w2`` (Hw, D, hidden), ``b2`` (Hw, D): of ``mlp``.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: str,
        config: NSAConfig,
        num_heads: int,
        hidden: int,
        pos: bool,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.config = config
        self.dense = dense = kind in ("mlp", "linear")
        shapes = {
            "weight": (config.block_size,) if kind == "weighted" else None,
            "pos": (config.block_size, dim) if pos and kind != "mean" else None,
            "w1": (hidden, config.block_size * dim) if dense else None,
            "b1": (hidden,) if dense and bias else None,
            "w2": (dim, hidden) if kind == "mlp" else None,
            "b2": (dim,) if kind == "mlp" and bias else None,
        }
        for name, shape in shapes.items():
            parameter = None
            if shape is not None:
                parameter = nn.Parameter(torch.empty(num_heads, *shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def weights(self) -> dict[str, Tensor | None]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in ("weight", "pos", "w1", "b1", "w2", "b2")}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts at mean pooling, plus noise where there is a matrix to learn, so that the first
        selections already follow the keys. ``mlp`` starts near it: gelu(z) is about z/2 for the
        small z of a mean, and gelu(z) - gelu(-z) is z, which a hidden width of 2 D starts from."""
        block_size = self.config.block_size
        if self.weight is not None:
            self.weight.fill_(1 / block_size)
        if self.pos is not None:
            self.pos.normal_(std=_INIT_POS_STD)
        for bias in (self.b1, self.b2):
            if bias is not None:
                bias.zero_()
        if self.w1 is None:
            return
        hidden, dim = self.w1.shape[1], self.w1.shape[2] // block_size
        unit = torch.arange(hidden, device=self.w1.device)
        sign = 1 - 2 * (unit // dim % 2)
        feature = F.one_hot(unit % dim, dim) * sign[:, None]  # (hidden, dim)
        pooling = feature.repeat(1, block_size) / block_size
        self.w1.normal_(std=_INIT_NOISE * self.w1.shape[2] ** -0.5).add_(pooling.to(self.w1.dtype))
        if self.w2 is not None:
            inverse = 2 * feature.T / feature.abs().sum(dim=0).clamp(min=1)[:, None]
            self.w2.normal_(std=_INIT_NOISE * hidden**-0.5).add_(inverse.to(self.w2.dtype))

    def cast_weights(self, dtype: torch.dtype) -> list[Tensor | None]:
        """weight and pos, or where phi is dense pos, w1, b1, w2, b2: as the operators take them."""
        names = ("pos", "w1", "b1", "w2", "b2") if self.dense else ("weight", "pos")
        weights = [getattr(self, name) for name in names]
        return [w if w is None else w.to(dtype) for w in weights]

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> Tensor:
        ops = torch.ops.nsa_ext
        compress = ops.compress_mlp_fwd if self.dense else ops.compress_pool_fwd
        blocks = (cu_seqlens, max_seqlen, self.config.block_size, self.config.block_stride)
        return compress(x, *self.cast_weights(x.dtype), *blocks)

    def extra_repr(self) -> str:
        shapes = (f"{n}={tuple(p.shape)}" for n, p in self.weights().items() if p is not None)
        return ", ".join((f"kind={self.kind}", *shapes))


class KVCompressor(nn.Module):
    """Compresses blocks of l keys and values, d apart, to one token each (eq. 7).

    ``k_cmp[c] = phi_k(k[c*d : c*d + l))`` and ``v_cmp[c] = phi_v(v[c*d : c*d + l))``, where phi of
    a block x is

    - ``mlp``, the paper's: ``w2 gelu(w1 vec(x + pos) + b1) + b2``
    - ``linear``: ``w1 vec(x + pos) + b1``
    - ``weighted``: ``sum_r weight[r] (x[r] + pos[r])``
    - ``mean``: ``sum_r x[r] / l``, without parameters

    It starts at or near mean pooling. The weights are cast to the dtype of the input, so that they
    may be kept in float32 beside 16-bit activations.

    Args:
        head_dim: Dk.
        head_dim_v: Dv; default: head_dim.
        kind: "mlp", "linear", "weighted" or "mean".
        config: block_size l and block_stride d are used.
        num_kv_heads: None: one phi shared by the heads; Hkv: one phi for each head.
        hidden: hidden width of ``mlp``; default: the width of the output.
        pos: learn a position encoding within the block (all kinds but ``mean``).
        bias: learn biases (``mlp`` and ``linear``).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        kind: str = "mlp",
        config: NSAConfig = DEFAULT_CONFIG,
        num_kv_heads: int | None = None,
        hidden: int | None = None,
        pos: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_config(config)
        check_parameter_dtype(dtype)
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        check_at_least("head_dim", head_dim, 1)
        check_at_least("head_dim_v", head_dim_v, 1)
        if num_kv_heads is not None:
            check_at_least("num_kv_heads", num_kv_heads, 1)
        if hidden is not None:
            if kind != "mlp":
                raise ValueError(f"hidden: expected None for kind {kind!r}, got {hidden}")
            check_at_least("hidden", hidden, 1)
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.kind = kind
        self.config = config
        self.num_kv_heads = num_kv_heads

        def phi(dim: int) -> Phi:
            return Phi(
                dim,
                kind=kind,
                config=config,
                num_heads=1 if num_kv_heads is None else num_kv_heads,
                hidden=dim if hidden is None else hidden,
                pos=pos,
                bias=bias,
                device=device,
                dtype=dtype,
            )

        self.phi_k = phi(head_dim)
        self.phi_v = phi(head_dim_v)

    def reset_parameters(self) -> None:
        self.phi_k.reset_parameters()
        self.phi_v.reset_parameters()

    def forward(
        self,
        k: Tensor,
        v: Tensor,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            k: (B, Sk, Hkv, Dk), packed (total_k, Hkv, Dk).
            v: (B, Sk, Hkv, Dv), packed (total_k, Hkv, Dv).
            cu_seqlens_k: int32 (B + 1,), row offsets of the packed sequences.
            max_seqlen_k: their greatest length; required where cu_seqlens_k is on a GPU.

        Returns:
            k_cmp (B, Tc, Hkv, Dk) and v_cmp (B, Tc, Hkv, Dv), Tc = max(0, (Sk - l) // d + 1);
            packed (total_k // d, Hkv, ...), where the tokens of a sequence that starts at row r
            start at row r // d, and rows without a token are zero.
        """
        packed = cu_seqlens_k is not None
        self._check_input(k, v, packed)
        if packed:
            max_seqlen_k = check_cu_seqlens("_k", cu_seqlens_k, max_seqlen_k, k, "k", k.shape[0])
        else:
            max_seqlen_k = k.shape[1]
        return (
            self.phi_k(k, cu_seqlens_k, max_seqlen_k),
            self.phi_v(v, cu_seqlens_k, max_seqlen_k),
        )

    def store_step(self, k: Tensor, v: Tensor, arguments: tuple) -> bool:
        """Stores a step of decode, raw tokens k and v of the compressed branch among them, in one
        operator: ``cache_store_mlp`` or ``cache_store_pool``, whose first arguments these are.
        False where there is none and :meth:`forward` has to compress."""
        plain = type(self).forward is KVCompressor.forward and not self._forward_hooks
        if not plain or k.device.type != "cuda" or k.shape[1] > self.config.block_stride:
            return False
        phis = (self.phi_k, self.phi_v)
        if self.phi_k.dense and any(phi.w1.shape[1] % 8 for phi in phis):
            return False
        self._check_input(k, v, packed=False)
        weights = [weight for phi in phis for weight in phi.cast_weights(k.dtype)]
        ops = torch.ops.nsa_ext
        store = ops.cache_store_mlp if self.phi_k.dense else ops.cache_store_pool
        store(*arguments, *weights)
        return True

    def _check_input(self, k: Tensor, v: Tensor, packed: bool) -> None:
        check_compress_input(k, v, packed, self.head_dim, self.head_dim_v)
        if self.num_kv_heads not in (None, k.shape[-2]):
            raise ValueError(
                f"k: expected num_kv_heads={self.num_kv_heads} heads as the compressor has, "
                f"got {k.shape[-2]}"
            )

    def extra_repr(self) -> str:
        heads = "shared" if self.num_kv_heads is None else f"num_kv_heads={self.num_kv_heads}"
        return (
            f"head_dim={self.head_dim}, head_dim_v={self.head_dim_v}, {heads}, "
            f"block_size={self.config.block_size}, block_stride={self.config.block_stride}"
        )
