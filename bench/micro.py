"""The microbenchmarks of bench/cpp from Python: prints a table, writes a result file.

Needs the module nsa_bench, which CMake builds where it finds nvcc and pybind11:

    pip install pybind11
    cmake -B build/cpp -G Ninja -Dpybind11_DIR=$(python -m pybind11 --cmakedir)
    cmake --build build/cpp

What follows the options below goes to nsa_bench, for instance:

    python bench/micro.py selected window --lengths 16k,64k --patterns random,coherent
"""

import argparse
import importlib
import sys
from pathlib import Path

from common import REPOSITORY, RESULTS, environment, print_table, write_results

COLUMNS = {
    "length": "seqlen",
    "Dk": "head_dim",
    "inputs": "inputs",
    "backend": "backend",
    "L2": "l2",
    "ms": "median_ms",
    "q1": "q1_ms",
    "q3": "q3_ms",
    "TFLOP/s": "tflops",
    "TB/s": "tbps",
    "gather TB/s": "gather_tbps",
    "of matmul": "of_matmul",
    "of copy": "of_copy",
    "of gather": "of_gather",
    "share": "neighbours_share",
}


def load_module(folder: Path):
    """nsa_bench, from `folder` or from where Python finds it."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("nsa_bench")
    except ImportError as error:
        raise SystemExit(
            f"micro.py: no module nsa_bench for this Python in {folder} ({error}); "
            "`python bench/micro.py --help` says how to build it"
        ) from None


def label(row: dict) -> str:
    detail = row.get("variant") or row.get("part")
    return f"  {row['kernel']}/{detail}" if detail else row["kernel"]


def rounded(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table_row(row: dict) -> list:
    if "error" in row:
        return [label(row), row["error"], *[None] * (len(COLUMNS) - 1)]
    return [label(row), *(row.get(field) or None for field in COLUMNS.values())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--module",
        type=Path,
        default=REPOSITORY / "build" / "cpp" / "bench" / "cpp",
        help="folder of the built module; default: build/cpp/bench/cpp",
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "micro.json", help="default: %(default)s"
    )
    args, rest = parser.parse_known_args()
    nsa_bench = load_module(args.module)

    where = environment("cuda") | {"torch": "none"}
    rows = []

    def progress(row: dict) -> None:
        rows.append({name: rounded(value) for name, value in row.items()})
        # Each time, so that a run that is stopped leaves what it has measured.
        write_results(args.output, rows, where)
        what = row.get("error") or f"{row['median_ms']:.4g} ms"
        print(f"{label(row)} {row.get('seqlen', '')} {row.get('inputs', '')}: {what}", flush=True)

    try:
        results = nsa_bench.run(rest, progress)
    except nsa_bench.UsageError as error:
        parser.error(f"{error}\n\n{nsa_bench.usage()}")
    for name, value in results["environment"].items():
        where.setdefault(name, value)
    write_results(args.output, rows, where)
    print()
    print_table(["benchmark", *COLUMNS], [table_row(row) for row in rows])


if __name__ == "__main__":
    main()
