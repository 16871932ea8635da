"""Compares two result files, of two commits for instance: what got slower beyond the spread?

    python bench/compare.py OLD.json NEW.json

A row got slower where its interquartile range lies above the old one's entirely (the extremes
count where a file has no quartiles) and its median grew by more than --margin; faster is the mirror
image. Peak memory that grew by more than --margin counts as well. Exit code: 0, 1 where something
got slower or takes more memory, 2 where the files cannot be compared.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from common import key_of, print_table, read_results

MEMORY = ("peak_extra_gb", "extra_bytes")
# A difference in these makes times incomparable.
PLACE = ("machine", "gpu", "driver", "torch")


@dataclass(frozen=True)
class Change:
    """A row of both files that differs; ratio = new / old."""

    key: tuple
    quantity: str  # "ms", or the name of a memory field
    verdict: str  # "slower", "faster", "more memory", "less memory"
    old: float
    new: float

    @property
    def ratio(self) -> float:
        return self.new / self.old if self.old else float("inf")

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "more memory")


def interval(row: dict) -> tuple[float, float]:
    """Where the middle half of the times lies."""
    names = ("q1_ms", "q3_ms") if "q1_ms" in row else ("min_ms", "max_ms")
    return tuple(row.get(name, row["median_ms"]) for name in names)


def compare_rows(old: dict, new: dict, margin: float) -> list[Change]:
    """The changes of one row; `old` and `new` measured the same."""
    key, changes = key_of(old), []
    if old.get("median_ms") is not None and new.get("median_ms") is not None:
        before, after = old["median_ms"], new["median_ms"]
        (old_low, old_high), (new_low, new_high) = interval(old), interval(new)
        if new_low > old_high and after > before * (1 + margin):
            changes.append(Change(key, "ms", "slower", before, after))
        elif new_high < old_low and before > after * (1 + margin):
            changes.append(Change(key, "ms", "faster", before, after))
    for name in MEMORY:
        if name in old and name in new:
            before, after = old[name], new[name]
            if after > before * (1 + margin):
                changes.append(Change(key, name, "more memory", before, after))
            elif before > after * (1 + margin):
                changes.append(Change(key, name, "less memory", before, after))
    return changes


def compare(
    old_rows: list[dict], new_rows: list[dict], margin: float
) -> tuple[list[Change], int, list[tuple], list[tuple]]:
    """All changes, worst first; the number of rows compared; keys in the old file alone and in the
    new one alone."""
    old = {key_of(row): row for row in old_rows}
    new = {key_of(row): row for row in new_rows}
    common = [key for key in old if key in new]
    changes = [c for key in common for c in compare_rows(old[key], new[key], margin)]
    changes.sort(key=lambda change: (not change.is_regression, -change.ratio))
    missing = [key for key in old if key not in new]
    added = [key for key in new if key not in old]
    return changes, len(common), missing, added


def describe(key: tuple) -> str:
    """The values of a key; numbers with their names."""
    return " ".join(str(v) if isinstance(v, str) else f"{name}={v}" for name, v in key)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--margin", type=float, default=0.03, help="relative; default: %(default)s")
    args = parser.parse_args()
    try:
        (old_where, old_rows), (new_where, new_rows) = map(read_results, (args.old, args.new))
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    changes, count, missing, added = compare(old_rows, new_rows, args.margin)
    if count == 0:
        print("compare.py: the files have no row in common", file=sys.stderr)
        return 2
    print(f"{old_where.get('commit')} -> {new_where.get('commit')}: {count} rows in both files")
    for name in PLACE:
        if old_where.get(name) != new_where.get(name):
            print(f"NOT THE SAME {name}: {old_where.get(name)} -> {new_where.get(name)}")
    for what, keys in (("only in the old file", missing), ("only in the new file", added)):
        if keys:
            print(f"{len(keys)} rows {what}, e.g. {describe(keys[0])}")
    if changes:
        print()
        print_table(
            ["", "old", "new", "new/old", "", "row"],
            [[c.verdict, c.old, c.new, c.ratio, c.quantity, describe(c.key)] for c in changes],
        )
    regressions = sum(change.is_regression for change in changes)
    print(f"\n{regressions} rows got worse, {len(changes) - regressions} better")
    return 1 if regressions else 0


if __name__ == "__main__":
    raise SystemExit(main())
