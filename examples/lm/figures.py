"""The loss curves of the runs in one folder, as a figure."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {"nsa": "NSA", "full": "full attention"}
COLOURS = {"nsa": "#1f5fa8", "full": "#c2571a"}
INK, GRID = "#333333", "#e4e4e4"


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """(header, rows) of a JSON-lines log."""
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    return header, rows


def comparable_logs(folder: Path, attention: str) -> dict[str, tuple[dict, list[dict]]]:
    """The log of `attention`, and the other kind's where it is a run on the same text."""
    own = read_log(folder / f"{attention}.jsonl")
    logs = {attention: own}
    for other in LABELS:
        path = folder / f"{other}.jsonl"
        if other != attention and path.exists():
            header, rows = read_log(path)
            if all(header[key] == own[0][key] for key in ("text", "seq_len", "batch_size")):
                logs[other] = (header, rows)
    return {kind: logs[kind] for kind in LABELS if kind in logs}


def draw_losses(logs: dict[str, tuple[dict, list[dict]]], path: Path) -> None:
    """Validation (line and points) and training loss (thin line) over the training bytes."""
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150, facecolor="white")
    for kind, (header, rows) in logs.items():
        scale = header["batch_size"] * header["seq_len"] / 1e6
        seen = [row["step"] * scale for row in rows]
        colour = COLOURS[kind]
        axes.plot(
            seen, [row["train_bits"] for row in rows], color=colour, linewidth=0.9, alpha=0.45
        )
        bits = [row["val_bits"] for row in rows]
        label = f"{LABELS[kind]}, validation ({bits[-1]:.2f} at the end)"
        axes.plot(seen, bits, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)
    entropy = header["unigram_bits"]
    axes.axhline(entropy, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    axes.annotate(
        f"unigram entropy of the validation text, {entropy:.2f}",
        (1, entropy),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=INK,
        fontsize=9,
    )
    axes.plot([], [], color=INK, linewidth=0.9, alpha=0.45, label="training (thin lines)")
    axes.set_xlabel("training text seen (million bytes)", color=INK)
    axes.set_ylabel("loss (bits per byte)", color=INK)
    axes.set_title(f"Byte-level language model on {header['source']}", color=INK, fontsize=11)
    axes.set_xlim(left=0)
    highest = max(row["val_bits"] for _, rows in logs.values() for row in rows)
    axes.set_ylim(0, 1.12 * max(entropy, highest))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK)
    axes.legend(frameon=False, loc="lower left", fontsize=9, labelcolor=INK)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
