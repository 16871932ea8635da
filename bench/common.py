"""What every benchmark script needs: timing, the environment of a run, tables, result files."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import nsa_ext

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated calls."""

    median: float
    least: float
    most: float
    repeats: int

    def fields(self) -> dict:
        """The entries of a result row."""
        return {
            "median_ms": round(self.median, 4),
            "min_ms": round(self.least, 4),
            "max_ms": round(self.most, 4),
            "repeats": self.repeats,
        }


def measure(
    call: Callable[[], object],
    *,
    device: str = "cpu",
    warmup: int = 1,
    repeats: int = 10,
    max_seconds: float = 60.0,
    before: Callable[[], object] | None = None,
) -> Timing:
    """Times `call`, each repeat by itself: by wall clock on the CPU, by events on a GPU.

    After `warmup` calls at most `repeats` are timed, fewer (but at least one) once `max_seconds`
    have passed. `before` runs ahead of each timed call and is not timed, for instance to clear
    gradients or to flush a cache.
    """
    once = _time_cuda if torch.device(device).type == "cuda" else _time_cpu
    for _ in range(warmup):
        if before:
            before()
        call()
    times, started = [], time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - started < max_seconds):
        if before:
            before()
        times.append(once(call))
    return Timing(statistics.median(times), min(times), max(times), len(times))


def _time_cpu(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def _time_cuda(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def environment(device: str = "cpu") -> dict:
    """Where and from what a result came: machine, versions, commit, command line."""
    row = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *_relative_arguments()]),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "build": nsa_ext.build_info(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        row |= {
            "gpu": properties.name,
            "driver": _driver(),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return row


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.splitlines()[0].strip()


def _relative_arguments() -> list[str]:
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(REPOSITORY):
        script = script.relative_to(REPOSITORY)
    return [str(script), *sys.argv[1:]]


def _commit() -> str:
    """Short hash of HEAD, "-dirty" behind it where tracked files differ; "unknown" without git."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_results(path: Path, rows: Sequence[dict], where: dict) -> None:
    """One file is one run: {"environment": ..., "rows": [...]}, a row per line."""
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    header = json.dumps(where, indent=2).replace("\n", "\n  ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "environment": {header},\n  "rows": [\n{lines}\n  ]\n}}\n')


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns; None is shown as a dash, a float with three significant digits."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for i, row in enumerate(cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        if i == 0:
            print("  ".join("-" * width for width in widths))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
