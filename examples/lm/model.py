"""A small pre-norm transformer over bytes whose attention is NSA or dense causal attention."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import nsa_ext

VOCABULARY = 256
ROPE_THETA = 10000.0


def size(default: int, meaning: str) -> int:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class ModelConfig:
    """Kind and sizes of the model. The integers are options of the command line too."""

    attention: str = "nsa"
    layers: int = size(4, "transformer layers")
    dim: int = size(192, "width of the residual stream")
    heads: int = size(4, "query heads")
    kv_heads: int = size(1, "key-value heads")
    head_dim: int = size(64, "width of a head")
    block_size: int = size(32, "NSA: l, bytes that a compressed token covers")
    block_stride: int = size(16, "NSA: d, bytes between compressed tokens")
    select_size: int = size(32, "NSA: l', bytes of a selection block")
    num_selected: int = size(6, "NSA: n, blocks that a byte attends to")
    window: int = size(64, "NSA: w, bytes of the sliding window")

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads={self.heads}, got {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE turns pairs), got {self.head_dim}")

    def nsa(self) -> nsa_ext.NSAConfig:
        return nsa_ext.NSAConfig(
            block_size=self.block_size,
            block_stride=self.block_stride,
            select_size=self.select_size,
            num_selected=self.num_selected,
            window=self.window,
        )


class DenseAttention(nn.Module):
    """Causal attention over all keys, with the heads and the RoPE of the sparse layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.dim, width, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, S, D)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        out = F.scaled_dot_product_attention(
            rotate(q), rotate(k), v, is_causal=True, enable_gqa=True
        )
        return self.out(out.transpose(1, 2).flatten(2))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position encoding of (B, H, S, D), halves paired."""
    half = x.shape[-1] // 2
    frequency = ROPE_THETA ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        if config.attention == "nsa":
            self.attention = nsa_ext.NSAAttention(
                config.dim,
                config.heads,
                config.kv_heads,
                config.head_dim,
                config=config.nsa(),
                rope_theta=ROPE_THETA,
            )
        else:
            self.attention = DenseAttention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.dim, config.dim, bias=False),
        )

    def forward(self, x: torch.Tensor, cache: nsa_ext.NSACache | None = None) -> torch.Tensor:
        options = {} if cache is None else {"cache": cache}
        x = x + self.attention(self.attention_norm(x), **options)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Bytes (B, S) -> logits of the next byte (B, S, 256). With caches (`new_caches`) the bytes
    go on from those that were given before."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)

    def forward(
        self, tokens: torch.Tensor, caches: list[nsa_ext.NSACache] | None = None
    ) -> torch.Tensor:
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, None if caches is None else caches[i])
        return self.head(self.norm(x))

    def new_caches(self, batch_size: int, max_seqlen: int, **options) -> list[nsa_ext.NSACache]:
        """A cache for each layer; the attention must be NSA."""
        return [
            layer.attention.new_cache(batch_size, max_seqlen, **options) for layer in self.layers
        ]

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats of every byte of (B, S + 1) but the first."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def sample(
    model: LanguageModel, prompt: bytes, count: int, context: int, temperature: float, seed: int
) -> bytes:
    """Continues the prompt by `count` bytes, the whole context recomputed for each."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(count):
        logits = model(tokens[:, -context:])[0, -1].float().cpu()
        p = torch.softmax(logits / temperature, dim=-1)
        tokens = torch.cat(
            [tokens, torch.multinomial(p, 1, generator=generator)[None].to(device)], 1
        )
    return bytes(tokens[0, len(prompt) :].tolist())
