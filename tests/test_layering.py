"""Dependencies point one way: include <- {cpu, cuda} <- torch <- nsa_ext."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(
    path
    for path in CSRC.rglob("*")
    if path.suffix in (".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu", ".inl")
)
MODULES = sorted((ROOT / "nsa_ext").rglob("*.py"))

# What each layer may include, by the beginning of the path; C++ standard headers have no slash and
# no suffix, C ones are listed.
C_HEADERS = {"dlfcn.h", "immintrin.h", "cpuid.h", "stdint.h"}
CUDA_HEADERS = ("cuda", "cute/", "cutlass/", "cub/", "thrust/", "cooperative_groups")
ALLOWED = {
    "include": ("nsa/",),
    "cpu": ("nsa/", "cpu/"),
    "cuda": ("nsa/", "cuda/", *CUDA_HEADERS),
    "torch": ("nsa/", "torch/"),
}
# Headers of torch that belong to its stable ABI.
STABLE_TORCH = (
    "torch/csrc/stable/",
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/headeronly/",
)


def includes(path):
    text = path.read_text()
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, flags=re.MULTILINE)


def layer(path):
    return path.relative_to(CSRC).parts[0]


def is_standard(header):
    return ("/" not in header and "." not in header) or header in C_HEADERS


def is_allowed(path, header):
    where = layer(path)
    if header.startswith("cuda") and where != "cuda":
        return False
    if is_standard(header):
        return True
    # A header beside the file that includes it.
    if (path.parent / header).exists():
        return True
    if where == "torch" and header.startswith("torch/"):
        return (CSRC / header).exists() or header.startswith(STABLE_TORCH)
    return header.startswith(ALLOWED[where])


def test_the_layers_exist():
    assert {layer(path) for path in SOURCES} == set(ALLOWED)
    assert len(MODULES) > 5


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes(path):
    wrong = [header for header in includes(path) if not is_allowed(path, header)]
    assert not wrong, f"{path.relative_to(ROOT)} must not include {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_every_header_of_ours_exists(path):
    for header in includes(path):
        if header.startswith(("nsa/", "cpu/", "cuda/")):
            found = (CSRC / header, CSRC / "include" / header)
            assert any(candidate.exists() for candidate in found), header


def test_the_check_sees_a_violation():
    cpu, torch_, include = CSRC / "cpu/a.cpp", CSRC / "torch/a.cpp", CSRC / "include/nsa/a.h"
    for header in (
        "torch/extension.h",
        "ATen/ATen.h",
        "cuda_runtime.h",
        "cuda/common.h",
        "c10/a.h",
    ):
        assert not is_allowed(cpu, header)
        assert not is_allowed(include, header)
        assert not is_allowed(torch_, header)
    assert not is_allowed(CSRC / "cuda/a.cu", "cpu/attn.h")
    assert not is_allowed(CSRC / "cuda/a.cu", "torch/tensors.h")
    assert not is_allowed(include, "cpu/attn.h")
    assert is_allowed(cpu, "vector") and is_allowed(cpu, "nsa/params.h")
    assert is_allowed(torch_, "torch/csrc/stable/library.h")


# Python.


def imported_modules(path):
    """Names of modules of the package that a module imports when it runs."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level == 0 and source.split(".")[0] != "nsa_ext":
                continue
            source = source.removeprefix("nsa_ext").strip(".")
            yield from [source] if source else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("nsa_ext."):
                    yield alias.name.removeprefix("nsa_ext.")


IMPORTS = {path.stem: set(imported_modules(path)) for path in MODULES}


def reachable(module):
    found, todo = set(), [module]
    while todo:
        for name in IMPORTS.get(todo.pop(), ()):
            if name in IMPORTS and name not in found:
                found.add(name)
                todo.append(name)
    return found


@pytest.mark.parametrize("module", IMPORTS)
def test_python_imports_have_no_cycle(module):
    assert module not in reachable(module)


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("config", set(IMPORTS)),
        ("reference", set(IMPORTS) - {"config"}),
        ("_ops", {"_checks", "functional", "info", "reference", "compressor", "attention"}),
        ("functional", {"reference", "compressor", "attention", "cache", "decode"}),
        ("cache", {"reference", "compressor", "attention", "decode"}),
        ("decode", {"reference", "compressor", "attention"}),
        ("compressor", {"reference", "functional", "attention"}),
        ("attention", {"reference"}),
    ],
)
def test_python_layers(module, never):
    assert not reachable(module) & never


def test_the_reference_needs_no_kernel():
    assert "torch.ops" not in (ROOT / "nsa_ext/reference.py").read_text()
