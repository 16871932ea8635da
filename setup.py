"""Builds nsa_ext/_C.abi3.so with torch.utils.cpp_extension. The metadata is in pyproject.toml.

NSA_EXT_CUDA=auto|0|1      CUDA kernels: where nvcc is found (auto), never, or required
TORCH_CUDA_ARCH_LIST       e.g. "8.0;9.0": their targets; 9.0 means 9.0a, and brings the Hopper
                           kernels with it; default "8.0+PTX;9.0a"
CUDA_HOME                  the toolkit; default: asked of the nvcc on PATH
MAX_JOBS                   parallel compilations
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0+PTX;9.0a"
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def cuda_home() -> Path | None:
    """The CUDA toolkit, or None. nvcc may be a wrapper: its dry run tells where the real one is."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Path("/usr/local/cuda") if Path("/usr/local/cuda/bin/nvcc").exists() else None
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    found = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    return Path(found[1]).resolve() if found else Path(nvcc).resolve().parents[1]


def archs() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS


def gencode_flags() -> list[str]:
    flags = []
    for arch in re.split(r"[; ,]+", archs()):
        number, ptx = re.fullmatch(r"(\d+\.\d+a?)(\+PTX)?", arch).groups()
        number = "90a" if number == "9.0" else number.replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extension():
    mode = os.environ.get("NSA_EXT_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"NSA_EXT_CUDA must be auto, 0 or 1, got {mode!r}")
    home = None if mode == "0" else cuda_home()
    if mode == "1" and home is None:
        sys.exit("NSA_EXT_CUDA=1 but no nvcc was found: put it on PATH or set CUDA_HOME")

    common = [
        "-O3",
        "-std=c++17",
        f'-DNSA_EXT_VERSION="{VERSION}"',
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    cxx = [
        *common,
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
    ]
    sources = [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/torch/*.cpp")]
    kwargs = {}
    if home is None:
        print("nsa_ext: CPU kernels only" + (" (no nvcc found)" if mode == "auto" else ""))
    else:
        print(f"nsa_ext: CUDA kernels with {home / 'bin' / 'nvcc'}")
        # Left to itself it is None on a CPU-only torch, and a wrapper's folder elsewhere.
        cpp_extension.CUDA_HOME = str(home)
        common.append("-DNSA_EXT_WITH_CUDA")
        cxx += ["-DNSA_EXT_WITH_CUDA", f'-DNSA_EXT_CUDA_ARCHS="{archs()}"']
        hopper = any("sm_90a" in flag for flag in gencode_flags())
        if hopper:
            common.append("-DNSA_EXT_WITH_SM90")
        sources += [f for f in ROOT.glob("csrc/cuda/**/*.cu") if hopper or "sm90" not in str(f)]
        # Static runtime, symbols hidden: one binary imports with and without a CUDA torch.
        kwargs = {
            "library_dirs": [str(home / "lib64")],
            "libraries": ["cudart_static", "rt", "pthread", "dl"],
            "extra_link_args": ["-Wl,--exclude-libs,ALL"],
        }
    nvcc = [
        *common,
        *gencode_flags(),
        "-Xcompiler=-fvisibility=hidden",
        "-lineinfo",
        # torch's flags switch these off; the kernels compile here as they do without torch.
        "-U__CUDA_NO_HALF_OPERATORS__",
        "-U__CUDA_NO_HALF_CONVERSIONS__",
        "-U__CUDA_NO_HALF2_OPERATORS__",
        "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    ]
    return cpp_extension.CppExtension(
        "nsa_ext._C",
        sorted(str(path.relative_to(ROOT)) for path in sources),
        include_dirs=[str(ROOT / "csrc/include"), str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        py_limited_api=True,
        **kwargs,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
