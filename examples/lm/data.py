"""Text as bytes: which files are read, how they are split, how windows are drawn."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

# Every 16th file, in sorted order, is held out for validation.
VALIDATION_STRIDE = 16
# Of the standard library: other people's packages, tests, and modules that are tables, not prose.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}
SKIPPED_FOLDERS |= {"encodings", "pydoc_data", "lib2to3", "turtledemo"}
SKIPPED_PREFIX = "_sysconfigdata"


class DataError(Exception):
    """The text cannot be used; the message says why."""


@dataclass(frozen=True)
class Corpus:
    """A text split into training and validation bytes."""

    source: str
    train: torch.Tensor  # (N,) uint8
    validation: torch.Tensor  # (M,) uint8

    @property
    def digest(self) -> str:
        """A short hash of the text, the same for the same bytes and split."""
        sha = hashlib.sha256()
        for part in (self.train, self.validation):
            sha.update(len(part).to_bytes(8, "little") + part.numpy().tobytes())
        return sha.hexdigest()[:16]


def load_corpus(path: Path | None, seq_len: int) -> Corpus:
    """Reads `path`, a file or a folder, or the standard library's own sources where it is None.

    A folder is split by file, a single file at 15/16 of its length.
    """
    if path is None:
        source, texts = "the Python standard library", _read_files(*_standard_library())
    elif path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
        source, texts = str(path), _read_files(path, files)
    elif path.is_file():
        source, texts = str(path), [path.read_bytes()]
    else:
        raise DataError(f"no such file or folder: {path}")

    if len(texts) >= VALIDATION_STRIDE:
        held_out = texts[VALIDATION_STRIDE - 1 :: VALIDATION_STRIDE]
        rest = [t for i, t in enumerate(texts) if (i + 1) % VALIDATION_STRIDE]
        train, validation = b"\n".join(rest), b"\n".join(held_out)
    else:
        text = b"\n".join(texts)
        cut = len(text) - len(text) // VALIDATION_STRIDE
        train, validation = text[:cut], text[cut:]

    needed = seq_len + 1
    for name, part in (("training", train), ("validation", validation)):
        if len(part) < needed:
            raise DataError(
                f"too little text in {source}: its {name} part has {len(part):,} bytes, "
                f"one window of --seq-len {seq_len} needs {needed:,} "
                f"(1/{VALIDATION_STRIDE} of the text is held out for validation)"
            )
    return Corpus(source, _as_tensor(train), _as_tensor(validation))


def training_batch(text: torch.Tensor, batch_size: int, seq_len: int, seed: int) -> torch.Tensor:
    """(batch_size, seq_len + 1) int64: random windows that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - seq_len, (batch_size, 1), generator=generator)
    return text[starts + torch.arange(seq_len + 1)].long()


def validation_windows(text: torch.Tensor, count: int, seq_len: int) -> torch.Tensor:
    """(count, seq_len + 1) int64: evenly spaced windows, always the same, fewer of a short text."""
    count = min(count, len(text) // (seq_len + 1))
    starts = torch.linspace(0, len(text) - seq_len - 1, count).long()[:, None]
    return text[starts + torch.arange(seq_len + 1)].long()


def unigram_entropy(text: torch.Tensor) -> float:
    """Bits per byte of the best model that ignores context."""
    counts = torch.bincount(text.long(), minlength=256).double()
    p = counts[counts > 0] / len(text)
    return float(-(p * p.log2()).sum())


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        p
        for p in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts)
        and not p.name.startswith(SKIPPED_PREFIX)
    ]
    if not files:
        raise DataError(f"no Python sources in {root}; name a text with --data")
    return root, files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_files(root: Path, files: list[Path]) -> list[bytes]:
    """The files that hold text, in the order of their path below root."""
    files = sorted(files, key=lambda p: p.relative_to(root).as_posix())
    return [text for text in (p.read_bytes() for p in files) if text and b"\0" not in text]


def _as_tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
