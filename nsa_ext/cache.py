"""The KV cache of one attention layer: what decoding and chunked prefill keep between calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ops  # noqa: F401  (registers the operators)
from ._checks import check_aligned, check_at_least, check_config, check_floating, check_tensor
from ._layout import rows_aligned
from ._storage import CacheStorage
from .config import DEFAULT_CONFIG, NSAConfig
from .functional import Compress, check_compressor, check_pair

Lengths = int | Sequence[int] | Tensor
"""One length for all sequences, one for each, or those as an int32 tensor on the device."""


class NSACache:
    """Raw keys and values, compressed tokens and lengths of B sequences, for one attention layer.

    It keeps what the three branches read: the raw K and V of the selected and the window branch
    (one pair, or one for each), the compressed tokens, and the *tail*, the last raw tokens of the
    compressed branch, from which the next blocks complete. Memory per token and kv head:
    (1 + 1/d) * (Dk + Dv) elements, (2 + 1/d) * (Dk + Dv) with ``separate_kv``.

    **Memory.** Contiguous (default): every sequence owns ``max_seqlen`` tokens, rounded up to whole
    selection blocks. Appends that need more double it, which copies the cache once (so the cost is
    that of one copy per token in all) and briefly takes three times its memory; ``reserve`` does it
    ahead, ``growable=False`` makes it an error. Paged (``num_pages``): sequences take pages of one
    selection block (l' tokens) from a pool as they grow, and ``reset`` gives them back; a page's
    compressed tokens lie in the same page number. With ``block_table`` the caller says which pages
    a sequence has, before every append that reaches a new page.

    **Lengths** live on the device (``seqlens``) and no method waits for it. The host keeps an upper
    bound of each: exact while the counts of appends are ints, else as if every row were a token
    (``sync`` reads the device and makes it exact). An append whose upper bound exceeds the room
    raises ValueError, and nothing has changed. Should the device find less room than the host knew
    of (replays of a CUDA graph), it leaves the sequence as it was and counts the tokens; ``sync``
    reports them.

    **CUDA graphs.** An append inside a capture only checks that there is room; call
    ``make_room(T)`` before each replay, which does the host's share of the append. A cache that was
    captured does not grow any more.

    ``cache[i:j]`` is a view of some of the sequences: to prefill one while the others wait.

    Args:
        batch_size: B.
        max_seqlen: tokens that a sequence has room for: without pages, at first; with pages, at
            most.
        num_kv_heads, head_dim, head_dim_v: Hkv, Dk, and Dv (default: Dk).
        config: block lengths.
        separate_kv: the window branch has K and V of its own.
        num_pages: pages of the pool, or None: contiguous.
        block_table: int32 (B, ceil(max_seqlen / l')), contiguous, on the device, entries below
            ``num_pages`` or -1: pages of each sequence, kept by the caller.
        rope_inv_freq: (Dk / 2,): compressed key c is rotated by the angles c*d * rope_inv_freq, in
            pairs (i, i + Dk/2). Raw keys come rotated, those of the compressed branch do not.
        max_rollback: tokens that ``truncate`` can take back (to length 0 always); they cost memory
            in the tail, l + max_rollback tokens a sequence.
        growable: see above.
        device, dtype: of the pools; default: torch's.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        batch_size: int,
        max_seqlen: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        config: NSAConfig = DEFAULT_CONFIG,
        separate_kv: bool = False,
        num_pages: int | None = None,
        block_table: Tensor | None = None,
        rope_inv_freq: Tensor | None = None,
        max_rollback: int = 64,
        growable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_config(config)
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_seqlen", max_seqlen, 1),
            ("num_kv_heads", num_kv_heads, 1),
            ("head_dim", head_dim, 1),
            ("head_dim_v", head_dim_v, 1),
            ("num_pages", 1 if num_pages is None else num_pages, 1),
            ("max_rollback", max_rollback, 0),
        ):
            check_at_least(name, value, least)
        max_pages = config.num_select_blocks(max_seqlen)
        if block_table is not None:
            if num_pages is None:
                raise ValueError("num_pages: expected an int with block_table, got None")
            check_tensor(
                "block_table", block_table, ("B", "pages"), (batch_size, max_pages),
                dtype=torch.int32,
            )  # fmt: skip
            if not block_table.is_contiguous():
                raise ValueError("block_table: expected a contiguous tensor")
            device = block_table.device if device is None else device
        dims = (head_dim, head_dim_v)
        self._storage = CacheStorage(
            config, batch_size, max_pages, num_pages, block_table, num_kv_heads, dims,
            separate_kv, config.block_size + max_rollback, device, dtype,
        )  # fmt: skip
        check_floating("dtype", self._storage.pools["k"])
        if block_table is not None:
            check_tensor(
                "block_table", block_table, ("B", "pages"), (batch_size, max_pages),
                like=self._storage.state, dtype=torch.int32,
            )  # fmt: skip
        self._begin, self._end = 0, batch_size
        self.config = config
        self.separate_kv = separate_kv
        self.growable = growable
        self.max_rollback = max_rollback
        self.rope_inv_freq = None
        if rope_inv_freq is not None:
            if head_dim % 2:
                raise ValueError(f"head_dim: expected an even number with RoPE, got {head_dim}")
            check_tensor("rope_inv_freq", rope_inv_freq, ("Dk / 2",), (head_dim // 2,))
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            self.rope_inv_freq = rope_inv_freq.detach().to(self.device, wide).contiguous()

    # What it is.

    @property
    def batch_size(self) -> int:
        return self._end - self._begin

    @property
    def num_kv_heads(self) -> int:
        return self._storage.tail_k.shape[2]

    @property
    def head_dim(self) -> int:
        return self._storage.tail_k.shape[3]

    @property
    def head_dim_v(self) -> int:
        return self._storage.tail_v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self._storage.tail_k.dtype

    @property
    def device(self) -> torch.device:
        return self._storage.tail_k.device

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for: contiguous, now; paged, at most."""
        return self._storage.capacity

    @property
    def paged(self) -> bool:
        return self._storage.block_table is not None

    @property
    def nbytes(self) -> int:
        storage = self._storage
        tensors = (*storage.pools.values(), storage.tail_k, storage.tail_v)
        return sum(x.numel() * x.element_size() for x in tensors)

    @property
    def seqlens(self) -> Tensor:
        """int32 (B,): tokens of each sequence, on the device."""
        return self._state[0]

    @property
    def max_seqlens(self) -> list[int]:
        """Upper bounds of ``seqlens``, known to the host."""
        return self._storage.high[self._begin : self._end]

    @property
    def block_table(self) -> Tensor | None:
        """int32 (B, max_pages): pages of each sequence, -1 where it has none; None: contiguous."""
        table = self._storage.block_table
        return None if table is None else table[self._begin : self._end]

    def pages(self, name: str) -> Tensor | None:
        """Pages "k", "v", "k_win", "v_win" (num_pages, l', Hkv, D), "k_cmp" or "v_cmp"
        (num_pages, l'/d, Hkv, D): without a block table those of sequence b are b * max_pages,
        b * max_pages + 1, .. None where the window branch shares k and v."""
        pool = self._storage.pools.get(name)
        if pool is None or self.paged:
            return pool
        each = self._storage.max_pages
        return pool[self._begin * each : self._end * each]

    @property
    def _state(self) -> Tensor:
        return self._storage.state[:, self._begin : self._end]

    @property
    def _sequences(self) -> range:
        return range(self._begin, self._end)

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, sequences: slice) -> NSACache:
        """A view of the sequences i .. j-1."""
        if not isinstance(sequences, slice):
            raise TypeError(f"cache[...]: expected a slice, got {type(sequences).__name__}")
        begin, end, step = sequences.indices(self.batch_size)
        if step != 1 or begin >= end:
            raise ValueError(
                f"cache[...]: expected a slice of at least one of {self.batch_size} sequences "
                f"without a step, got {sequences}"
            )
        view = object.__new__(NSACache)
        view.__dict__.update(self.__dict__)
        view._begin, view._end = self._begin + begin, self._begin + end
        return view

    def __repr__(self) -> str:
        kind = "paged" if self.paged else "contiguous"
        return (
            f"NSACache({kind}, batch_size={self.batch_size}, capacity={self.capacity}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"head_dim_v={self.head_dim_v}, separate_kv={self.separate_kv}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def positions(self, tokens: int, counts: Sequence[int] | Tensor | None = None) -> Tensor:
        """int32 (B, T): positions that the rows of the next append get; where counts are given, of
        the last counts[b] rows of sequence b (what others get means nothing)."""
        check_at_least("tokens", tokens, 0)
        counts = self._check_counts(counts, tokens)
        ends = self.seqlens + (tokens if counts is None else counts)
        rows = torch.arange(-tokens, 0, device=self.device, dtype=torch.int32)
        return ends[:, None] + rows

    # Storing tokens.

    @torch.compiler.disable
    @torch.no_grad()
    def append(
        self,
        k: Tensor,
        v: Tensor,
        compress: Compress,
        *,
        k_cmp: Tensor | None = None,
        v_cmp: Tensor | None = None,
        k_win: Tensor | None = None,
        v_win: Tensor | None = None,
        counts: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Stores T new tokens of every sequence, and the compressed tokens whose blocks they
        complete. Carries no gradient.

        Args:
            k, v: (B, T, Hkv, Dk) and (B, T, Hkv, Dv), any T: of the selected branch, and of the
                others where they are given none of their own.
            compress: a :class:`KVCompressor`, or a callable like it.
            k_cmp, v_cmp: raw keys and values of the compressed branch, shapes of k and v; default:
                k, v.
            k_win, v_win: of the window branch, with ``separate_kv`` only; default: k, v.
            counts: new tokens of each sequence, where they differ: the *last* counts[b] rows of
                sequence b are its new tokens (padding is on the left, as the last row is the last
                token), 0 leaves it as it is. Ints, or int32 (B,) on the cache's device.

        Raises:
            TypeError, ValueError: an argument does not fit, or the tokens find no room; the message
                names it, and nothing has changed.
        """
        tokens = self._check_tokens("k", k, "v", v, None)
        raw_k, raw_v = k if k_cmp is None else k_cmp, v if v_cmp is None else v_cmp
        self._check_tokens("k_cmp", raw_k, "v_cmp", raw_v, tokens)
        if self.separate_kv:
            k_win, v_win = k if k_win is None else k_win, v if v_win is None else v_win
            self._check_tokens("k_win", k_win, "v_win", v_win, tokens)
        else:
            for name, x in (("k_win", k_win), ("v_win", v_win)):
                if x is not None:
                    raise ValueError(
                        f"{name}: expected None for a cache without separate_kv, got a tensor"
                    )
        if not callable(compress):
            raise TypeError(
                f"compress: expected a KVCompressor or a callable, got {type(compress).__name__}"
            )
        check_compressor(compress, self.config)
        device_counts = self._check_counts(counts, tokens)
        exact = not isinstance(counts, Tensor)
        new = self._per_sequence("counts", tokens if counts is None or not exact else counts)
        self._storage.provide(self._lengths_after(new), self.growable)
        if tokens == 0:
            return

        storage, table, config = self._storage, self.block_table, self.config.as_list()
        tails = (x[self._begin : self._end] for x in (storage.tail_k, storage.tail_v))
        tail_k, tail_v = tails
        pools = [self.pages(name) for name in ("k", "v", "k_win", "v_win", "k_cmp", "v_cmp")]
        target = (self._state, *pools, tail_k, tail_v)
        fresh, rest = (k, v, k_win, v_win, raw_k, raw_v), (table, self.rope_inv_freq, config)
        store_step = getattr(compress, "store_step", None)
        if not (store_step and store_step(raw_k, raw_v, (*target, *fresh, device_counts, *rest))):
            new_k, new_v, steps = self._compress_new(
                compress, raw_k, raw_v, tail_k, tail_v, self._state, device_counts, table,
                pools[0].shape[0], config,
            )  # fmt: skip
            torch.ops.nsa_ext.cache_append(*target, steps, *fresh, new_k, new_v, *rest)
        self._storage.count(self._sequences, new, exact)

    def _compress_new(
        self, compress: Compress, *arguments: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compressed tokens (B, ceil(T / d), Hkv, Dk) and (.., Dv), those of blocks that the new
        tokens complete first, and the steps of cache_append."""
        rows_k, rows_v, steps = torch.ops.nsa_ext.cache_gather(*arguments)
        blocks = self.config.num_compressed(rows_k.shape[1])
        shape = (self.batch_size, blocks, self.num_kv_heads)
        if self.device.type == "cpu" and not self._complete_blocks(steps):
            sizes = ((*shape, self.head_dim), (*shape, self.head_dim_v))
            return rows_k.new_zeros(sizes[0]), rows_k.new_zeros(sizes[1]), steps
        pair = check_pair(compress(rows_k, rows_v))
        for name, x, dim in zip(("k", "v"), pair, (self.head_dim, self.head_dim_v), strict=True):
            dims = ("B", "Tc", "Hkv", f"D{name}")
            check_tensor(f"compress: {name}_cmp", x, dims, (*shape, dim), like=rows_k)
        new_k, new_v = (x if rows_aligned(x) else x.contiguous() for x in pair)
        return new_k, new_v, steps

    def _complete_blocks(self, steps: Tensor) -> bool:
        """Whether any sequence completes a block: 1 step of d in decode. On the CPU, where lengths
        can be read without a wait."""
        count = self.config.num_compressed
        return any(count(old + taken) > count(old) for old, taken, _ in steps.tolist())

    def make_room(self, tokens: int | Sequence[int], *, exact: bool = True) -> None:
        """The host's share of an append of ``tokens`` to each sequence: checks the room, grows or
        takes pages, and keeps count. To be called before each replay of a CUDA graph that holds an
        append; an append outside of a graph does it by itself.

        Args:
            tokens: for all sequences, or for each.
            exact: False: at most so many.

        Raises:
            ValueError: there is no room; nothing has changed.
        """
        counts = self._per_sequence("tokens", tokens)
        self._storage.provide(self._lengths_after(counts), self.growable)
        self._storage.count(self._sequences, counts, exact)

    def reserve(self, seqlen: int) -> None:
        """Room for ``seqlen`` tokens in every sequence, so that appends up to it neither copy the
        cache nor take pages."""
        check_at_least("seqlen", seqlen, 0)
        high = self._storage.high
        self._storage.provide({b: max(seqlen, high[b]) for b in self._sequences}, self.growable)

    def _lengths_after(self, counts: list[int]) -> dict[int, int]:
        high = self._storage.high
        return {b: high[b] + count for b, count in zip(self._sequences, counts, strict=True)}

    # Changing sequences.

    @torch.no_grad()
    def truncate(self, lengths: Lengths) -> None:
        """Shortens sequences to ``lengths``; those that are no longer stay as they are. Pages stay
        with their sequences.

        Tokens are taken back from the end: at most ``max_rollback`` of them, or all. The host
        raises where it knows that more are; where it cannot know (lengths on the device), the next
        compressed token of such a sequence is NaN, and so is what attends to it.

        Args:
            lengths: for all sequences, for each, or int32 (B,) on the cache's device.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        storage, seqlens = self._storage, self._state[0]
        if isinstance(lengths, Tensor):
            self._check_int32("lengths", lengths)
            for b in self._sequences:
                storage.low[b] = 0
        else:
            lengths = self._per_sequence("lengths", lengths)
            for b, length in zip(self._sequences, lengths, strict=True):
                first = self.config.num_compressed(length) * self.config.block_stride
                if 0 < length < storage.low[b] and first < storage.tail_low[b]:
                    raise ValueError(
                        f"lengths: expected 0, or at least {storage.low[b] - self.max_rollback} for"
                        f" sequence {b} (max_rollback={self.max_rollback}), got {length}"
                    )
            for b, length in zip(self._sequences, lengths, strict=True):
                storage.shorten(b, length)
            lengths = self._to_device(lengths)
        torch.minimum(seqlens, lengths.clamp(min=0), out=seqlens)
        self._state[1].masked_fill_(seqlens == 0, 0)

    @torch.no_grad()
    def reset(self) -> None:
        """Empties all sequences (of a view: its own) and gives their pages back."""
        self._state.zero_()
        self._storage.clear(self._sequences)

    @torch.no_grad()
    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Sequence b becomes a copy of sequence index[b] as it was before: beam search, forks.

        Contiguous: copies the used part of the sequences that change. Paged: copies lengths, tails
        and tables; sequences share pages until one of them is written to, then it gets a copy.

        Args:
            index: B ints in [0, B); contiguous: also int64 (B,) on the cache's device, which
                copies all sequences as far as the longest reaches.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        storage = self._storage
        if storage.block_table is not None and storage.table is None:
            raise ValueError("reorder: expected a cache that keeps its block table itself")
        if isinstance(index, Tensor):
            if index.dtype != torch.int64 or index.shape != (self.batch_size,):
                raise ValueError(
                    f"index: expected int64 ({self.batch_size},), got {index.dtype} "
                    f"{tuple(index.shape)}"
                )
            if index.device.type == "cpu":
                index = index.tolist()
        if isinstance(index, Tensor):
            if self.paged:
                raise ValueError("index: expected ints for a paged cache, got a tensor on a device")
            if index.device != self.device:
                raise ValueError(f"index: expected device {self.device}, got {index.device}")
            source, target = index, torch.arange(self.batch_size, device=self.device)
            mine = slice(self._begin, self._end)
            for bounds, worst in (
                (storage.low, min), (storage.high, max), (storage.tail_low, min),
            ):  # fmt: skip
                bounds[mine] = [worst(bounds[mine])] * self.batch_size
        else:
            index = self._per_sequence("index", index)
            if any(i >= self.batch_size for i in index):
                raise ValueError(f"index: expected ints below {self.batch_size}, got {index}")
            moved = [(i, b) for b, i in enumerate(index) if i != b]
            if not moved:
                return
            source, target = storage._indices(list(zip(*moved, strict=True)))
            storage.permute({self._begin + b: self._begin + i for i, b in moved})
        tensors = [x[self._begin : self._end] for x in (storage.tail_k, storage.tail_v)]
        if not self.paged:
            used = self.config.num_select_blocks(max(self.max_seqlens))
            for name in storage.pools:
                pages = self.pages(name).unflatten(0, (self.batch_size, storage.max_pages))
                tensors.append(pages[:, :used])
        for x in tensors:
            x[target] = x[source]
        self._state[:, target] = self._state[:, source]

    def sync(self) -> list[int]:
        """Waits for the device and makes the host's lengths exact. Returns them.

        Raises:
            RuntimeError: the device found no room for tokens since the last call (the lengths are
                exact all the same).
        """
        storage = self._storage
        lengths, tails, dropped = self._state.tolist()
        mine = slice(self._begin, self._end)
        storage.low[mine] = storage.high[mine] = lengths
        storage.tail_low[mine] = tails
        if any(dropped):
            self._state[2].zero_()
            raise RuntimeError(
                f"tokens that found no room in their sequences, by sequence: {dropped}; the "
                "sequences are as they were before"
            )
        return lengths

    # Checks.

    def _check_tokens(
        self, k_name: str, k: Tensor, v_name: str, v: Tensor, tokens: int | None
    ) -> int:
        """New tokens k (B, T, Hkv, Dk) and v (B, T, Hkv, Dv) fit. Returns T."""
        dims, pool = ("B", "T", "Hkv", "D"), self._storage.tail_k
        for name, x, dim in ((k_name, k, self.head_dim), (v_name, v, self.head_dim_v)):
            shape = (self.batch_size, tokens, self.num_kv_heads, dim)
            check_tensor(name, x, dims, shape, like=pool, fits_to="the cache")
            check_aligned(name, x)
            tokens = x.shape[1]
        return tokens

    def _check_counts(self, counts: Sequence[int] | Tensor | None, tokens: int) -> Tensor | None:
        """counts on the device."""
        if counts is None:
            return None
        if isinstance(counts, Tensor):
            self._check_int32("counts", counts)
            return counts.contiguous()
        values = self._per_sequence("counts", counts)
        if max(values) > tokens:
            raise ValueError(f"counts: expected at most the {tokens} rows of k, got {values}")
        return self._to_device(values)

    def _check_int32(self, name: str, x: Tensor) -> None:
        shape = (self.batch_size,)
        check_tensor(name, x, ("B",), shape, like=self._storage.state, dtype=torch.int32)

    def _per_sequence(self, name: str, values: int | Sequence[int]) -> list[int]:
        if isinstance(values, int):
            values = [values] * self.batch_size
        values = list(values)
        if len(values) != self.batch_size:
            raise ValueError(f"{name}: expected {self.batch_size} ints, got {len(values)}")
        for value in values:
            check_at_least(name, value, 0)
        return values

    def _to_device(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.device, non_blocking=True)
