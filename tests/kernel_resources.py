"""Registers and spills of the attention kernels, against the budget docs/kernels/resources.json.

    python tests/kernel_resources.py            # fails where a kernel needs more than its budget
    python tests/kernel_resources.py --update   # writes the budget, and prints what changed

Compiles the instances for sm_90a with nvcc (of $CUDA_HOME, $PYTORCH_NVCC or PATH) and reads the
compiler's report (-Xptxas -v). No GPU is needed. A budget holds for the compiler that it was made
with; with another one the kernels are only compiled.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "docs" / "kernels" / "resources.json"
SOURCES = sorted((ROOT / "csrc/cuda/instances").glob("*.cu"))
FIELDS = ("registers", "spill_store_bytes", "spill_load_bytes")


def nvcc() -> list[str]:
    if command := os.environ.get("PYTORCH_NVCC"):
        return shlex.split(command)
    home = os.environ.get("CUDA_HOME")
    return [f"{home}/bin/nvcc" if home else "nvcc"]


def compiler() -> str:
    """The release of nvcc."""
    text = subprocess.run([*nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, (V[\d.]+)", text)[1]


def report(source: Path) -> str:
    """What the compiler says of one instance file."""
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [
                *nvcc(), "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a",
                "--expt-relaxed-constexpr", "-Xptxas=-v",
                f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include",
                '-DNSA_EXT_VERSION=""', "-DNSA_EXT_WITH_CUDA", "-DNSA_EXT_WITH_SM90",
                "-c", str(source), "-o", f"{folder}/object.o",
            ],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
    if run.returncode:
        sys.exit(f"{source}: nvcc failed\n{run.stderr}")
    return run.stderr


def parse(text: str) -> dict[str, dict[str, int]]:
    """Resources by kernel, named by their mangled names."""
    found = {}
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, stores, loads, registers in pattern.findall(text):
        found[name] = dict(zip(FIELDS, (int(registers), int(stores), int(loads)), strict=True))
    return found


def measure() -> dict[str, dict[str, dict[str, int]]]:
    """Resources by file and kernel."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        reports = pool.map(report, SOURCES)
    result = {}
    for source, text in zip(SOURCES, reports, strict=True):
        if re.search(r"C75\d\d", text):
            sys.exit(f"{source}: the compiler serialises matrix products\n{text}")
        result[source.name] = dict(sorted(parse(text).items()))
    return result


def exceeded(found: dict, budget: dict) -> list[str]:
    """One line for each figure above its budget, and for each kernel without one."""
    lines = []
    for file, kernels in found.items():
        for kernel, resources in kernels.items():
            allowed = budget.get(file, {}).get(kernel)
            if allowed is None:
                lines.append(f"{file}: {kernel}: not in {BUDGET.name}")
                continue
            for field in FIELDS:
                if resources[field] > allowed[field]:
                    lines.append(
                        f"{file}: {kernel}: {field} {resources[field]}, budget {allowed[field]}"
                    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the budget")
    update = parser.parse_args().update
    found = measure()
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    lines = exceeded(found, budget.get("kernels", {}))
    print("\n".join(lines))
    if update:
        budget = {"nvcc": compiler(), "kernels": found}
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
    elif compiler() != budget.get("nvcc"):
        print(
            f"the budget is that of nvcc {budget.get('nvcc')}, this is {compiler()}: not compared"
        )
    elif lines:
        sys.exit(f"{len(lines)} figures above their budget: see docs/kernels, or --update")
    else:
        print(f"{sum(map(len, found.values()))} kernels within their budget")


if __name__ == "__main__":
    main()
