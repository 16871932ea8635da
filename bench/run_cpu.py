"""The whole NSA operator on the CPU against torch's dense causal attention.

Times forward and forward+backward over a range of lengths (B=1, Hq=8, Hkv=2, D=64, float32, the
default NSAConfig, compression by mean pooling included), and measures the peak extra memory of a
forward+backward in a process of its own. Writes bench/results/cpu.json and prints a table.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, environment, measure, print_table, write_results

import nsa_ext

BATCH, HEADS, KV_HEADS, HEAD_DIM = 1, 8, 2, 64
IMPLEMENTATIONS = ("nsa", "dense")


def make_inputs(seqlen: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, seqlen, *shape, generator=generator).requires_grad_()

    return {
        "q": normal(HEADS, HEAD_DIM),
        "k": normal(KV_HEADS, HEAD_DIM),
        "v": normal(KV_HEADS, HEAD_DIM),
        "gates": normal(HEADS, 3),
    }


def attention(name: str) -> Callable[..., torch.Tensor]:
    """(q, k, v, gates) -> out, the gates unused by the dense one."""
    if name == "nsa":
        compress = nsa_ext.KVCompressor(HEAD_DIM, kind="mean")
        return lambda q, k, v, gates: nsa_ext.sparse_attn(q, k, v, gates, compress)

    def dense(q, k, v, gates):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return dense


def time_passes(name: str, seqlen: int, args: argparse.Namespace) -> dict[str, dict]:
    inputs, run = make_inputs(seqlen), attention(name)
    leaves = [x for key, x in inputs.items() if name == "nsa" or key != "gates"]
    dout = torch.randn_like(inputs["q"])

    @torch.no_grad()
    def forward() -> None:
        run(**inputs)

    def both() -> None:
        torch.autograd.grad(run(**inputs), leaves, dout)

    limits = {"repeats": args.repeats, "max_seconds": args.max_seconds}
    passes = {"forward": forward, "forward+backward": both}
    return {key: measure(call, **limits).fields() for key, call in passes.items()}


def memory_of(name: str, seqlen: int) -> dict[str, int]:
    """Peak extra memory of a forward+backward, measured in a fresh process."""
    child = [sys.executable, __file__, "--memory-of", name, str(seqlen)]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure_memory(name: str, seqlen: int) -> dict[str, int]:
    """Peak resident memory of a forward+backward above what was resident with its inputs.

    The results (output, gradients) are part of the extra, as is whatever is kept between the
    passes. A short call beforehand loads libraries and starts the thread pool.
    """

    def forward_backward(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        out = run(**inputs)
        leaves = [x for key, x in inputs.items() if name == "nsa" or key != "gates"]
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    run = attention(name)
    forward_backward(make_inputs(256))
    inputs = make_inputs(seqlen)
    resident = _status_bytes("VmRSS")
    results = forward_backward(inputs)
    return {
        "input_bytes": sum(x.nbytes for x in inputs.values()),
        "result_bytes": sum(x.nbytes for x in results),
        "extra_bytes": _status_bytes("VmHWM") - resident,
    }


def _status_bytes(field: str) -> int:
    """A size in /proc/self/status (Linux). VmHWM, unlike ru_maxrss, starts anew at exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def benchmark(args: argparse.Namespace) -> list[dict]:
    rows = []
    previous: dict[tuple[str, str], tuple[int, float]] = {}
    for seqlen in sorted(args.lengths):
        for name in IMPLEMENTATIONS:
            if name == "dense" and seqlen > args.dense_max:
                continue
            memory = memory_of(name, seqlen) if sys.platform == "linux" else {}
            for key, timing in time_passes(name, seqlen, args).items():
                before = previous.get((name, key))
                doubled = before is not None and before[0] * 2 == seqlen
                row = {"what": "operator", "impl": name, "pass": key, "seqlen": seqlen, **timing}
                row["times_half_length"] = (
                    round(timing["median_ms"] / before[1], 3) if doubled else None
                )
                previous[name, key] = (seqlen, timing["median_ms"])
                rows.append(row | (memory if key == "forward+backward" else {}))
                print(f"{name} {seqlen} {key}: {timing['median_ms']:.1f} ms", file=sys.stderr)
    return rows


def show(rows: list[dict]) -> None:
    medians = {(r["impl"], r["seqlen"], r["pass"]): r["median_ms"] for r in rows}
    table = []
    for r in rows:
        dense = medians.get(("dense", r["seqlen"], r["pass"]))
        extra = r.get("extra_bytes")
        table.append(
            [
                r["seqlen"],
                r["impl"],
                r["pass"],
                r["median_ms"],
                f"{r['min_ms']:.1f}-{r['max_ms']:.1f}",
                r["repeats"],
                r["times_half_length"],
                dense / r["median_ms"] if dense and r["impl"] == "nsa" else None,
                extra / 2**20 if extra is not None else None,
                extra / (r["input_bytes"] + r["result_bytes"]) if extra is not None else None,
            ]
        )
    columns = ["length", "attention", "pass", "median ms", "min-max ms", "repeats"]
    columns += ["x half length", "speed-up", "extra MiB", "extra / (in + out)"]
    print_table(columns, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    lengths = [1024 << i for i in range(7)]
    add("--lengths", type=int, nargs="+", default=lengths, help="default: 1k to 64k")
    add("--dense-max", type=int, default=16384, help="longest dense run; default: %(default)s")
    add("--repeats", type=int, default=7, help="timed calls of each; default: %(default)s")
    add("--max-seconds", type=float, default=30, help="time for the repeats; default: %(default)s")
    add("--threads", type=int, help="default: torch's choice")
    add("--out", type=Path, default=RESULTS / "cpu.json", help="default: bench/results/cpu.json")
    add("--memory-of", nargs=2, metavar=("ATTENTION", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of[0], int(args.memory_of[1]))))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    where = environment()
    rows = benchmark(args)
    write_results(args.out, rows, where)
    show(rows)


if __name__ == "__main__":
    main()
