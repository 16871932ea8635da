"""Decoding for bench/run.py: one new token of every sequence over a cache, operator and layer.

A step is captured as a CUDA graph and replayed. With L2 "cold" the graph finds other data in L2, as
it does in a model with more than one layer.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from attentions import SDPA, backend_of
from layers import make_layer
from torch.nn.attention import sdpa_kernel

import nsa_ext

CHUNK = 65536  # tokens that are stored at a time when a cache is filled
ROOM = 256  # tokens that the steps may append
# Cycles that a replay waits for on the device, so that the host's time is no part of it: about
# 100 us on an H100.
HEAD_START = 200_000

Step = Callable[[], object]


def normal(*shape: int, device: str = "cuda") -> torch.Tensor:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.randn(*shape, device=device, dtype=dtype)


def fill(cache: nsa_ext.NSACache, compress: Callable, length: int) -> None:
    """Stores `length` random tokens in every sequence."""
    chunk = max(1024, CHUNK // cache.batch_size)
    for begin in range(0, length, chunk):
        rows = (cache.batch_size, min(chunk, length - begin), cache.num_kv_heads)
        device = cache.device.type
        pairs = [
            [normal(*rows, dim, device=device) for dim in (cache.head_dim, cache.head_dim_v)]
            for _ in range(2 if cache.separate_kv else 1)
        ]
        window = dict(zip(("k_win", "v_win"), pairs[1], strict=True)) if len(pairs) > 1 else {}
        cache.append(*pairs[0], compress, **window)


def nsa_operator(
    batch: int, length: int, heads: int, kv_heads: int, dims: tuple[int, int], device: str = "cuda"
) -> tuple[Step, Step, nsa_ext.NSACache]:
    """Attention of one token over `length` tokens; the same with the new token stored before."""
    dim, dim_v = dims
    q, gates = (
        normal(batch, 1, heads, dim, device=device),
        normal(batch, 1, heads, 3, device=device),
    )
    gates = gates.sigmoid()
    cache = nsa_ext.NSACache(
        batch, length + ROOM, kv_heads, dim, dim_v, growable=False, device=device, dtype=q.dtype
    )
    compress = nsa_ext.KVCompressor(dim, dim_v, kind="mean")
    fill(cache, compress, length)
    k, v = (normal(batch, 1, kv_heads, d, device=device) for d in dims)

    def attend() -> torch.Tensor:
        return nsa_ext.sparse_attn_with_kvcache(q, cache, gates)

    def store_and_attend() -> torch.Tensor:
        return nsa_ext.sparse_attn_with_kvcache(q, cache, gates, k=k, v=v, compress=compress)

    return attend, store_and_attend, cache


def dense_operator(
    name: str, batch: int, length: int, heads: int, kv_heads: int, dims: tuple[int, int]
) -> Step:
    q = normal(batch, 1, heads, dims[0]).transpose(1, 2)
    k, v = (normal(batch, length, kv_heads, dim).transpose(1, 2) for dim in dims)

    def attend() -> torch.Tensor:
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attend


def layer_step(
    name: str, batch: int, length: int, layer: Callable, dim: int
) -> tuple[Step, object]:
    """One token through a layer whose cache holds `length` tokens; and the cache of NSA."""
    x = normal(batch, 1, dim)
    if not name.startswith("nsa"):
        k, v = (normal(batch, length, layer.kv_heads, layer.head_dim) for _ in range(2))
        return (lambda: layer.step(x, k, v)), None
    cache = layer.new_cache(batch, length + ROOM, growable=False)
    fill(cache, layer.compress, length)
    return (lambda: layer(x, cache=cache)), cache


@torch.no_grad()
def replayed(step: Step) -> Step:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Preparation:
    """What happens before a replay and is not timed: room in the cache, what L2 holds, a head start
    of the host."""

    def __init__(self):
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.other = torch.zeros(l2 // 2, dtype=torch.float32, device="cuda")  # twice its size

    def before(self, l2: str, cache: nsa_ext.NSACache | None) -> Step:
        def prepare() -> None:
            if cache is not None:
                cache.make_room(1)
            if l2 == "cold":
                self.other.sum()
            torch.cuda._sleep(HEAD_START)

        return prepare


def bytes_read(
    batch: int, length: int, kv_heads: int, dims: tuple[int, int], sparse: bool, element: int = 2
) -> int:
    """K and V that a step has to read."""
    config = nsa_ext.NSAConfig()
    rows = length
    if sparse:
        selected = min(length, config.num_selected * config.select_size)
        rows = config.num_compressed(length) + selected + min(length, config.window)
    return batch * rows * kv_heads * sum(dims) * element


class Decoding:
    """Measures steps into the rows of a Meter (bench/run.py)."""

    def __init__(self, meter, args):
        self.meter, self.args = meter, args
        self.preparation = Preparation()
        self.dims = (args.head_dim, args.head_dim_v)
        self.sizes = (args.heads, args.kv_heads, self.dims)

    def add(self, row: dict, step: Step, cache: nsa_ext.NSACache | None) -> None:
        """A row for each state of L2. `cache`: the one that the step appends to, or None."""
        args = self.args
        row |= {"inputs": "random", "heads": args.heads, "kv_heads": args.kv_heads}
        row |= {"head_dim": self.dims[0], "head_dim_v": self.dims[1], "dtype": "bfloat16"}
        graph = replayed(step)
        for l2 in ("warm", "cold"):
            timing = self.meter.time(graph, before=self.preparation.before(l2, cache))
            rate = {}
            if row["what"] == "decode":
                sparse = row["impl"] not in SDPA
                read = bytes_read(row["batch"], row["seqlen"], args.kv_heads, self.dims, sparse)
                rate = {"tbps": round(read / timing.median / 1e9, 4)}
            self.meter.add({**row, "l2": l2}, **timing.fields(), **rate)

    def operator(self, name: str, batch: int, length: int) -> None:
        row = {"what": "decode", "impl": name, "pass": "decode", "batch": batch, "seqlen": length}
        if name in SDPA:
            self.add(row, dense_operator(name, batch, length, *self.sizes), None)
            return
        attend, store_and_attend, cache = nsa_operator(batch, length, *self.sizes)
        self.add(row, attend, None)
        self.add({**row, "pass": "store+decode"}, store_and_attend, cache)

    def layer(self, name: str, batch: int, length: int) -> None:
        args = self.args
        layer = make_layer(
            name, args.layer_dim, args.heads, args.kv_heads, args.head_dim, args.layer_compress
        )
        step, cache = layer_step(name, batch, length, layer, args.layer_dim)
        row = {"what": "layer", "impl": name, "pass": "decode", "batch": batch, "seqlen": length}
        self.add({**row, "dim": args.layer_dim}, step, cache)


@torch.no_grad()
def run_decode(meter, args) -> None:
    """Rows of the operator (what "decode") and of the layer ("layer", pass "decode")."""
    decoding = Decoding(meter, args)
    for measure_one in (decoding.operator, decoding.layer):
        for batch, length, name in itertools.product(args.batches, args.lengths, args.impl):
            if name == "fla" or (name in SDPA and length > args.dense_max):
                continue
            try:
                with backend_of(name):
                    measure_one(name, batch, length)
            except RuntimeError as error:
                # Not every torch has every dense kernel for a single query.
                if name not in SDPA or "No available kernel" not in str(error):
                    raise
                print(f"{name}: no kernel for batch {batch}, {length} tokens", flush=True)
            meter.release()
