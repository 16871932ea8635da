"""The KV cache on a GPU: CUDA graphs, no wait for the device, phi in one operator."""

import contextlib
import functools

import pytest
import torch
from cache_helpers import Sequences
from helpers import CUDA_BACKENDS, assert_same_bits
from test_compress import KINDS

from nsa_ext import NSAConfig, sparse_attn_with_kvcache

pytestmark = pytest.mark.gpu
BF16 = CUDA_BACKENDS[0]
layouts = pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])


@pytest.fixture(autouse=True)
def on_cuda():
    with BF16.active():
        yield


@contextlib.contextmanager
def no_sync():
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def make(paged, seqlen=500, **options):
    sequences = Sequences(BF16, seqlen, batch=3, **options)
    pages = 3 * sequences.config.num_select_blocks(seqlen)
    return sequences, sequences.cache(**({"num_pages": pages} if paged else {"growable": False}))


class Graph:
    """One step of `tokens` tokens, captured once, fed by copies into its inputs."""

    def __init__(self, sequences, cache, tokens):
        self.sequences, self.cache, self.tokens = sequences, cache, tokens
        q, gates, new = sequences.rows(0, tokens)
        compress = new.pop("compress")
        self.inputs = {name: x.clone() for name, x in {"q": q, "gates": gates, **new}.items()}

        def step():
            x = dict(self.inputs)
            return sparse_attn_with_kvcache(
                x.pop("q"), cache, x.pop("gates"), **x, compress=compress, return_selection=True
            )

        scratch = sequences.cache()  # warms up without touching the cache
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            x = dict(self.inputs)
            sparse_attn_with_kvcache(x.pop("q"), scratch, x.pop("gates"), **x, compress=compress)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out, self.blocks = step()

    def replay(self, begin):
        q, gates, new = self.sequences.rows(begin, begin + self.tokens)
        new.pop("compress")
        for name, x in {"q": q, "gates": gates, **new}.items():
            self.inputs[name].copy_(x)
        self.cache.make_room(self.tokens)
        self.graph.replay()
        return self.out.clone(), self.blocks.clone()


@layouts
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_graph_is_captured_once_and_replayed_while_lengths_grow(tokens, paged):
    sequences, cache = make(paged, separate=tokens == 1)
    _, eager = make(paged, separate=tokens == 1)
    begin = sequences.seqlen - 150
    results = [sequences.step(cache, 0, begin)]
    sequences.step(eager, 0, begin)
    cache.reserve(sequences.seqlen)
    graph = Graph(sequences, cache, tokens)
    assert cache.sync() == cache.max_seqlens == [begin] * 3
    for i in range(begin, sequences.seqlen, tokens):
        results.append(graph.replay(i))
        expected, blocks = sequences.step(eager, i, i + tokens)
        assert_same_bits(results[-1][0], expected)
        assert torch.equal(results[-1][1], blocks)
    out, blocks = (torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
    assert cache.sync() == cache.max_seqlens == [sequences.seqlen] * 3
    sequences.check(cache, out, blocks, sequences.seqlen)
    with pytest.raises(ValueError, match="max_seqlen: expected at most"):
        cache.make_room(cache.capacity)


@layouts
@pytest.mark.parametrize("kind", ["mean", "mlp"])
def test_steps_that_overlap(kind, paged):
    """Kernels of a step start before those of the last one end, in a graph and out of it: the bits
    of steps that wait for each other. Between steps stands nothing, a copy, or another stream."""
    sequences, cache = make(paged, kind=kind)
    begin, steps = 300, 40
    inputs = [sequences.rows(i, i + 1) for i in range(begin, begin + steps)]
    buffer = inputs[0][0].clone()
    side = torch.cuda.Stream()

    def run(wait=False):
        outs = []
        for i, (q, gates, new) in enumerate(inputs):
            if i % 4 == 1:
                q = buffer.copy_(q.contiguous())
            elif i % 4 == 2:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    gates = gates * 1
                torch.cuda.current_stream().wait_stream(side)
            outs.append(sparse_attn_with_kvcache(q, cache, gates, **new))
            if wait:
                torch.cuda.synchronize()
        return torch.cat(outs, dim=1)

    sequences.step(cache, 0, begin)
    cache.reserve(sequences.seqlen)
    expected = run(wait=True)
    assert cache.sync() == [begin + steps] * 3
    for _ in range(3):
        cache.truncate(begin)
        assert_same_bits(run(), expected)
    cache.truncate(begin)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        cache.truncate(begin)
        cache.make_room(steps)
        graph.replay()
        assert_same_bits(out, expected)
    assert cache.sync() == [begin + steps] * 3


def test_a_paged_cache_takes_its_pages_outside_of_the_graph():
    sequences, cache = make(True, 300)
    results = [sequences.step(cache, 0, 64)]
    with pytest.raises(ValueError, match="call `reserve` first"):
        Graph(sequences, cache, 1)
    torch.cuda.synchronize()
    cache.reserve(65)
    graph = Graph(sequences, cache, 1)
    with no_sync():
        results += [graph.replay(i) for i in range(64, 300)]
    out, blocks = (torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
    sequences.check(cache, out, blocks, 300)


def test_a_captured_cache_does_not_grow():
    sequences = Sequences(BF16, 200, batch=3)
    cache = sequences.cache(64)
    sequences.step(cache, 0, 60)
    Graph(sequences, cache, 1)
    with pytest.raises(ValueError, match="a cache in a CUDA graph does not grow"):
        sequences.step(cache, 60, 70)
    assert cache.sync() == [60] * 3


@layouts
def test_replays_past_the_end_change_nothing(paged):
    """Without make_room the host does not know; the device drops what has no room."""
    sequences = Sequences(BF16, 64, batch=3)
    cache = sequences.cache(**({"num_pages": 3} if paged else {"growable": False}))
    sequences.step(cache, 0, 62)
    graph = Graph(sequences, cache, 1)
    for _ in range(2):
        graph.graph.replay()
    full = {name: pool.clone() for name, pool in cache._storage.pools.items()}
    for _ in range(3):
        graph.graph.replay()
    assert cache.seqlens.tolist() == [64] * 3
    for name, pool in full.items():
        assert torch.equal(pool, cache._storage.pools[name])
    with pytest.raises(RuntimeError, match=r"found no room .*\[3, 3, 3\]"):
        cache.sync()


@layouts
def test_no_call_waits_for_the_device(paged):
    sequences, cache = make(paged)
    counts = torch.tensor([3, 0, 7], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([390, 391, 400], dtype=torch.int32, device="cuda")
    index = torch.tensor([2, 0, 1], device="cuda")
    sequences.step(cache, 0, 1)  # loads the kernels
    torch.cuda.synchronize()
    with no_sync():
        q, gates, new = sequences.rows(1, 301)
        sparse_attn_with_kvcache(q, cache, gates, **new)
        for begin, end in ((301, 302), (302, 306), (306, 400)):
            q, gates, new = sequences.rows(begin, end)
            sparse_attn_with_kvcache(q, cache, gates, **new)
        q, gates, new = sequences.rows(400, 407)
        sparse_attn_with_kvcache(q, cache, gates, **new, counts=counts)
        sparse_attn_with_kvcache(q, cache, gates, **new, counts=[1, 0, 2])
        cache.truncate(lengths)
        cache.truncate(395)
        if not paged:
            cache.reorder(index)
        cache.reorder([1, 1, 0])
        cache[1:2].reset()
    expected = [390, 0, 395] if not paged else [391, 0, 390]
    assert cache.sync() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_head", [False, True])
def test_phi_of_a_step_is_phi(kind, per_head):
    """cache_store_mlp and _pool against the compressor itself, which another callable hides."""
    for config in (NSAConfig(), NSAConfig(64, 32, 64)):
        sequences = Sequences(
            BF16, 400, batch=3, kind=kind, per_head=per_head, config=config, dims=(192, 128)
        )
        cache, plain = sequences.cache(), sequences.cache()
        compress = sequences.compress
        for begin, end in [
            (0, 200),
            *((i, i + 1) for i in range(200, 300)),
            (300, 313),
            (313, 329),
            (329, 371),
        ]:
            sequences.compress = compress
            sequences.step(cache, begin, end)
            sequences.compress = functools.partial(compress)
            sequences.step(plain, begin, end)
        assert cache.sync() == plain.sync() == [371] * 3
        count = config.num_compressed(371)
        for name in ("k_cmp", "v_cmp"):
            for b in range(3):
                ours = sequences.stored(cache, name, b, count).float()
                theirs = sequences.stored(plain, name, b, count).float()
                torch.testing.assert_close(ours, theirs, rtol=1.6e-2, atol=1e-3)
        for name in ("k", "v"):
            for b in range(3):
                ours, theirs = (sequences.stored(x, name, b, 371) for x in (cache, plain))
                assert torch.equal(ours, theirs), name
        for name in ("tail_k", "tail_v", "state"):
            ours, theirs = (getattr(x._storage, name) for x in (cache, plain))
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", ["mlp", "weighted"])
def test_a_lost_tail_is_nan_in_a_step_too(kind):
    sequences = Sequences(BF16, 300, batch=3, kind=kind)
    cache = sequences.cache(max_rollback=0)
    sequences.step(cache, 0, 200)
    cache.truncate(torch.tensor([200, 110, 200], dtype=torch.int32, device="cuda"))
    for i in range(200, 240):
        out, _ = sequences.step(cache, i, i + 1)
    assert torch.isfinite(out[0]).all() and torch.isfinite(out[2]).all()
    assert out[1].isnan().any()
