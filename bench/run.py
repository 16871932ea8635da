"""NSA on a GPU against its baselines, in one process: operator, window, layer, decoding.

operator  everything from q, k, v and gates to the output (or the gradients), compression included
layer     NSAAttention, projections and RoPE included, against a dense layer of the same sizes
window    the window branch alone, against torch's flex attention
decode    one new token of every sequence over a cache, replayed as a CUDA graph

Baselines: torch's scaled_dot_product_attention on cuDNN and on FlashAttention-2, and
flash-linear-attention's parallel_nsa where it is installed. Inputs: "random" normals; "coherent"
ones, where the queries of a head are a slow random walk, so that neighbouring queries select mostly
the same blocks; "real" ones, recorded from a trained model (bench/real.py). Dense attention does
not depend on them and is measured once. Backward is (forward+backward) - forward. Writes a result
file and prints a table.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import attentions
import real
import torch
from common import RESULTS, Timing, environment, measure, print_table, write_results
from decode import run_decode
from inputs import make_inputs, shared_fraction
from layers import make_layer

import nsa_ext

DENSE = ("cudnn", "flash2")


class Meter:
    """Times the passes of a differentiable call and collects the rows."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows = args, []
        self.where = {**environment("cuda"), "compress": args.compress}
        self.limits = {
            "device": "cuda",
            "warmup": 2,
            "repeats": args.repeats,
            "max_seconds": args.max_seconds,
        }

    def add(self, row: dict, **values) -> None:
        row = {**row, **values}
        self.rows.append(row)
        # Each time, so that a run that is stopped leaves what it has measured.
        write_results(self.args.output, self.rows, self.where)
        name = " ".join(str(row[key]) for key in ("what", "impl", "inputs", "seqlen", "pass"))
        print(f"{name}: {row['median_ms']} ms", flush=True)

    def passes(
        self, row: dict, call: Callable[..., torch.Tensor], leaves: list, weights: list
    ) -> None:
        """Rows of `call(*leaves)`: forward, forward+backward (with peak memory), backward."""
        leaves = [x.detach().requires_grad_() for x in leaves]

        @torch.no_grad()
        def forward() -> None:
            call(*leaves)

        def both() -> None:
            torch.autograd.grad(call(*leaves), leaves + weights, dout, allow_unused=True)

        with torch.no_grad():
            dout = torch.randn_like(call(*leaves))
        memory = {"forward": _peak_extra_gb(forward), "forward+backward": _peak_extra_gb(both)}
        times = {name: measure(run, **self.limits) for name, run in
                 (("forward", forward), ("forward+backward", both))}  # fmt: skip
        for name, timing in times.items():
            self.add(row, **{"pass": name}, **timing.fields(), peak_extra_gb=memory[name])
        backward = times["forward+backward"].minus(times["forward"])
        self.add(row, **{"pass": "backward"}, **backward.fields())

    def time(self, call: Callable[[], object], before: Callable[[], object]) -> Timing:
        return measure(call, before=before, **self.limits)

    @staticmethod
    def release() -> None:
        """Gives what is no longer used back to the device."""
        gc.collect()
        torch.cuda.empty_cache()


def _peak_extra_gb(call: Callable[[], object]) -> float:
    """Peak of memory during a call above what was held before it; its results count."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)


def names(args: argparse.Namespace, length: int, kind: str) -> Iterator[str]:
    """Which implementations run at a length on a kind of inputs."""
    for name in args.impl:
        if name in DENSE and (kind != args.inputs[0] or length > args.dense_max):
            continue
        if attentions.installed(name):
            yield name


def shape_of(args: argparse.Namespace) -> dict:
    return {
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "head_dim_v": args.head_dim_v,
        "dtype": "bfloat16",
    }


def inputs_of(kind: str, length: int, args: argparse.Namespace) -> attentions.Inputs:
    if kind == "real":
        inputs, _ = real.record(args.model, length, "cuda", args.layer)
        return inputs
    return make_inputs(
        kind, 1, length, args.heads, args.kv_heads, args.head_dim, args.head_dim_v,
        compress=args.compress,
    )  # fmt: skip


def run_operator(meter: Meter, args: argparse.Namespace) -> None:
    for length in args.lengths:
        for kind in args.inputs:
            inputs = inputs_of(kind, length, args)
            share = shared_fraction(attentions.selection_of(inputs), nsa_ext.NSAConfig())
            for name in names(args, length, kind):
                row = {"what": "operator", "impl": name, "inputs": kind, "batch": 1}
                row |= {"seqlen": length, **shape_of(args)}
                if name not in DENSE:
                    row |= {"neighbours_share": round(share, 3), **inputs.notes}
                if name == "fla":
                    row |= {"window": attentions.FLA_WINDOW}
                call = attentions.implementation(name, inputs, args.deterministic)
                weights = list(inputs.compress.parameters()) if name.startswith("nsa") else []
                leaves = inputs.tensors if name.startswith("nsa") else inputs.tensors[:4]
                with attentions.backend_of(name):
                    meter.passes(row, call, leaves, weights)
                meter.release()
            del inputs
            meter.release()


def run_window(meter: Meter, args: argparse.Namespace) -> None:
    size = nsa_ext.NSAConfig().window
    for length in args.lengths:
        inputs = inputs_of("random", length, args)
        for name in ("nsa", "flex"):
            row = {"what": "window", "impl": name, "inputs": "random", "batch": 1}
            call = attentions.window(name, length, size)
            meter.passes({**row, "seqlen": length, **shape_of(args)}, call, inputs.tensors[:3], [])
            meter.release()


def run_layer(meter: Meter, args: argparse.Namespace) -> None:
    for name in args.impl:
        if name == "fla":
            continue
        layer = make_layer(
            name, args.layer_dim, args.heads, args.kv_heads, args.head_dim, args.layer_compress
        )
        for length in args.lengths:
            if name in DENSE and length > args.dense_max:
                continue
            x = torch.randn(1, length, args.layer_dim, device="cuda", dtype=torch.bfloat16)
            row = {"what": "layer", "impl": name, "inputs": "random", "batch": 1}
            row |= {"seqlen": length, **shape_of(args), "dim": args.layer_dim}
            with attentions.backend_of(name):
                meter.passes(row, layer, [x], list(layer.parameters()))
            meter.release()
        del layer
        meter.release()


def show(rows: list[dict]) -> None:
    """A line for each row, with its speed-up over the dense implementations."""

    def key(row: dict) -> tuple:
        return tuple(row.get(name) for name in ("what", "seqlen", "batch", "pass", "l2"))

    dense = {(row["impl"], *key(row)): row["median_ms"] for row in rows if row["impl"] in DENSE}

    def ratio(row: dict, name: str) -> float | None:
        base = dense.get((name, *key(row)))
        return base / row["median_ms"] if base and row["impl"] != name else None

    fields = ("what", "batch", "seqlen", "inputs", "impl", "pass", "median_ms", "q1_ms", "q3_ms")
    more = ("l2", "tbps", "peak_extra_gb", "neighbours_share")
    print_table(
        [*fields, "x cuDNN", "x FA2", *more],
        [
            [row[name] for name in fields]
            + [ratio(row, "cudnn"), ratio(row, "flash2")]
            + [row.get(name) for name in more]
            for row in rows
        ],
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", nargs="*", help="operator, layer, window, decode; default: operator")
    add("--lengths", type=int, nargs="+", default=[1024 << i for i in range(9)], help="1k to 256k")
    add(
        "--impl",
        nargs="+",
        default=["nsa", *DENSE],
        help="nsa, nsa-sm80, nsa-sm90, cudnn, flash2, fla",
    )
    add(
        "--inputs",
        nargs="+",
        choices=["random", "coherent", "real"],
        default=["random", "coherent"],
    )
    add("--heads", type=int, default=64, help="Hq")
    add("--kv-heads", type=int, default=4, help="Hkv")
    add("--head-dim", type=int, default=128, help="Dk")
    add("--head-dim-v", type=int, default=None, help="Dv, default Dk")
    add("--compress", default="mean", choices=["mean", "weighted", "linear", "mlp"])
    add("--deterministic", action="store_true")
    add("--layer-dim", type=int, default=4096, help="width of the layer's input")
    add("--layer-compress", default="mlp", choices=["mean", "weighted", "linear", "mlp"])
    add("--batches", type=int, nargs="+", default=[1, 32], help="sequences, of decoding")
    add("--dense-max", type=int, default=131072, help="longest dense run; default: %(default)s")
    add("--repeats", type=int, default=10)
    add("--max-seconds", type=float, default=4.0, help="per implementation and pass")
    add("--output", type=Path, default=RESULTS / "gpu.json")
    real.add_model_options(parser.add_argument_group("inputs real"))
    args = parser.parse_args()
    args.what = args.what or ["operator"]
    if unknown := set(args.what) - set(SECTIONS):
        parser.error(f"expected of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; bench/run_cpu.py measures the CPU")
    args.head_dim_v = args.head_dim_v or args.head_dim
    args.device = "cuda"
    return args


SECTIONS = {
    "operator": run_operator,
    "layer": run_layer,
    "window": run_window,
    "decode": run_decode,
}


def main() -> None:
    args = parse()
    if "real" in args.inputs:
        args.model = real.model_for(args)
    meter = Meter(args)
    for name, section in SECTIONS.items():
        if name in args.what:
            section(meter, args)
    show(meter.rows)


if __name__ == "__main__":
    main()
