"""The whole operator on a GPU against dense causal attention: forward, backward, peak extra memory.

Timed is everything from q, k, v and gates to the output (or the gradients), compression included.
Backward is (forward+backward) - forward. Baselines in the same process: torch's
scaled_dot_product_attention on cuDNN and on FlashAttention-2, and flash-linear-attention's
parallel_nsa where it is installed. Inputs: random normals, or coherent ones, where the queries of a
head are a slow random walk (AR(1)), so that neighbouring queries select mostly the same blocks.
Writes a result file and prints a table.
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, environment, measure, print_table, write_results
from inputs import make_inputs, shared_fraction
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_ext

# Neighbours then share about 3/4 of their unforced blocks at 65536 tokens (each row has its share).
COHERENT_RHO = 0.975


def dense(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def run(q, k, v, gates):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return run


def nsa(args: argparse.Namespace) -> Callable[..., torch.Tensor]:
    compress = nsa_ext.KVCompressor(
        args.head_dim, args.head_dim_v, kind=args.compress, device="cuda", dtype=torch.bfloat16
    )

    def run(q, k, v, gates):
        return nsa_ext.sparse_attn(q, k, v, gates, compress, deterministic=args.deterministic)

    return run


def fla(args: argparse.Namespace) -> Callable[..., torch.Tensor]:
    """Its compression blocks are its selection blocks: l = d = l' = 64."""
    from fla.ops.nsa import parallel_nsa

    def run(q, k, v, gates):
        g_cmp, g_slc, g_win = gates.unbind(-1)
        return parallel_nsa(
            q,
            k,
            v,
            g_cmp=g_cmp,
            g_slc=g_slc,
            g_swa=g_win,
            block_count=16,
            block_size=64,
            window_size=512,
        )

    return run


def implementation(name: str, args: argparse.Namespace) -> Callable[..., torch.Tensor]:
    if name.startswith("nsa"):
        return nsa(args)
    if name == "fla":
        return fla(args)
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
    return dense(backends[name])


def time_one(run: Callable[..., torch.Tensor], inputs: tuple, args: argparse.Namespace) -> dict:
    """Rows' fields of one implementation on one input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    limits = {
        "device": "cuda",
        "warmup": 2,
        "repeats": args.repeats,
        "max_seconds": args.max_seconds,
    }

    @torch.no_grad()
    def forward() -> None:
        run(*inputs)

    out = run(*leaves)
    used = [x for x in leaves if x.requires_grad]
    dout = torch.randn_like(out)
    del out

    def both() -> None:
        torch.autograd.grad(run(*leaves), used, dout, allow_unused=True)

    forward_time = measure(forward, **limits)
    both_time = measure(both, **limits)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    return {
        "forward": forward_time.fields(),
        "forward+backward": both_time.fields(),
        "backward_ms": round(both_time.median - forward_time.median, 4),
        "peak_extra_gb": round((torch.cuda.max_memory_allocated() - before) / 1e9, 3),
    }


def share_of_neighbours(inputs: tuple, args: argparse.Namespace) -> float:
    """Share of unforced blocks that a query has in common with its predecessor."""
    compress = nsa_ext.KVCompressor(args.head_dim, args.head_dim_v, kind="mean")
    config = compress.config
    with torch.no_grad():
        _, blocks = nsa_ext.sparse_attn(*inputs, compress, return_selection=True)
    return round(shared_fraction(blocks, config.select_size, config.num_init + config.num_local), 3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument(
        "--impl",
        nargs="+",
        default=["nsa", "cudnn", "flash2"],
        help="nsa, nsa-sm80, nsa-sm90, cudnn, flash2, fla",
    )
    parser.add_argument(
        "--inputs", nargs="+", choices=["random", "coherent"], default=["random", "coherent"]
    )
    parser.add_argument("--heads", type=int, default=64, help="Hq")
    parser.add_argument("--kv-heads", type=int, default=4, help="Hkv")
    parser.add_argument("--head-dim", type=int, default=128, help="Dk")
    parser.add_argument("--head-dim-v", type=int, default=None, help="Dv, default Dk")
    parser.add_argument("--compress", default="mean", choices=["mean", "weighted", "linear", "mlp"])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--max-seconds", type=float, default=10.0, help="per implementation and pass"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    args.head_dim_v = args.head_dim_v or args.head_dim
    return args


def main() -> None:
    args = parse()
    rows, table = [], []
    for seqlen in args.lengths:
        flash = None
        for kind in args.inputs:
            inputs = make_inputs(
                1, seqlen, args.heads, args.kv_heads, args.head_dim, args.head_dim_v,
                rho=COHERENT_RHO if kind == "coherent" else 0.0,
            )  # fmt: skip
            share = share_of_neighbours(inputs, args)
            for name in sorted(args.impl, key=lambda name: name != "flash2"):
                if kind == "coherent" and name in ("cudnn", "flash2"):
                    continue  # dense attention does not depend on it: the random row serves both
                with nsa_ext.cuda_backend(name.partition("-")[2] or "auto"):
                    result = time_one(implementation(name, args), inputs, args)
                rows.append(
                    {
                        "seqlen": seqlen,
                        "inputs": kind,
                        "impl": name,
                        "neighbours_share": share,
                        **result,
                    }
                )
                forward, backward = result["forward"]["median_ms"], result["backward_ms"]
                if name == "flash2":
                    flash = forward, backward
                ratio = (
                    [base / ours for base, ours in zip(flash, (forward, backward), strict=True)]
                    if flash
                    else [None] * 2
                )
                table.append(
                    [seqlen, kind, name, forward, backward, *ratio, result["peak_extra_gb"], share]
                )
                print(table[-1], flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    shape = {
        "batch": 1,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "head_dim_v": args.head_dim_v,
        "dtype": "bfloat16",
        "compress": args.compress,
    }
    write_results(args.output, rows, {**environment("cuda"), "shape": shape})
    print_table(
        ["S", "inputs", "impl", "fwd ms", "bwd ms", "fwd x FA2", "bwd x FA2", "extra GB", "share"],
        table,
    )


if __name__ == "__main__":
    main()
