"""The lengths of NSA's blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class NSAConfig:
    """Block lengths of Native Sparse Attention, counted in keys or in blocks. Validates itself.

    Raises:
        TypeError: a field is not an ``int``.
        ValueError: a field is out of range, or two fields do not fit together.
    """

    block_size: int = 32
    """l: keys that one compressed token covers. A multiple of block_stride."""
    block_stride: int = 16
    """d: keys between the starts of neighbouring compressed tokens."""
    select_size: int = 64
    """l': keys of a selection block. A multiple of block_stride, at least block_size."""
    num_selected: int = 16
    """n: blocks that a query selects, the forced ones among them."""
    num_init: int = 1
    """First blocks of the sequence, always selected."""
    num_local: int = 2
    """Last blocks up to and including the query's own, always selected."""
    window: int = 512
    """w: keys of the sliding window, the query's own position among them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"NSAConfig.{field.name}: expected an int, got {type(value).__name__} {value!r}"
                )
            least = 0 if field.name in ("num_init", "num_local") else 1
            if not least <= value < 2**31:
                raise ValueError(
                    f"NSAConfig.{field.name}: expected an int from {least} to 2**31 - 1, "
                    f"got {value}"
                )
        for name in ("block_size", "select_size"):
            if getattr(self, name) % self.block_stride:
                raise ValueError(
                    f"NSAConfig.{name}: expected a multiple of block_stride={self.block_stride}, "
                    f"got {getattr(self, name)}"
                )
        if self.block_size > self.select_size:
            raise ValueError(
                f"NSAConfig.block_size: expected at most select_size={self.select_size}, "
                f"got {self.block_size}"
            )
        if self.num_selected < self.num_init + self.num_local:
            raise ValueError(
                "NSAConfig.num_selected: expected at least num_init + num_local = "
                f"{self.num_init + self.num_local}, got {self.num_selected}"
            )

    def as_list(self) -> list[int]:
        """The fields in the order of the operators' ``config`` argument."""
        return [
            self.block_size,
            self.block_stride,
            self.select_size,
            self.num_selected,
            self.num_init,
            self.num_local,
            self.window,
        ]

    def num_compressed(self, seqlen: int) -> int:
        """Tc: compressed tokens of a sequence of ``seqlen`` keys."""
        if seqlen < self.block_size:
            return 0
        return (seqlen - self.block_size) // self.block_stride + 1

    def num_select_blocks(self, seqlen: int) -> int:
        """Selection blocks of a sequence of ``seqlen`` keys, the last one possibly incomplete."""
        return -(-seqlen // self.select_size)


DEFAULT_CONFIG = NSAConfig()
