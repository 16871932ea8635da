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
    q1: float  # quartiles
    q3: float
    least: float
    most: float
    repeats: int

    @classmethod
    def of(cls, times: Sequence[float]) -> "Timing":
        q1, median, q3 = (
            times * 3 if len(times) == 1 else statistics.quantiles(times, n=4, method="inclusive")
        )
        return cls(median, q1, q3, min(times), max(times), len(times))

    def minus(self, other: "Timing") -> "Timing":
        """Of a difference of two calls: the spreads add up."""
        return Timing(
            self.median - other.median,
            self.q1 - other.q3,
            self.q3 - other.q1,
            self.least - other.most,
            self.most - other.least,
            min(self.repeats, other.repeats),
        )

    def fields(self) -> dict:
        """The entries of a result row."""
        return {
            "median_ms": round(self.median, 4),
            "q1_ms": round(self.q1, 4),
            "q3_ms": round(self.q3, 4),
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
    have passed; warming up ends early after a quarter of that. `before` runs ahead of each timed
    call and is not timed, for instance to clear gradients or to flush a cache.
    """
    once = _time_cuda if torch.device(device).type == "cuda" else _time_cpu
    started = time.perf_counter()
    for _ in range(warmup):
        if before:
            before()
        once(call)
        if time.perf_counter() - started > max_seconds / 4:
            break
    times, started = [], time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - started < max_seconds):
        if before:
            before()
        times.append(once(call))
    return Timing.of(times)


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    row = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *_relative_arguments()]),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{_cpu_model()}, {cores} cores",
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
    """The command line without folders of this machine."""
    return [_relative(Path(sys.argv[0]).resolve()), *map(_relative, sys.argv[1:])]


def _relative(argument: str | Path) -> str:
    path = Path(argument)
    if not path.is_absolute():
        return str(argument)
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name


def _commit() -> str:
    """Short hash of HEAD, "-dirty" behind it where tracked files differ. NSA_EXT_COMMIT names it
    where there is no repository, as on a machine that only got a copy of the files."""
    if given := os.environ.get("NSA_EXT_COMMIT"):
        return given
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


# Every row repeats them, so that a row can be judged wherever it is copied to.
PROVENANCE = ("machine", "gpu", "driver", "torch", "commit", "command")

# The fields that say what a row measured; rows of two files belong together where they agree.
IDENTITY = (
    *("what", "kernel", "part", "variant", "impl", "pass", "inputs", "batch", "seqlen"),
    *("heads", "kv_heads", "head_dim", "head_dim_v", "dtype", "backend", "compress", "l2"),
    *("resident_mb", "layer", "distance", "tile"),
)


def key_of(row: dict) -> tuple[tuple[str, object], ...]:
    """What a row measured, hashable. Fields without a value are left out."""
    return tuple((name, row[name]) for name in IDENTITY if row.get(name) not in (None, ""))


def write_results(path: Path, rows: Sequence[dict], where: dict) -> None:
    """One file is one run: {"environment": ..., "rows": [...]}, a row per line.

    Args:
        where: environment(); its PROVENANCE is added to every row.
    """
    stamp = {name: where.get(name) for name in PROVENANCE}
    lines = ",\n".join("    " + json.dumps({**row, **stamp}) for row in rows)
    header = json.dumps(where, indent=2).replace("\n", "\n  ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "environment": {header},\n  "rows": [\n{lines}\n  ]\n}}\n')


def read_results(path: Path) -> tuple[dict, list[dict]]:
    """Environment and rows of a result file.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a result file ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{path}: not a result file (it has no rows)")
    return content.get("environment", {}), content["rows"]


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
