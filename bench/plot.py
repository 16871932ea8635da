"""Draws the figures of the README from the result files, and from nothing else.

    python bench/plot.py

A figure whose rows do not exist yet is left out, and the command says so.

speedup.png   dense attention's time over NSA's, against length: forward, backward, decoding
branches.png  time of each branch per token, stacked: forward and backward
memory.png    peak extra memory of a forward+backward against length
roofline.png  where each kernel stands between the GPU's measured ceilings
cpu.png       the same on a CPU: speed-up, and memory in multiples of inputs and results
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
from common import REPOSITORY, RESULTS, read_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH = 9.0  # inches; at 150 dpi somewhat wider than a README column
INPUTS = {"random": "#2166ac", "coherent": "#1b9e77", "real": "#d95f02"}
DENSE = {"flash2": ("FlashAttention-2", "-", "#666666"), "cudnn": ("cuDNN", "--", "#999999")}
BRANCHES = {  # benchmarks that add up to a pass, bottom to top
    "compress": ("compression", "#bdbdbd"),
    "compressed_select": ("compressed, importance, top-n", "#2166ac"),
    "compressed": ("compressed", "#2166ac"),
    "selected": ("selected", "#f4a259"),
    "window": ("window", "#5ab4ac"),
}
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


class Rows:
    """The rows of all result files."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def where(self, **fields) -> "Rows":
        """The rows with these values; a set means any of its members."""

        def fits(row: dict) -> bool:
            return all(
                row.get(name) in value if isinstance(value, set) else row.get(name) == value
                for name, value in fields.items()
            )

        return Rows([row for row in self.rows if fits(row)])

    def by_length(self, field: str = "median_ms") -> dict[int, float]:
        found = {row["seqlen"]: row[field] for row in self.rows if row.get(field) is not None}
        return dict(sorted(found.items()))

    def values(self, field: str) -> list:
        """Distinct values in order of first appearance."""
        return list(dict.fromkeys(row[field] for row in self.rows if row.get(field) is not None))

    def __bool__(self) -> bool:
        return bool(self.rows)


def length_text(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 else f"{length:g}"


def length_axis(ax: Axes, lengths: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(lengths)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_text(x)))
    ax.set_xlabel("tokens")


def ratio_axis(ax: Axes, highest: float) -> None:
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    ax.axhline(1, color="#444444", linewidth=1)
    ax.set_ylim(top=max(2.0, highest * 1.25))


def machine_of(rows: Rows) -> str:
    gpus = rows.values("gpu") or rows.values("machine")
    return ", ".join(gpus)


def speedups(rows: Rows, base: Rows) -> dict[int, float]:
    ours, theirs = rows.by_length(), base.by_length()
    return {n: theirs[n] / ms for n, ms in ours.items() if n in theirs and ms > 0}


def speedup(rows: Rows) -> Figure | None:
    """Forward and backward by inputs; decoding by batch size."""
    operator = rows.where(what="operator").where(impl={"nsa", *DENSE})
    operator = Rows([row for row in operator.rows if row.get("gpu")])
    decode = rows.where(what="decode")
    if not operator.where(impl="nsa") or not operator.where(impl=set(DENSE)):
        return None
    panels = [("forward", operator), ("backward", operator)]
    if decode.where(impl="nsa"):
        panels.append(("decode", decode))
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.5), squeeze=False)
    for ax, (name, part) in zip(axes[0], panels, strict=True):
        lengths, highest = set(), 1.0
        part = part.where(**{"pass": name})
        for base, (label, line, _) in DENSE.items():
            kinds = part.where(impl="nsa").values("batch" if name == "decode" else "inputs")
            for i, kind in enumerate(kinds):
                if name == "decode":
                    ours = part.where(impl="nsa", batch=kind)
                    theirs, text = part.where(impl=base, batch=kind), f"batch {kind}"
                    color = list(INPUTS.values())[i % 3]
                else:
                    ours, theirs = part.where(impl="nsa", inputs=kind), part.where(impl=base)
                    text, color = f"{kind} inputs", INPUTS[kind]
                points = speedups(ours, theirs)
                if not points:
                    continue
                ax.plot(*zip(*points.items(), strict=True), line, marker="o", color=color,
                        label=f"{text}, {label}")  # fmt: skip
                lengths |= set(points)
                highest = max(highest, *points.values())
        length_axis(ax, sorted(lengths)[:: max(1, len(lengths) // 5)])
        ratio_axis(ax, highest)
        ax.set_title({"decode": "decode, one token"}.get(name, name))
    axes[0][0].set_ylabel("speed-up over dense attention")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=min(3, len(labels)))
    if len(panels) == 3:
        axes[0][2].legend(loc="upper left", fontsize=8)
    figure.suptitle(f"Faster than dense attention by: {machine_of(operator)}", x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.04 + 0.055 * -(-len(labels) // 3), 1, 1))
    return figure


def branches(rows: Rows) -> Figure | None:
    """Microbenchmarks of the single branches, warm L2, whole operators only."""
    micro = Rows([row for row in rows.rows if row.get("kernel") and not row.get("part")])
    micro = micro.where(l2="warm", inputs="random", batch=1, head_dim=128, head_dim_v=128)
    forward = micro.where(kernel={"compress", "compressed_select", "selected", "window"})
    backward = micro.where(
        kernel={f"{n}_bwd" for n in ("compress", "compressed", "selected", "window")}
    )
    if not forward or not backward:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6))
    for ax, part, suffix, title in (
        (axes[0], forward, "", "forward"),
        (axes[1], backward, "_bwd", "backward"),
    ):
        names = [name for name in BRANCHES if part.where(kernel=name + suffix)]
        times = {name: part.where(kernel=name + suffix).by_length() for name in names}
        lengths = sorted(set.intersection(*(set(t) for t in times.values())))
        bottom = [0.0] * len(lengths)
        for name in names:
            label, color = BRANCHES[name]
            heights = [1e6 * times[name][n] / n for n in lengths]
            ax.bar(range(len(lengths)), heights, 0.7, bottom=bottom, color=color, label=label,
                   edgecolor="white", linewidth=0.6)  # fmt: skip
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        for i, (height, n) in enumerate(zip(bottom, lengths, strict=True)):
            total = height * n / 1e6
            ax.text(i, height, f"{total:.3g} ms", ha="center", va="bottom", fontsize=8.5)
        ax.set_xticks(range(len(lengths)), [length_text(n) for n in lengths])
        ax.grid(axis="x", visible=False)
        ax.set_xlabel("tokens")
        ax.set_title(title)
        ax.margins(y=0.1)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], loc="upper left")
        ax.set_ylim(top=max(bottom) * 1.45)
    axes[0].set_ylabel("nanoseconds per token")
    figure.suptitle(f"Time by branch, random inputs: {machine_of(micro)}", x=0.01, ha="left")
    figure.tight_layout()
    return figure


def memory(rows: Rows) -> Figure | None:
    part = rows.where(what="operator", **{"pass": "forward+backward"})
    part = Rows([row for row in part.rows if row.get("peak_extra_gb")])
    if not part.where(impl="nsa"):
        return None
    figure, ax = plt.subplots(figsize=(WIDTH * 0.62, 3.6))
    lengths = set()
    for name, (label, line, color) in {"nsa": ("NSA", "-", INPUTS["random"]), **DENSE}.items():
        points = part.where(impl=name, inputs=part.values("inputs")[0]).by_length("peak_extra_gb")
        if points:
            ax.plot(*zip(*points.items(), strict=True), line, marker="o", color=color, label=label)
            lengths |= set(points)
    length_axis(ax, sorted(lengths))
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.set_ylabel("GB beyond the inputs")
    ax.set_title(f"Peak memory of a forward+backward: {machine_of(part)}")
    ax.legend()
    figure.tight_layout()
    return figure


def roofline(rows: Rows) -> Figure | None:
    """Whole operators at the longest length; gathered traffic counts where there is any."""
    ceilings = Rows([row for row in rows.rows if str(row.get("kernel")).startswith("ceiling_")])
    points = Rows([row for row in rows.rows if row.get("kernel") and row.get("tflops")
                   and row.get("tbps") and not row.get("part")])  # fmt: skip
    points = points.where(l2="warm", batch=1, head_dim=128, head_dim_v=128)
    if not ceilings or not points:
        return None
    best = {
        kind: max(ceilings.where(kernel=f"ceiling_{kind}").values(field))
        for kind, field in (("matmul", "tflops"), ("copy", "tbps"), ("gather", "tbps"))
    }
    length = max(points.values("seqlen"))
    points = points.where(seqlen=length)
    figure, ax = plt.subplots(figsize=(WIDTH, 4.6))
    low, high = 8.0, 3e4
    for kind, text, color in (
        ("copy", "device memory", "#888888"),
        ("gather", "32 KB blocks from L2", "#c9a227"),
    ):
        knee = best["matmul"] / best[kind]
        ax.plot([low, knee], [low * best[kind], best["matmul"]], color=color, linewidth=1.4)
        ax.text(low * 1.08, low * best[kind] * 1.2, f"{text}, {best[kind]:.1f} TB/s", color=color,
                rotation_mode="anchor", fontsize=9, va="bottom", rotation=0)  # fmt: skip
    knee = best["matmul"] / best["gather"]
    ax.plot([knee, high], [best["matmul"]] * 2, color="#444444", linewidth=1.4)
    ax.text(high, best["matmul"] * 1.06, f"matrix product, {best['matmul']:.0f} TFLOP/s",
            ha="right", va="bottom", fontsize=9, color="#444444")  # fmt: skip
    seen = set()
    for row in points.rows:
        moved = row.get("gather_gbytes") or row["gbytes"]
        intensity = row["gflop"] / moved
        kind, backward = (
            row["inputs"],
            row["kernel"].endswith("_bwd") or row["kernel"] == "backward",
        )
        ax.scatter(intensity, row["tflops"], s=42, color=INPUTS.get(kind, "#7570b3"),
                   marker="s" if backward else "o", zorder=3)  # fmt: skip
        seen.add(kind)
        ax.annotate(row["kernel"], (intensity, row["tflops"]), xytext=(6, -3),
                    textcoords="offset points", fontsize=8.5)  # fmt: skip
    for kind in seen:
        ax.scatter([], [], s=42, color=INPUTS.get(kind, "#7570b3"), label=f"{kind} inputs")
    ax.scatter([], [], s=42, color="#777777", marker="s", label="backward")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_xlabel("useful FLOP per byte (of memory; of block loads where blocks are gathered)")
    ax.set_ylabel("useful TFLOP/s")
    ax.set_title(f"{length_text(length)} tokens: {machine_of(points)}")
    ax.legend(loc="lower right")
    figure.tight_layout()
    return figure


def cpu(rows: Rows) -> Figure | None:
    part = Rows([row for row in rows.where(what="operator").rows if not row.get("gpu")])
    if not part.where(impl="nsa") or not part.where(impl="dense"):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.3))
    lengths, highest = set(), 1.0
    for name, color in (("forward", INPUTS["random"]), ("forward+backward", INPUTS["real"])):
        points = speedups(
            part.where(impl="nsa", **{"pass": name}), part.where(impl="dense", **{"pass": name})
        )
        axes[0].plot(*zip(*points.items(), strict=True), marker="o", color=color, label=name)
        lengths |= set(points)
        highest = max(highest, *points.values())
    length_axis(axes[0], sorted(lengths))
    ratio_axis(axes[0], highest)
    axes[0].set_title("speed-up over dense attention")
    axes[0].legend(loc="upper left")
    lengths = set()
    for name, label, color in (("nsa", "NSA", INPUTS["random"]), ("dense", "dense", "#888888")):
        found = Rows([row for row in part.where(impl=name).rows if row.get("extra_bytes")])
        points = {n: extra / 2**20 for n, extra in found.by_length("extra_bytes").items()}
        if points:
            axes[1].plot(*zip(*points.items(), strict=True), marker="o", color=color, label=label)
            lengths |= set(points)
    length_axis(axes[1], sorted(lengths))
    axes[1].set_yscale("log", base=2)
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes[1].set_title("peak memory of a forward+backward, MiB")
    axes[1].legend(loc="upper left")
    figure.suptitle(f"CPU: {machine_of(part)}, float32", x=0.01, ha="left")
    figure.tight_layout()
    return figure


FIGURES: dict[str, Callable[[Rows], Figure | None]] = {
    "speedup": speedup,
    "branches": branches,
    "memory": memory,
    "roofline": roofline,
    "cpu": cpu,
}


def draw(folder: Path, output: Path, names: list[str]) -> list[Path]:
    """Draws the named figures from all result files of a folder; returns what was written."""
    rows = Rows([row for path in sorted(folder.glob("*.json")) for row in read_results(path)[1]])
    written = []
    output.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name in names:
            figure = FIGURES[name](rows)
            if figure is None:
                print(f"{name}.png: no rows for it in {folder}")
                continue
            path = output / f"{name}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            written.append(path)
            print(f"wrote {path}")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: bench/results")
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "docs" / "figures", help="default: docs/figures"
    )
    args = parser.parse_args()
    if unknown := set(args.figures) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    draw(args.results, args.output, args.figures or list(FIGURES))


if __name__ == "__main__":
    main()
