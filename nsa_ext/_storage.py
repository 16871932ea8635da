"""Memory of a KV cache, and what the host knows of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._pages import PageChanges, PageTable
from .config import NSAConfig


class CacheStorage:
    """Pools of pages, tails and lengths of all sequences of a cache; views of the cache share it.

    Pages are zeroed: kernels may read, and mask, rows behind the end of a sequence.

    Attributes:
        pools: "k", "v" (num_pages, l', Hkv, D); "k_win", "v_win", the same, absent where the window
            branch shares k and v; "k_cmp", "v_cmp" (num_pages, l'/d, Hkv, D).
        tail_k, tail_v: (B, R, Hkv, D), the last R raw tokens of the compressed branch; position p
            lies in slot p % R.
        state: int32 (3, B): lengths, first positions that the tails hold, tokens without room.
        block_table: int32 (B, max_pages); None: sequence b has pages b * max_pages, ..
        table: the host's side of a block table that the cache manages itself.
        low, high: bounds of the lengths.
        tail_low: lower bounds of the first positions that the tails hold.
        captured: a CUDA graph holds the addresses of the pools.
    """

    def __init__(
        self,
        config: NSAConfig,
        batch_size: int,
        max_pages: int,
        num_pages: int | None,
        block_table: Tensor | None,
        num_heads: int,
        dims: tuple[int, int],
        separate_kv: bool,
        tail: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.batch_size = batch_size
        self.max_pages = max_pages
        contiguous = num_pages is None and block_table is None
        pages = batch_size * max_pages if num_pages is None else num_pages
        rows = config.select_size
        names = ("k", "v", "k_win", "v_win", "k_cmp", "v_cmp")
        self.pools: dict[str, Tensor] = {}
        for i, name in enumerate(names):
            if name.endswith("win") and not separate_kv:
                continue
            per_page = rows // config.block_stride if name.endswith("cmp") else rows
            shape = (pages, per_page, num_heads, dims[i % 2])
            self.pools[name] = torch.zeros(shape, device=device, dtype=dtype)
        self.tail_k, self.tail_v = (
            torch.zeros(batch_size, tail, num_heads, dim, device=device, dtype=dtype)
            for dim in dims
        )
        self.state = torch.zeros(3, batch_size, device=device, dtype=torch.int32)
        self.block_table = block_table
        self.table = None
        if not contiguous and block_table is None:
            self.table = PageTable(pages, batch_size)
            self.block_table = torch.full(
                (batch_size, max_pages), -1, device=device, dtype=torch.int32
            )
        self.low = [0] * batch_size
        self.high = [0] * batch_size
        self.tail_low = [0] * batch_size
        self.captured = False

    @property
    def capacity(self) -> int:
        return self.max_pages * self.config.select_size

    @property
    def tail(self) -> int:
        return self.tail_k.shape[1]

    def grow(self, capacity: int) -> None:
        """Room for ``capacity`` tokens in every sequence, without a block table."""
        old, self.max_pages = self.max_pages, -(-capacity // self.config.select_size)
        for name, pool in self.pools.items():
            grown = pool.new_zeros(self.batch_size, self.max_pages, *pool.shape[1:])
            grown[:, :old] = pool.unflatten(0, (self.batch_size, old))
            self.pools[name] = grown.flatten(0, 1)

    def provide(self, lengths: dict[int, int], growable: bool) -> None:
        """Memory for sequences of these lengths, or a ValueError and nothing has changed."""
        longest = max(lengths.values())
        capturing = self._is_capturing()
        if longest > self.capacity:
            b = max(lengths, key=lengths.get)
            problem = (
                f"max_seqlen: expected at most {self.capacity} tokens in a sequence, got up to "
                f"{longest} in sequence {b}"
            )
            if self.low[b] != self.high[b]:
                problem += " (an upper bound, as counts were on the device: `sync` makes it exact)"
            if self.block_table is not None or not growable:
                raise ValueError(problem)
            if capturing or self.captured:
                raise ValueError(f"{problem}; a cache in a CUDA graph does not grow")
            self.grow(max(longest, 2 * self.capacity))
        if self.table is None:
            return
        needs = self.pages_needed(lengths)
        if not capturing:
            self.apply(self.table.provide(needs))
        elif self.table.missing(needs):
            raise ValueError(
                "num_pages: expected pages for the new tokens before a CUDA graph is captured: "
                "call `reserve` first"
            )

    def count(self, sequences: range, counts: list[int], exact: bool) -> None:
        """So many tokens were stored, or at most so many. What is captured in a CUDA graph is
        counted when it is replayed."""
        if self._is_capturing():
            self.captured = True
            return
        for b, count in zip(sequences, counts, strict=True):
            self.high[b] += count
            self.low[b] += count if exact else 0
            self.tail_low[b] = max(self.tail_low[b], self.low[b] - self.tail)

    def shorten(self, b: int, length: int) -> None:
        for bounds in (self.low, self.high):
            bounds[b] = min(bounds[b], length)
        if length == 0:
            self.tail_low[b] = 0

    def _is_capturing(self) -> bool:
        return self.state.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def first_open_page(self, b: int) -> int:
        """The first page of a sequence that new tokens may be written to."""
        config = self.config
        return config.num_compressed(self.low[b]) * config.block_stride // config.select_size

    def pages_needed(self, lengths: dict[int, int]) -> dict[int, tuple[int, int]]:
        """By sequence, the first page that has to be its own, and how many it needs."""
        size = self.config.select_size
        return {b: (self.first_open_page(b), -(-length // size)) for b, length in lengths.items()}

    def apply(self, changes: PageChanges) -> None:
        """Brings the device up to date with the page table."""
        if changes.copies:
            source, target = self._indices(list(zip(*changes.copies, strict=True)))
            for pool in self.pools.values():
                pool.index_copy_(0, target, pool[source])
        if changes.entries:
            at = [b * self.max_pages + column for b, column, _ in changes.entries]
            at, pages = self._indices([at, [page for _, _, page in changes.entries]])
            self.block_table.view(-1).index_copy_(0, at, pages.int())

    def clear(self, sequences: range) -> None:
        """The host's share of a reset."""
        changes = PageChanges()
        for b in sequences:
            self.low[b] = self.high[b] = self.tail_low[b] = 0
            if self.table is not None:
                changes.entries += self.table.release(b).entries
        self.apply(changes)

    def permute(self, sources: dict[int, int]) -> None:
        """Sequence b becomes sequence sources[b], all at once: what the host knows, and pages."""
        for bounds in (self.low, self.high, self.tail_low):
            bounds[:] = [bounds[sources.get(b, b)] for b in range(self.batch_size)]
        if self.table is not None:
            self.apply(self.table.assign(sources))

    def _indices(self, rows: list) -> Tensor:
        indices = torch.tensor(rows, dtype=torch.int64)
        return indices.to(self.state.device, non_blocking=True)
