"""The KV cache: decode, chunks and speculation give the numbers of the full call."""

import pytest
import torch
from cache_helpers import CONFIG, Sequences, random_chunks
from helpers import CUDA_BACKENDS, Backend, assert_same_bits, backend_params
from test_compress import KINDS

import nsa_ext
from nsa_ext import NSAConfig, sparse_attn_with_kvcache
from nsa_ext._pages import PageTable

F64 = Backend("cpu", torch.float64)
backends = pytest.mark.parametrize(
    "backend",
    backend_params([F64, Backend("cpu", torch.bfloat16), *CUDA_BACKENDS[:2]]),
    indirect=True,
)
devices = pytest.mark.parametrize("backend", backend_params([F64, CUDA_BACKENDS[0]]), indirect=True)
layouts = pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])


def length_of(backend, cpu, cuda):
    return cpu if backend.device == "cpu" else cuda


def options_of(paged, sequences):
    """Pages for all tokens of all sequences."""
    pages = sequences.config.num_select_blocks(sequences.seqlen) * sequences.batch
    return {"num_pages": pages} if paged else {}


def test_five_thousand_tokens_one_by_one():
    """The default lengths, from an empty cache that grows: exactly the full call."""
    sequences = Sequences(
        F64, 5000, batch=1, heads_q=2, heads_kv=1, config=NSAConfig(), dims=(8, 8), kind="linear"
    )
    cache = sequences.cache(max_seqlen=64)
    q, gates, new = sequences.rows(0, 5000)
    compress = new.pop("compress")
    outs, selections = [], []
    for i in range(5000):
        token = {name: x[:, i : i + 1] for name, x in new.items()}
        out, blocks = sparse_attn_with_kvcache(
            q[:, i : i + 1], cache, gates[:, i : i + 1], **token, compress=compress,
            return_selection=True,
        )  # fmt: skip
        outs.append(out)
        selections.append(blocks)
    out, block_indices = sequences.full()
    assert torch.equal(torch.cat(selections, dim=1), block_indices)
    torch.testing.assert_close(torch.cat(outs, dim=1), out, rtol=1e-11, atol=1e-12)
    assert cache.sync() == cache.max_seqlens == [5000]


@layouts
@backends
@pytest.mark.parametrize("kind", KINDS)
def test_chunks(kind, backend, paged):
    """One token, a few, none, and chunks too long for the decode kernels, in any order."""
    sequences = Sequences(backend, length_of(backend, 211, 700), kind=kind, separate=kind == "mlp")
    cache = sequences.cache(**options_of(paged, sequences))
    chunks = random_chunks(sequences.seqlen, seed=len(kind), most=length_of(backend, 60, 300))
    out, block_indices = sequences.run(cache, chunks)
    sequences.check(cache, out, block_indices, sequences.seqlen)
    if backend.device == "cpu":
        full, selected = sequences.full()
        assert torch.equal(block_indices, selected)
        # The same products in the same order but for the window's, which tiles of queries share.
        tolerance = (
            {"rtol": 1e-11, "atol": 1e-12} if backend == F64 else {"rtol": 1e-2, "atol": 1e-2}
        )
        torch.testing.assert_close(out, full, **tolerance)


SHAPES = {
    "g1": {"heads_q": 2, "heads_kv": 2},
    "g6": {"heads_q": 6, "heads_kv": 1},
    "g16": {"heads_q": 32, "heads_kv": 2},
    "per-head": {"per_head": True},
    "batch1": {"batch": 1},
    "batch5": {"batch": 5},
}


@layouts
@devices
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_shapes(options, backend, paged):
    sequences = Sequences(backend, length_of(backend, 97, 330), **options)
    cache = sequences.cache(**options_of(paged, sequences))
    out, block_indices = sequences.run(cache, random_chunks(sequences.seqlen, seed=3))
    sequences.check(cache, out, block_indices, sequences.seqlen)


CUDA_SHAPES = {
    "dims128": {"dims": (128, 128)},
    "dims192": {"dims": (192, 128)},
    "l64-d16": {"config": NSAConfig(64, 16, 64, 3, 1, 1, 70)},
    "l32-d32-s128": {"config": NSAConfig(32, 32, 128, 4, 1, 1, 70)},
    "s32": {"config": NSAConfig(32, 16, 32, 5, 1, 2, 33)},
    "default": {"config": NSAConfig()},
}


@pytest.mark.gpu
@pytest.mark.parametrize("options", CUDA_SHAPES.values(), ids=CUDA_SHAPES)
def test_shapes_of_cuda(options):
    backend = CUDA_BACKENDS[0]
    with backend.active():
        sequences = Sequences(backend, 1500, **options)
        cache = sequences.cache()
        out, block_indices = sequences.run(cache, [1100, *random_chunks(400, seed=4)])
        sequences.check(cache, out, block_indices, sequences.seqlen)


@layouts
@devices
def test_different_lengths(backend, paged):
    """Sequences at their own pace: counts on the host, on the device, and none at all."""
    sequences = Sequences(backend, length_of(backend, 120, 400), batch=3)
    lengths, rows = [0, 0, 0], length_of(backend, 9, 30)
    room = sequences.seqlen + rows  # the host counts every row of a call with counts on the device
    cache = sequences.cache(room, **({"num_pages": 3 * room} if paged else {"growable": False}))
    generator = torch.Generator().manual_seed(1)
    out_all = torch.zeros_like(sequences.q[..., : sequences.dims[1]])
    blocks_all = None
    for turn in range(60):
        counts = torch.randint(0, rows + 1, (3,), generator=generator).tolist()
        counts = [min(n, sequences.seqlen - have) for n, have in zip(counts, lengths, strict=True)]
        if turn % 4 == 3:
            counts[turn % 3] = 0

        def padded(x, counts=counts):
            """The new rows of each sequence on the right of rows that mean nothing."""
            new = x.new_full((3, rows, *x.shape[2:]), 7.0)
            for b, (n, have) in enumerate(zip(counts, lengths, strict=True)):
                new[b, rows - n :] = x[b, have : have + n]
            return new

        new = {name: padded(x) for name, x in sequences.new.items()}
        given = counts
        if turn % 2:
            given = torch.tensor(counts, dtype=torch.int32).to(backend.device)
            cache.sync()
        out, blocks = sparse_attn_with_kvcache(
            padded(sequences.q), cache, padded(sequences.gates), **new,
            compress=sequences.compress, counts=given, return_selection=True,
        )  # fmt: skip
        if blocks_all is None:
            blocks_all = blocks.new_zeros(3, sequences.seqlen, *blocks.shape[2:])
        for b, n in enumerate(counts):
            out_all[b, lengths[b] : lengths[b] + n] = out[b, rows - n :]
            blocks_all[b, lengths[b] : lengths[b] + n] = blocks[b, rows - n :]
            lengths[b] += n
        assert all(bound >= have for bound, have in zip(cache.max_seqlens, lengths, strict=True))
        if min(lengths) == sequences.seqlen:
            break
    assert cache.sync() == lengths == [sequences.seqlen] * 3
    sequences.check(cache, out_all, blocks_all, sequences.seqlen)


@devices
def test_a_query_without_tokens_sees_nothing(backend):
    sequences = Sequences(backend, 40)
    cache = sequences.cache()
    q, gates, _ = sequences.rows(0, 3)
    out, blocks = sparse_attn_with_kvcache(q, cache, gates, return_selection=True)
    assert not out.any() and (blocks == -1).all()
    # Three queries over a sequence of one token: only the last one has it behind.
    sequences.step(cache, 0, 1)
    out = sparse_attn_with_kvcache(q, cache, gates)
    assert not out[:, :2].any() and out[:, 2].any()


@devices
def test_attending_does_not_append(backend):
    sequences = Sequences(backend, 50)
    cache = sequences.cache()
    out, blocks = sequences.run(cache, [50])
    q, gates, _ = sequences.rows(45, 50)
    again, blocks_again = sparse_attn_with_kvcache(q, cache, gates, return_selection=True)
    assert torch.equal(blocks_again, blocks[:, 45:])
    assert cache.sync() == [50, 50]
    tolerance = 1e-12 if backend == F64 else 3e-2
    torch.testing.assert_close(again, out[:, 45:], rtol=tolerance, atol=tolerance)
    scaled = sparse_attn_with_kvcache(q, cache, gates, softmax_scale=0.01)
    assert not torch.allclose(scaled, again, atol=1e-3)


@devices
def test_pages_change_no_bit(backend):
    """Contiguous, pages of the cache, and pages of the caller in any order."""
    sequences = Sequences(backend, length_of(backend, 130, 500), separate=True)
    chunks = random_chunks(sequences.seqlen, seed=8, most=length_of(backend, 40, 20))
    count = sequences.config.num_select_blocks(sequences.seqlen)
    shuffled = torch.randperm(2 * count + 3, generator=torch.Generator().manual_seed(0))
    table = shuffled[: 2 * count].reshape(2, count).int().to(backend.device)
    caches = [
        sequences.cache(),
        sequences.cache(num_pages=2 * count),
        sequences.cache(num_pages=2 * count + 3, block_table=table),
    ]
    results = [sequences.run(cache, chunks) for cache in caches]
    for out, block_indices in results[1:]:
        assert_same_bits(out, results[0][0], "out")
        assert torch.equal(block_indices, results[0][1])


@devices
def test_the_same_call_twice_gives_the_same_bits(backend):
    sequences = Sequences(backend, 200)
    runs = [sequences.run(sequences.cache(), [150, *[1] * 50]) for _ in range(2)]
    assert_same_bits(runs[0][0], runs[1][0])


# Growth and views


@devices
def test_a_contiguous_cache_doubles(backend):
    sequences = Sequences(backend, length_of(backend, 100, 300))
    cache, size = sequences.cache(max_seqlen=1), sequences.config.select_size
    assert cache.capacity == size
    out, blocks = sequences.run(cache, [size, *random_chunks(sequences.seqlen - size, seed=2)])
    assert sequences.seqlen <= cache.capacity < 2 * sequences.seqlen + size
    sequences.check(cache, out, blocks, sequences.seqlen)
    cache.reserve(3 * sequences.seqlen)
    assert cache.capacity >= 3 * sequences.seqlen
    q, gates, _ = sequences.rows(sequences.seqlen - 1, sequences.seqlen)
    again = sparse_attn_with_kvcache(q, cache, gates)
    torch.testing.assert_close(again, out[:, -1:], rtol=1e-2, atol=1e-2)


@layouts
@devices
def test_views_prefill_one_sequence_while_others_wait(backend, paged):
    sequences = Sequences(backend, length_of(backend, 90, 300), batch=3)
    cache = sequences.cache(**options_of(paged, sequences))
    out = torch.zeros_like(sequences.q[..., : sequences.dims[1]])
    blocks = None
    pieces = [(1, 50), (0, 1), (1, 1), (2, 80), (0, 60), (2, 3)]
    lengths = [0, 0, 0]
    pieces += [(b, None) for b in range(3)]  # the rest
    for b, count in pieces:
        begin, end = lengths[b], sequences.seqlen if count is None else lengths[b] + count
        part, chosen = sequences.step(cache[b : b + 1], begin, end, slice(b, b + 1))
        blocks = (
            chosen.new_zeros(3, sequences.seqlen, *chosen.shape[2:]) if blocks is None else blocks
        )
        out[b, begin:end], blocks[b, begin:end] = part[0], chosen[0]
        lengths[b] = end
        assert cache.max_seqlens == cache.sync() == lengths
    sequences.check(cache, out, blocks, sequences.seqlen)
    assert cache[1:][1:].max_seqlens == [sequences.seqlen] and len(cache[1:]) == 2


# Truncate: speculative decoding


@layouts
@devices
@pytest.mark.parametrize("where", ["host", "device"])
def test_speculation(where, backend, paged):
    """Drafts of a few tokens of which a part is taken back: as if they had never been there."""
    sequences = Sequences(backend, length_of(backend, 110, 350))
    wrong = Sequences(backend, sequences.seqlen, kind="mean")
    wrong.compress, wrong.new = sequences.compress, {n: -x for n, x in sequences.new.items()}
    cache = sequences.cache(**options_of(paged, sequences), max_rollback=6)
    outs, selections, length = [], [], 0
    generator = torch.Generator().manual_seed(0)
    while length < sequences.seqlen:
        draft = min(int(torch.randint(1, 7, (), generator=generator)), sequences.seqlen - length)
        wrong.step(cache, length, length + draft)
        if where == "host":
            cache.truncate(length)
        else:
            cache.truncate(torch.full((2,), length, dtype=torch.int32).to(backend.device))
            cache.sync()
        good = min(int(torch.randint(1, 7, (), generator=generator)), draft)
        out, blocks = sequences.step(cache, length, length + good)
        outs.append(out)
        selections.append(blocks)
        length += good
    sequences.check(cache, torch.cat(outs, 1), torch.cat(selections, 1), sequences.seqlen)


@devices
def test_truncating_too_far(backend):
    """The host says so where it can know; else what would be wrong is NaN."""
    sequences = Sequences(backend, 200)
    cache = sequences.cache(max_rollback=10)
    sequences.step(cache, 0, 150)
    with pytest.raises(ValueError, match="at least 140 for sequence 0"):
        cache.truncate(71)
    with pytest.raises(ValueError, match="at least 140 for sequence 1"):
        cache.truncate([150, 71])
    assert cache.sync() == [150, 150]
    cache.truncate(150 - 10)
    cache.truncate(500)
    assert cache.sync() == cache.max_seqlens == [140, 140]
    cache.truncate(torch.tensor([140, 71], dtype=torch.int32).to(backend.device))
    out, _ = sequences.step(cache, 140, 200)
    assert torch.isfinite(out[0]).all() and not torch.isfinite(out[1]).all()
    # To nothing is never too far.
    cache.truncate(0)
    out, blocks = sequences.run(cache, [100, 100])
    sequences.check(cache, out, blocks, 200)


# Reorder: beam search


@layouts
@devices
@pytest.mark.parametrize("index", [[1, 0, 2], [2, 2, 2], [0, 0, 1], [0, 1, 2]])
def test_reorder(index, backend, paged):
    sequences = Sequences(backend, length_of(backend, 100, 300), batch=3)
    begin = length_of(backend, 61, 170)
    pages = {"num_pages": 3 * sequences.config.num_select_blocks(sequences.seqlen)} if paged else {}
    cache, right = sequences.cache(**pages), sequences.cache()
    sequences.run(cache, [begin])
    cache.reorder(index)
    permuted = Sequences(backend, sequences.seqlen, batch=3)
    permuted.new = {
        name: torch.cat([x[index, :begin], x[:, begin:]], dim=1)
        for name, x in sequences.new.items()
    }
    permuted.run(right, [begin])
    chunks = random_chunks(sequences.seqlen - begin, seed=5)
    out, blocks = sequences.run(cache, chunks, begin)
    expected, expected_blocks = permuted.run(right, chunks, begin)
    assert_same_bits(out, expected)
    assert torch.equal(blocks, expected_blocks)
    if paged:
        cache.reset()
        assert sorted(cache._storage.table.free) == list(range(pages["num_pages"]))


@devices
def test_reorder_by_a_tensor_of_the_device(backend):
    sequences = Sequences(backend, 100, batch=3)
    caches = [sequences.cache(), sequences.cache()]
    for cache in caches:
        sequences.step(cache[:1], 0, 30, slice(0, 1))
        sequences.step(cache[1:], 0, 61, slice(1, 3))
    caches[0].reorder([2, 0, 0])
    caches[1].reorder(torch.tensor([2, 0, 0], device=backend.device))
    # Indices on a GPU are not read: the host knows what holds for any.
    assert caches[0].max_seqlens == [61, 30, 30]
    assert caches[1].max_seqlens == [61, 61, 61] or backend.device == "cpu"
    assert caches[0].sync() == caches[1].sync() == [61, 30, 30]
    outs = [sequences.run(cache, [7, 1, 1], 61)[0] for cache in caches]
    assert_same_bits(*outs)


def test_reordered_sequences_share_pages_until_they_are_written():
    sequences = Sequences(F64, 60, batch=3)
    size = sequences.config.select_size
    cache = sequences.cache(num_pages=3 * 8)
    sequences.step(cache[:1], 0, 5 * size, slice(0, 1))
    used = cache._storage.table.users
    assert sum(n > 0 for n in used) == 5
    cache.reorder([0, 0, 0])
    assert sum(n > 0 for n in used) == 5
    # The fifth page's last block is not complete, so all but one user of it get a copy, and all a
    # sixth page.
    sequences.step(cache, 5 * size, 5 * size + 1)
    assert sum(n > 0 for n in used) == 4 + 3 + 3
    assert cache.block_table[:, :4].unique(dim=0).shape[0] == 1


# Overflow


def test_nothing_is_lost_when_there_is_no_room():
    sequences = Sequences(F64, 64)
    size = sequences.config.select_size
    for options in ({"growable": False}, {"num_pages": 16}, {"num_pages": 20}):
        cache = sequences.cache(max_seqlen=8 * size, **options)
        out, _ = sequences.run(cache, [8 * size - 3])
        with pytest.raises(ValueError, match="max_seqlen: expected at most 64 tokens"):
            sequences.step(cache, 0, 4)
        assert cache.sync() == cache.max_seqlens == [8 * size - 3] * 2
        rest, _ = sequences.run(cache, [3], 8 * size - 3)
        torch.testing.assert_close(torch.cat([out, rest], 1), sequences.full()[0])


def test_a_pool_without_free_pages():
    sequences = Sequences(F64, 64)
    size = sequences.config.select_size
    cache = sequences.cache(num_pages=9)
    sequences.step(cache, 0, 4 * size)
    with pytest.raises(ValueError, match="num_pages: expected a pool with 2 free pages"):
        sequences.step(cache, 4 * size, 4 * size + 1)
    assert cache.sync() == [4 * size] * 2
    sequences.step(cache[:1], 4 * size, 5 * size, slice(0, 1))
    cache[:1].reset()
    assert cache.sync() == [0, 4 * size] and (cache.block_table[0] == -1).all()
    sequences.step(cache[1:], 4 * size, 8 * size, slice(1, 2))


@devices
def test_the_host_counts_an_upper_bound(backend):
    sequences = Sequences(backend, 64)
    cache = sequences.cache(max_seqlen=64, growable=False)
    q, gates, new = sequences.rows(0, 30)
    none = torch.zeros(2, dtype=torch.int32, device=backend.device)
    for _ in range(2):
        sparse_attn_with_kvcache(q, cache, gates, **new, counts=none)
    with pytest.raises(ValueError, match="an upper bound, as counts were on the device"):
        sparse_attn_with_kvcache(q, cache, gates, **new, counts=none)
    assert cache.sync() == cache.max_seqlens == [0, 0]
    sparse_attn_with_kvcache(q, cache, gates, **new)


@layouts
@devices
def test_the_device_drops_what_the_host_did_not_know_of(backend, paged):
    """As after replays of a CUDA graph without make_room: no write leaves the cache."""
    sequences = Sequences(backend, 128)
    size = sequences.config.select_size
    cache = sequences.cache(max_seqlen=64, growable=False, **({"num_pages": 200} if paged else {}))
    sequences.step(cache, 0, 60)
    cache._storage.high = [0, 0]  # the host has lost count
    before = {name: pool.clone() for name, pool in cache._storage.pools.items()}
    sequences.step(cache[1:], 60, 68, slice(1, 2))
    assert cache.seqlens.tolist() == [60, 60]
    for name, pool in before.items():
        assert torch.equal(pool, cache._storage.pools[name]), name
    with pytest.raises(RuntimeError, match=r"found no room .*\[0, 8\]"):
        cache.sync()
    assert cache.sync() == cache.max_seqlens == [60, 60]
    sequences.step(cache, 60, 64)
    assert size and cache.sync() == [64, 64]


# The page table


def test_page_table():
    table = PageTable(10, 3)
    changes = table.provide({0: (0, 3), 1: (0, 2)})
    assert [entry[:2] for entry in changes.entries] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert not changes.copies and len(table.free) == 5
    changes = table.assign({1: 0, 2: 1})
    assert table.tables[1] == table.tables[0] != table.tables[2]
    assert [entry for entry in changes.entries if entry[0] == 1 and entry[2] < 0] == []
    # Sequence 1 writes to its last page.
    assert table.missing({1: (2, 4)}) == 2
    changes = table.provide({1: (2, 4)})
    assert changes.copies == [(table.tables[0][2], table.tables[1][2])]
    assert table.tables[1][:2] == table.tables[0][:2] and table.tables[1][2] != table.tables[0][2]
    with pytest.raises(ValueError, match="4 free pages"):
        table.provide({0: (3, 7)})
    assert len(table.tables[0]) == 3
    for b in range(3):
        table.release(b)
    assert sorted(table.free) == list(range(10)) and not any(table.users)


def test_what_a_cache_says():
    sequences = Sequences(F64, 40, separate=True)
    cache = sequences.cache()
    assert "contiguous, batch_size=2, capacity=40" in repr(cache)
    assert (
        cache.nbytes
        == sum(pool.numel() * 8 for pool in cache._storage.pools.values())
        + 2 * (CONFIG.block_size + 64) * 2 * 16 * 8
    )
    assert cache.pages("k").shape == (10, 8, 2, 10) and cache.pages("v_cmp").shape == (10, 2, 2, 6)
    assert sequences.cache(num_pages=3).pages("v_win").shape == (3, 8, 2, 6)
    assert cache.positions(3).tolist() == [[0, 1, 2], [0, 1, 2]]
    sequences.step(cache, 0, 5)
    assert cache.positions(3, [1, 3]).tolist() == [[3, 4, 5], [5, 6, 7]]
    assert nsa_ext.NSACache(1, 1, 1, 8).pages("k_win") is None
