"""What the tests of the KV cache share: sequences, and what a cache says about them."""

import dataclasses

import torch
from helpers import (
    Problem,
    assert_close_to_reference,
    assert_selection,
    poisoned,
    randn,
)

import nsa_ext
from nsa_ext import KVCompressor, NSACache, NSAConfig, reference, sparse_attn_with_kvcache

# A few hundred keys leave blocks out; on CUDA the smallest that its kernels take.
CONFIG = NSAConfig(8, 4, 8, num_selected=4, window=19)
CUDA_CONFIG = NSAConfig(num_selected=4, window=50)


@dataclasses.dataclass
class Sequences:
    """Everything that B sequences of one length will ever hold, and a phi."""

    backend: object
    seqlen: int
    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    separate: bool = False
    kind: str = "mlp"
    per_head: bool = False
    config: NSAConfig | None = None
    dims: tuple | None = None

    def __post_init__(self):
        on_cpu = self.backend.device == "cpu"
        self.config = self.config or (CONFIG if on_cpu else CUDA_CONFIG)
        self.dims = self.dims or ((10, 6) if on_cpu else (64, 64))
        names = ["k", "v"]
        if self.separate:
            names += ["k_cmp", "v_cmp", "k_win", "v_win"]
        rows = (self.batch, self.seqlen)
        self.new = {
            name: randn((*rows, self.heads_kv, self.dims[i % 2]), self.backend, seed=i)
            for i, name in enumerate(names)
        }
        self.q = randn((*rows, self.heads_q, self.dims[0]), self.backend, seed=10)
        self.gates = randn((*rows, self.heads_q, 3), self.backend, seed=11).sigmoid()
        torch.manual_seed(5)
        self.compress = KVCompressor(
            *self.dims,
            kind=self.kind,
            config=self.config,
            num_kv_heads=self.heads_kv if self.per_head else None,
            device=self.backend.device,
            dtype=self.backend.dtype,
        )
        with torch.no_grad():
            for parameter in self.compress.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)

    def cache(self, max_seqlen=None, **options):
        return NSACache(
            self.batch,
            max_seqlen or self.seqlen,
            self.heads_kv,
            *self.dims,
            config=self.config,
            separate_kv=self.separate,
            device=self.backend.device,
            dtype=self.backend.dtype,
            **options,
        )

    def rows(self, begin, end, sequences=slice(None)):
        """Arguments of sparse_attn_with_kvcache but the cache: q, gates, and the new tokens."""
        new = {name: x[sequences, begin:end] for name, x in self.new.items()}
        q, gates = self.q[sequences, begin:end], self.gates[sequences, begin:end]
        return q, gates, {**new, "compress": self.compress}

    def step(self, cache, begin, end, sequences=slice(None)):
        """Appends the tokens [begin, end) and attends: out and block_indices."""
        q, gates, new = self.rows(begin, end, sequences)
        return sparse_attn_with_kvcache(q, cache, gates, **new, return_selection=True)

    def run(self, cache, chunks, begin=0):
        """All results of a run in chunks, one after the other."""
        results = []
        with poisoned(self.backend.device):
            for chunk in chunks:
                results.append(self.step(cache, begin, begin + chunk))
                begin += chunk
        return tuple(torch.cat(parts, dim=1) for parts in zip(*results, strict=True))

    def full(self, end=None):
        """One call over all tokens: out and block_indices."""
        x = {name: t[:, :end] for name, t in self.new.items()}
        with torch.no_grad():
            return nsa_ext.sparse_attn(
                self.q[:, :end], x.pop("k"), x.pop("v"), self.gates[:, :end], self.compress,
                config=self.config, **x, return_selection=True,
            )  # fmt: skip

    def stored(self, cache, name, b, count):
        """The first `count` rows of sequence b in the pages `name`: (count, Hkv, D)."""
        pages = cache.pages(name)
        if cache.block_table is not None:
            mine = cache.block_table[b].clamp(min=0)
        else:
            each = pages.shape[0] // cache.batch_size
            mine = torch.arange(b * each, (b + 1) * each, device=pages.device)
        return pages[mine].flatten(0, 1)[:count]

    def check(self, cache, out, block_indices, end):
        """The tokens [0, end) by the correctness rule: what is stored, selections, outputs."""
        own = {name: x[:, :end] for name, x in self.new.items()}
        raw = [own.get(name, own[short]) for name, short in (("k_cmp", "k"), ("v_cmp", "v"))]
        wide = KVCompressor(
            *self.dims, kind=self.kind, config=self.config, dtype=torch.float64,
            num_kv_heads=self.heads_kv if self.per_head else None, device=self.backend.device,
        )  # fmt: skip
        wide.load_state_dict(self.compress.state_dict())
        with torch.no_grad():
            exact = reference.compress_kv(*(x.double() for x in raw), wide)
            rounded = reference.compress_kv(*raw, self.compress)
        count = self.config.num_compressed(end)
        compressed = []
        for name, right, low in zip(("k_cmp", "v_cmp"), exact, rounded, strict=True):
            rows = [self.stored(cache, name, b, count) for b in range(self.batch)]
            compressed.append(torch.stack(rows))
            assert_close_to_reference(compressed[-1], right, low, name=name)
        for name in ("k", "v", "k_win", "v_win"):
            if name in own:
                for b in range(self.batch):
                    assert torch.equal(self.stored(cache, name, b, end), own[name][b]), name

        problem = Problem(
            "cache", seqlens=((end, end),), batch=self.batch, heads_q=self.heads_q,
            heads_kv=self.heads_kv, dim_qk=self.dims[0], dim_v=self.dims[1], config=self.config,
        )  # fmt: skip
        q = self.q[:, :end]
        assert_selection(block_indices, q, compressed[0], problem)

        def oracle(dtype):
            windows = {name: own[name].to(dtype) for name in ("k_win", "v_win") if name in own}
            return reference.sparse_attn(
                *(x.to(dtype) for x in (q, own["k"], own["v"], self.gates[:, :end])),
                tuple(x.to(dtype) for x in compressed), config=self.config,
                block_indices=block_indices, **windows,
            )  # fmt: skip

        assert_close_to_reference(
            out, oracle(torch.float64), oracle(self.backend.dtype), name="out"
        )


def random_chunks(total, seed, most=40):
    """Chunk lengths that add up to `total`: many of one token, some empty, some long."""
    generator = torch.Generator().manual_seed(seed)
    chunks = []
    while (left := total - sum(chunks)) > 0:
        kind = int(torch.randint(4, (), generator=generator))
        size = (1, 1, int(torch.randint(0, 6, (), generator=generator)),
                int(torch.randint(1, most, (), generator=generator)))[kind]  # fmt: skip
        chunks.append(min(size, left))
    return chunks
