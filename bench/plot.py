"""Draws the figures of the README from the result files, and from nothing else.

    python bench/plot.py

A figure whose rows do not exist yet is left out, and the command says so.

speedup.png   dense attention's time over NSA's, against length: forward, backward, decoding
branches.png  time of each branch per token, stacked: forward and backward
memory.png    peak extra memory against length: forward, forward+backward
roofline.png  where each kernel stands between the GPU's measured ceilings
cpu.png       the same on a CPU: speed-up, and memory in multiples of inputs and results
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
from common import REPOSITORY, RESULTS, key_of, read_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH = 9.0  # inches; at 150 dpi somewhat wider than a README column
INPUTS = {"random": "#2166ac", "coherent": "#1b9e77", "real": "#d95f02"}
BATCHES = ("#7b3294", "#c51b7d", "#4d4d4d")  # decoding
DENSE = {"flash2": ("FlashAttention-2", "-", "#666666"), "cudnn": ("cuDNN", "--", "#999999")}
BRANCHES = {  # benchmarks that add up to a pass, bottom to top
    "compress": ("compression", "#bdbdbd"),
    "compressed_select": ("compressed (forward: with the selection)", "#2166ac"),
    "compressed": ("compressed (forward: with the selection)", "#2166ac"),
    "selected": ("selected", "#f4a259"),
    "window": ("window", "#5ab4ac"),
}
ROOFLINE = {  # benchmark -> label
    "compressed": "compressed",
    "compressed_select": "compressed + selection",
    "selected": "selected",
    "window": "window",
    "compressed_bwd": "compressed, backward",
    "selected_bwd": "selected, backward",
    "window_bwd": "window, backward",
    "decode": "decode",
}
LABEL_OFFSETS = (
    *((7, -3, "left"), (-7, -3, "right"), (7, 6, "left"), (7, -12, "left")),
    *((-7, 6, "right"), (-7, -12, "right"), (7, 14, "left"), (7, -20, "left")),
)
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
    "legend.handlelength": 2.6,
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
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}x"))
    ax.axhline(1, color="#444444", linewidth=1)
    ax.set_ylim(top=max(2.0, highest * 1.25))


def heading(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.012, ha="left", fontsize=12)


def machine_of(rows: Rows) -> str:
    gpus = rows.values("gpu") or rows.values("machine")
    return ", ".join(gpus)


def speedups(rows: Rows, base: Rows) -> dict[int, float]:
    ours, theirs = rows.by_length(), base.by_length()
    return {n: theirs[n] / ms for n, ms in ours.items() if n in theirs and ms > 0}


def draw_speedups(ax: Axes, part: Rows, field: str, colors: dict) -> dict[str, Line2D]:
    """A line for each value of `field` and each dense implementation; returns them by name."""
    lines, lengths, highest = {}, set(), 1.0
    for value in part.where(impl="nsa").values(field):
        for base, (name, line, _) in DENSE.items():
            theirs = part.where(impl=base)
            # Dense attention is measured on one kind of inputs, but for every batch size.
            theirs = theirs.where(batch=value) if field == "batch" else theirs
            points = speedups(part.where(**{"impl": "nsa", field: value}), theirs)
            if points:
                lines[f"{value} over {name}"], *_ = ax.plot(
                    *zip(*points.items(), strict=True), line, marker="o", color=colors[value]
                )
                lengths |= set(points)
                highest = max(highest, *points.values())
    length_axis(ax, sorted(lengths)[:: -max(1, len(lengths) // 5)])
    ratio_axis(ax, highest)
    return lines


def speedup(rows: Rows) -> Figure | None:
    """Forward and backward by inputs; decoding by batch size."""
    operator = rows.where(what="operator").where(impl={"nsa", *DENSE})
    operator = Rows([row for row in operator.rows if row.get("gpu")])
    decode = rows.where(what="decode", l2="cold", **{"pass": "decode"})
    if not operator.where(impl="nsa") or not operator.where(impl=set(DENSE)):
        return None
    count = 3 if decode.where(impl="nsa") and decode.where(impl=set(DENSE)) else 2
    figure, axes = plt.subplots(1, count, figsize=(WIDTH, 3.6))
    lines = {}
    for ax, name in zip(axes, ("forward", "backward"), strict=False):
        lines |= draw_speedups(ax, operator.where(**{"pass": name}), "inputs", INPUTS)
        ax.set_title(name)
    if count == 3:
        sizes = decode.where(impl="nsa").values("batch")
        colors = dict(zip(sizes, BATCHES, strict=False))
        found = draw_speedups(axes[2], decode.where(batch=set(colors)), "batch", colors)
        axes[2].set_title("decode, one token")
        named = {f"batch {name.split()[0]}": line for name, line in reversed(found.items())}
        axes[2].legend(named.values(), named.keys(), loc="best")
    # A column for each kind of inputs: FlashAttention-2 above cuDNN.
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncol=-(-len(lines) // 2))
    heading(figure, f"Speed-up over dense attention, {machine_of(operator)}")
    figure.tight_layout(rect=(0, 0.14, 1, 1))
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
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.0))
    legend = {}
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
            bars = ax.bar(range(len(lengths)), heights, 0.62, bottom=bottom, color=color,
                          edgecolor="white", linewidth=0.6)  # fmt: skip
            legend.setdefault(label, bars[0])
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        compression = times.get("compress", {})
        whole = {n: ms + compression.get(n, 0.0)
                 for n, ms in micro.where(kernel=title).by_length().items()}  # fmt: skip
        tops = []
        for i, (height, n) in enumerate(zip(bottom, lengths, strict=True)):
            if n in whole:
                level = 1e6 * whole[n] / n
                line = ax.hlines(level, i - 0.4, i + 0.4, color="black", linewidth=1.6)
                legend.setdefault("all in one call", line)
                height = max(height, level)
            time = whole.get(n, bottom[i] * n / 1e6)
            ax.text(i, height, f"{time:.3g} ms", ha="center", va="bottom", fontsize=9)
            tops.append(height)
        ax.set_xticks(range(len(lengths)), [length_text(n) for n in lengths])
        ax.grid(axis="x", visible=False)
        ax.set_xlabel("tokens")
        ax.set_title(title)
        ax.set_ylim(top=max(tops) * 1.12)
    axes[0].set_ylabel("nanoseconds per token")
    figure.legend(legend.values(), legend.keys(), loc="lower center", ncol=3)
    heading(figure, f"Time of each branch by itself, random inputs, {machine_of(micro)}")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    return figure


def memory(rows: Rows) -> Figure | None:
    passes = ("forward", "forward+backward")
    part = rows.where(what="operator", impl={"nsa", *DENSE}, **{"pass": set(passes)})
    part = Rows([row for row in part.rows if row.get("peak_extra_gb")])
    if set(part.values("impl")) != {"nsa", *DENSE}:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.5))
    for ax, name in zip(axes, passes, strict=True):
        here, lengths = part.where(**{"pass": name}), set()
        for impl, (label, line, color) in {"nsa": ("NSA", "-", INPUTS["random"]), **DENSE}.items():
            ours = here.where(impl=impl)
            points = ours.where(inputs=ours.values("inputs")[0]).by_length("peak_extra_gb")
            ax.plot(*zip(*points.items(), strict=True), line, marker="o", color=color, label=label)
            lengths |= set(points)
        length_axis(ax, sorted(lengths))
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
        ax.set_title(name)
    axes[0].set_ylabel("GB beyond the inputs")
    axes[0].legend()
    heading(figure, f"Peak memory, results included, {machine_of(part)}")
    figure.tight_layout()
    return figure


def place_labels(ax: Axes, points: list[tuple[float, float, str]], taken: list[Bbox]) -> None:
    """A label beside each point, inside of the axes, where it covers nothing that is `taken`."""
    pixels = [ax.transData.transform((x, y)) for x, y, _ in points]
    taken = taken + [Bbox.from_bounds(px - 7, py - 7, 14, 14) for px, py in pixels]
    inside = ax.get_window_extent()
    for x, y, text in points:
        for dx, dy, align in LABEL_OFFSETS:
            label = ax.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=align, fontsize=9
            )
            box = label.get_window_extent()
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1
            if fits and not any(box.overlaps(other) for other in taken):
                break
            if (dx, dy, align) != LABEL_OFFSETS[-1]:
                label.remove()
        taken.append(box)


def draw_roofs(ax: Axes, matmul: float, variant: str, copy: float, gather: float) -> list[Bbox]:
    """The ceilings, TFLOP/s and TB/s, with their names; returns what they cover."""
    low, high = ax.get_xlim()
    taken = []
    for rate, text, color, share in (
        (copy, "device memory", "#888888", 0.72),
        (gather, "32 KB blocks from L2", "#b8860b", 0.62),
    ):
        knee = matmul / rate
        ax.plot([low, knee], [low * rate, matmul], color=color, linewidth=1.4)
        start, end = (ax.transData.transform((x, x * rate)) for x in (low, knee))
        angle = math.degrees(math.atan2(end[1] - start[1], end[0] - start[0]))
        x = low * (knee / low) ** share
        label = ax.annotate(
            f"{text}, {rate:.1f} TB/s", (x, x * rate), xytext=(-4, 4), textcoords="offset points",
            rotation=angle, rotation_mode="anchor", ha="center", va="bottom", fontsize=9,
            color=color,
        )  # fmt: skip
        taken.append(label.get_window_extent())
        for i in range(200):
            px, py = start + (end - start) * i / 200
            taken.append(Bbox.from_bounds(px - 2, py - 2, 4, 4))
    ax.plot([matmul / gather, high], [matmul] * 2, color="#444444", linewidth=1.4)
    ax.text(high, matmul * 1.06, f"matrix product ({variant}), {matmul:.0f} TFLOP/s ",
            ha="right", va="bottom", fontsize=9, color="#444444")  # fmt: skip
    return taken


def roofline(rows: Rows) -> Figure | None:
    """Single branches and decoding at the longest length; gathered traffic where there is any."""
    ceilings = Rows([row for row in rows.rows if str(row.get("kernel")).startswith("ceiling_")])
    points = Rows([row for row in rows.rows if row.get("tflops") and not row.get("part")])
    points = points.where(
        kernel=set(ROOFLINE), inputs=set(INPUTS), l2="warm", head_dim=128, head_dim_v=128
    )
    points = Rows([r for r in points.rows if r["batch"] == 1 or r["kernel"] == "decode"])
    if not ceilings or not points:
        return None
    best = {
        kind: max(ceilings.where(kernel=f"ceiling_{kind}").values(field))
        for kind, field in (("matmul", "tflops"), ("copy", "tbps"), ("gather", "tbps"))
    }
    length = max(points.values("seqlen"))
    points = points.where(seqlen=length)
    figure, ax = plt.subplots(figsize=(WIDTH, 4.8))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(6, 2e4)
    ax.set_ylim(min(20.0, *(row["tflops"] / 2 for row in points.rows)), best["matmul"] * 1.8)
    ax.set_xlabel("useful FLOP per byte of memory (selected: per byte of blocks, nothing shared)")
    ax.set_ylabel("useful TFLOP/s")
    heading(figure, f"Kernels between the ceilings, {length_text(length)} tokens, "
                    f"{machine_of(points)}")  # fmt: skip
    seen, labels = {}, {}
    for row in points.rows:
        moved = row.get("gather_gbytes") or row["gbytes"]
        x, y, kind = row["gflop"] / moved, row["tflops"], row["inputs"]
        marker = "s" if row["kernel"].endswith("_bwd") else "o"
        ax.scatter(x, y, s=42, color=INPUTS[kind], marker=marker, zorder=3)
        seen.setdefault(kind, ax.scatter([], [], s=42, color=INPUTS[kind]))
        batch = f", batch {row['batch']}" if row["kernel"] == "decode" else ""
        labels.setdefault(ROOFLINE[row["kernel"]] + batch, (x, y))
    handles = {f"{kind} inputs": seen[kind] for kind in INPUTS if kind in seen}
    handles["backward"] = ax.scatter([], [], s=42, color="#777777", marker="s")
    ax.legend(handles.values(), handles.keys(), loc="lower right")
    figure.tight_layout()
    figure.canvas.draw()
    fastest = ceilings.where(kernel="ceiling_matmul", tflops=best["matmul"]).rows[0]
    variant = fastest.get("variant", "")
    taken = draw_roofs(ax, best["matmul"], variant, best["copy"], best["gather"])
    place_labels(ax, [(x, y, text) for text, (x, y) in labels.items()], taken)
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
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
    axes[1].set_title("peak memory of a forward+backward, MiB")
    axes[1].legend(loc="upper left")
    heading(figure, f"CPU: {machine_of(part)}, float32")
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
    files = [read_results(path)[1] for path in sorted(folder.glob("*.json"))]
    # Of rows that measured the same the one in the last file counts.
    rows = Rows(list({key_of(row): row for file in files for row in file}.values()))
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
