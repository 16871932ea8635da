"""The operators of the KV cache, and their errors: bad arguments of the Python functions, and of
torch.ops directly."""

import pytest
import torch
from cache_helpers import Sequences
from helpers import CUDA_BACKENDS, Backend, backend_params
from test_compress import KINDS

import nsa_ext
from nsa_ext import KVCompressor, NSAAttention, NSACache, NSAConfig, sparse_attn_with_kvcache

ops = torch.ops.nsa_ext
F32 = Backend("cpu", torch.float32)
devices = pytest.mark.parametrize("backend", backend_params([F32, CUDA_BACKENDS[0]]), indirect=True)


# opcheck: schema (which arguments change), fake kernel, dispatch.


def gather_arguments(sequences, cache, begin, end, counts=None):
    new = sequences.rows(begin, end)[2]
    storage = cache._storage
    return (
        new["k"], new["v"], storage.tail_k, storage.tail_v, storage.state, counts,
        cache.block_table, cache.pages("k").shape[0], cache.config.as_list(),
    )  # fmt: skip


def target_arguments(cache):
    """What an append changes."""
    pools = [cache.pages(name) for name in ("k", "v", "k_win", "v_win", "k_cmp", "v_cmp")]
    return (cache._storage.state, *pools, cache._storage.tail_k, cache._storage.tail_v)


def fresh_arguments(sequences, begin, end):
    new = sequences.rows(begin, end)[2]
    raw = (new.get("k_cmp", new["k"]), new.get("v_cmp", new["v"]))
    return (new["k"], new["v"], new.get("k_win"), new.get("v_win"), *raw)


def make(backend, *, paged=False, separate=False, rope=False, begin=50):
    sequences = Sequences(backend, 150, separate=separate)
    options = {"num_pages": 300} if paged else {}
    if rope:
        options["rope_inv_freq"] = torch.rand(sequences.dims[0] // 2)
    cache = sequences.cache(**options)
    sequences.step(cache, 0, begin)
    cache.reserve(150)
    return sequences, cache


layouts = pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])


@layouts
@devices
@pytest.mark.parametrize("tokens", [1, 37])
def test_opcheck_cache_gather(tokens, backend, paged):
    sequences, cache = make(backend, paged=paged)
    counts = torch.tensor([1, 0], dtype=torch.int32, device=backend.device) if paged else None
    arguments = gather_arguments(sequences, cache, 50, 50 + tokens, counts)
    torch.library.opcheck(ops.cache_gather.default, arguments)


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_cache_store(kind, paged):
    backend = CUDA_BACKENDS[0]
    with backend.active():
        sequences, cache = make(backend, paged=paged, separate=paged, rope=not paged)
        compress = KVCompressor(
            64, kind=kind, config=cache.config, device="cuda", dtype=cache.dtype
        )
        name, part = "mlp", slice(1, 6)
        if kind in ("mean", "weighted"):
            name, part = "pool", slice(0, 2)
        phis = (compress.phi_k, compress.phi_v)
        weights = [w for phi in phis for w in phi.cast_weights(cache.dtype)[part]]
        weights = [None if w is None else w.detach() for w in weights]
        arguments = (
            *target_arguments(cache), *fresh_arguments(sequences, 50, 51), None, cache.block_table,
            cache.rope_inv_freq, cache.config.as_list(), *weights,
        )  # fmt: skip
        torch.library.opcheck(getattr(ops, f"cache_store_{name}").default, arguments)


@layouts
@devices
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_opcheck_cache_append(tokens, separate, backend, paged):
    sequences, cache = make(backend, paged=paged, separate=separate, rope=not paged)
    fresh = fresh_arguments(sequences, 50, 50 + tokens)
    rows = ops.cache_gather(*fresh[4:], *gather_arguments(sequences, cache, 50, 50 + tokens)[2:])
    with torch.no_grad():
        compressed = sequences.compress(*rows[:2])
    arguments = (
        *target_arguments(cache), rows[2], *fresh, *compressed, cache.block_table,
        cache.rope_inv_freq, cache.config.as_list(),
    )  # fmt: skip
    torch.library.opcheck(ops.cache_append.default, arguments)


@layouts
@devices
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_opcheck_decode(separate, backend, paged):
    sequences, cache = make(backend, paged=paged, separate=separate, begin=99)
    q, gates, _ = sequences.rows(97, 99)
    pools = [cache.pages(name) for name in ("k_cmp", "v_cmp", "k", "v", "k_win", "v_win")]
    arguments = (
        q, *pools, gates, cache.seqlens, cache.block_table, cache.config.as_list(), 0.3,
    )  # fmt: skip
    torch.library.opcheck(ops.decode_fwd.default, arguments)


def test_the_operators_check_for_themselves():
    sequences, cache = make(F32, paged=True)
    arguments = list(gather_arguments(sequences, cache, 50, 51))
    for position, value, message in [
        (1, arguments[1][:1], "v must have shape"),
        (2, arguments[2][:, :3], "tail_v must have shape"),
        (4, torch.zeros(2, 2, dtype=torch.int32), "state must have shape"),
        (5, torch.zeros(3, dtype=torch.int32), "counts must have shape"),
        (6, torch.zeros(1, 4, dtype=torch.int32), "block_table must have shape"),
        (8, [8, 3, 8, 4, 1, 2, 19], "block_stride must divide block_size"),
    ]:
        changed = [*arguments[:position], value, *arguments[position + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            ops.cache_gather(*changed)
    short = [x[:, :7] for x in arguments[2:4]]
    with pytest.raises(RuntimeError, match="the tail must hold 8 tokens, got 7"):
        ops.cache_gather(*arguments[:2], *short, *arguments[4:])
    with pytest.raises(RuntimeError, match="a multiple of the 2 sequences"):
        ops.cache_gather(*arguments[:6], None, 5, arguments[8])

    q, gates, _ = sequences.rows(49, 50)
    pools = [cache.pages(name) for name in ("k_cmp", "v_cmp", "k", "v", "k_win", "v_win")]
    rest = (cache.config.as_list(), 0.3)
    table = cache.block_table.clone()
    table[1, 6] = 300
    with pytest.raises(RuntimeError, match="sequence 1 has page 300 of 300"):
        ops.decode_fwd(q, *pools, gates, cache.seqlens, table, *rest)
    with pytest.raises(RuntimeError, match="sequence 0 exceeds the capacity"):
        ops.decode_fwd(q, *pools, gates, cache.seqlens + 5000, table, *rest)
    with pytest.raises(RuntimeError, match="k_win_pages and v_win_pages go together"):
        ops.decode_fwd(q, *pools[:5], pools[3], gates, cache.seqlens, table, *rest)


# Errors of the public functions.

CONFIG = NSAConfig(8, 4, 8, num_selected=4, window=19)


def new_cache(**options):
    return NSACache(2, 40, 2, 10, 6, **{"config": CONFIG, **options})


NEW_ERRORS = {
    "config": ({"config": 3}, TypeError, "config: expected an NSAConfig, got int"),
    "max_rollback": ({"max_rollback": -1}, ValueError, "max_rollback: expected an int of at"),
    "num_pages": ({"num_pages": 0}, ValueError, "num_pages: expected an int of at least 1, got 0"),
    "pages of a table": (
        {"block_table": torch.zeros(2, 5, dtype=torch.int32)}, ValueError,
        "num_pages: expected an int with block_table, got None",
    ),
    "shape of a table": (
        {"block_table": torch.zeros(2, 4, dtype=torch.int32), "num_pages": 10}, ValueError,
        r"block_table: expected shape \(B=2, pages=5\), got \(2, 4\)",
    ),
    "dtype of a table": (
        {"block_table": torch.zeros(2, 5), "num_pages": 10}, TypeError,
        "block_table: expected dtype torch.int32, got torch.float32",
    ),
    "strides of a table": (
        {"block_table": torch.zeros(2, 10, dtype=torch.int32)[:, :5], "num_pages": 10}, ValueError,
        "block_table: expected a contiguous tensor",
    ),
    "rope": (
        {"rope_inv_freq": torch.ones(4)}, ValueError,
        r"rope_inv_freq: expected shape \(Dk / 2=5\), got \(4,\)",
    ),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype: expected one of .*, got torch.int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEW_ERRORS)
def test_bad_sizes(name):
    options, kind, message = NEW_ERRORS[name]
    with pytest.raises(kind, match=message):
        new_cache(**options)
    for sizes in ((0, 40, 2, 10), (2, 0, 2, 10), (2, 40, 0, 10), (2, 40, 2, 0)):
        with pytest.raises(ValueError, match="expected an int of at least 1, got 0"):
            NSACache(*sizes)
    with pytest.raises(ValueError, match="head_dim: expected an even number with RoPE, got 9"):
        NSACache(2, 40, 2, 9, rope_inv_freq=torch.ones(4))


def call(**changes):
    """sparse_attn_with_kvcache with some arguments changed."""
    arguments = {
        "q": torch.randn(2, 3, 4, 10),
        "cache": new_cache(),
        "gates": torch.rand(2, 3, 4, 3),
        "k": torch.randn(2, 3, 2, 10),
        "v": torch.randn(2, 3, 2, 6),
        "compress": KVCompressor(10, 6, config=CONFIG),
        **changes,
    }
    return sparse_attn_with_kvcache(**arguments)


# Enough new tokens for a block.
LONG = {
    "q": torch.randn(2, 9, 4, 10),
    "gates": torch.rand(2, 9, 4, 3),
    "k": torch.randn(2, 9, 2, 10),
    "v": torch.randn(2, 9, 2, 6),
}

CALL_ERRORS = {
    "cache": ({"cache": 3}, TypeError, "cache: expected an NSACache, got int"),
    "q": ({"q": None}, TypeError, "q: expected a tensor, got NoneType"),
    "q batch": (
        {"q": torch.randn(1, 3, 4, 10)}, ValueError,
        r"q: expected shape \(B=2, T, Hq, Dk=10\) to fit the cache, got \(1, 3, 4, 10\)",
    ),
    "q dtype": (
        {"q": torch.randn(2, 3, 4, 10).double()}, TypeError,
        "q: expected dtype torch.float32, got torch.float64",
    ),
    "q heads": ({"q": torch.randn(2, 3, 3, 10)}, ValueError, "q: expected a multiple of the 2"),
    "gates": (
        {"gates": torch.rand(2, 3, 4, 2)}, ValueError,
        r"gates: expected shape \(B=2, T=3, Hq=4, branches=3\)",
    ),
    "scale": ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number, got str"),
    "no tensor": ({"k": [1]}, TypeError, "k: expected a tensor, got list"),
    "k alone": ({"v": None}, ValueError, "v: expected a value with k, got None"),
    "no compress": ({"compress": None}, ValueError, "compress: expected a value with k, got None"),
    "rows of k": (
        {"k": torch.randn(2, 2, 2, 10), "v": torch.randn(2, 2, 2, 6)}, ValueError,
        "k: expected the 3 rows of q, got 2",
    ),
    "k": (
        {"k": torch.randn(2, 3, 1, 10)}, ValueError,
        r"k: expected shape \(B=2, T, Hkv=2, D=10\) to fit the cache, got \(2, 3, 1, 10\)",
    ),
    "v": (
        {"v": torch.randn(2, 3, 2, 10)}, ValueError,
        r"v: expected shape \(B=2, T=3, Hkv=2, D=6\) to fit the cache",
    ),
    "k_cmp": (
        {"k_cmp": torch.randn(2, 1, 2, 10)}, ValueError,
        r"k_cmp: expected shape \(B=2, T=3, Hkv=2, D=10\) to fit the cache",
    ),
    "window of a shared pair": (
        {"k_win": torch.randn(2, 3, 2, 10)}, ValueError,
        "k_win: expected None for a cache without separate_kv, got a tensor",
    ),
    "compress": ({"compress": 3}, TypeError, "compress: expected a KVCompressor or a callable"),
    "compress lengths": (
        {"compress": KVCompressor(10, 6)}, ValueError,
        "compress: expected a compressor of block_size=8 as in config, got 32",
    ),
    "compress result": (
        {**LONG, "compress": lambda k, v: (k[:, :3], v[:, :3, :1])}, ValueError,
        r"compress: v_cmp: expected shape \(B=2, Tc=3, Hkv=2, Dv=6\)",
    ),
    "compress pair": (
        {**LONG, "compress": lambda k, v: k}, TypeError, "compress: expected a KVCompressor",
    ),
    "counts": ({"counts": [1]}, ValueError, "counts: expected 2 ints, got 1"),
    "counts too large": ({"counts": [1, 4]}, ValueError, "counts: expected at most the 3 rows"),
    "counts dtype": (
        {"counts": torch.tensor([1, 2])}, TypeError,
        "counts: expected dtype torch.int32, got torch.int64",
    ),
    "negative counts": ({"counts": [1, -1]}, ValueError, "counts: expected an int of at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALL_ERRORS)
def test_bad_arguments(name):
    changes, kind, message = CALL_ERRORS[name]
    cache = changes.get("cache", new_cache())
    with pytest.raises(kind, match=message):
        call(**{"cache": cache, **changes})
    if isinstance(cache, NSACache):
        assert cache.sync() == [0, 0], "an error must leave the cache as it was"


def test_bad_arguments_of_the_methods():
    cache, paged = new_cache(), new_cache(num_pages=10)
    mine = new_cache(num_pages=10, block_table=torch.zeros(2, 5, dtype=torch.int32))
    for function, kind, message in [
        (lambda: cache[0], TypeError, r"cache\[...\]: expected a slice, got int"),
        (lambda: cache[1:1], ValueError, r"cache\[...\]: expected a slice of at least one of 2"),
        (lambda: cache[::2], ValueError, "without a step"),
        (lambda: cache.make_room(-1), ValueError, "tokens: expected an int of at least 0, got -1"),
        (lambda: cache.reserve(2.5), TypeError, "seqlen: expected an int, got float"),
        (lambda: cache.truncate([1]), ValueError, "lengths: expected 2 ints, got 1"),
        (lambda: cache.truncate(-1), ValueError, "lengths: expected an int of at least 0"),
        (lambda: cache.truncate(torch.ones(2)), TypeError, "lengths: expected dtype torch.int32"),
        (lambda: cache.reorder([0, 2]), ValueError, "index: expected ints below 2"),
        (lambda: cache.reorder([0]), ValueError, "index: expected 2 ints, got 1"),
        (lambda: cache.reorder(torch.ones(2)), ValueError, r"index: expected int64 \(2,\)"),
        (lambda: mine.reorder([0, 0]), ValueError, "a cache that keeps its block table itself"),
        (lambda: paged.reserve(41), ValueError, "max_seqlen: expected at most 40 tokens"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            function()


def test_bad_arguments_of_the_layer():
    layer = NSAAttention(20, 4, 2, 8, config=CONFIG)
    x, cache = torch.randn(2, 5, 20), layer.new_cache(2, 40)
    other = NSAAttention(20, 4, 2, 8, config=CONFIG, separate_kv=False, rope_theta=None)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    for arguments, kind, message in [
        ({"cache": 3}, TypeError, "cache: expected an NSACache, got int"),
        ({"counts": [1, 1]}, ValueError, "counts: expected None without a cache"),
        ({"cache": other.new_cache(2, 40)}, ValueError, "cache: expected separate_kv=True"),
        ({"cache": NSAAttention(20, 4, 2, 8).new_cache(2, 40)}, ValueError, "expected config"),
        (
            {"cache": NSACache(2, 40, 2, 8, config=CONFIG, separate_kv=True)}, ValueError,
            "RoPE differs",
        ),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            layer(x, **arguments)
    with pytest.raises(ValueError, match="cu_seqlens: expected None with a cache"):
        layer(x[0], offsets, cache=cache)
    with pytest.raises(ValueError, match="B=2"):
        layer(x[:1], cache=cache)
    assert cache.sync() == [0, 0] and nsa_ext.sparse_attn_with_kvcache is sparse_attn_with_kvcache
