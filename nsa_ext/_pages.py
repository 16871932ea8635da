"""Which pages of a pool belong to which sequence: the host's side of a paged cache."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PageChanges:
    """What the device has to do: entries of the block table, and pages to copy before."""

    entries: list[tuple[int, int, int]] = field(default_factory=list)  # sequence, column, page
    copies: list[tuple[int, int]] = field(default_factory=list)  # from page, to page


class PageTable:
    """Tables of page numbers with a free list. Sequences may share pages (after a reorder); one
    that is about to be written to is copied first.

    Args:
        num_pages: of the pool.
        batch_size: sequences.
    """

    def __init__(self, num_pages: int, batch_size: int) -> None:
        self.free = list(range(num_pages - 1, -1, -1))
        self.users = [0] * num_pages
        self.tables: list[list[int]] = [[] for _ in range(batch_size)]

    def missing(self, needs: dict[int, tuple[int, int]]) -> int:
        """Pages that :meth:`provide` would take."""
        return sum(
            max(0, pages - len(self.tables[b])) + len(self._shared(b, first_open))
            for b, (first_open, pages) in needs.items()
        )

    def provide(self, needs: dict[int, tuple[int, int]]) -> PageChanges:
        """Gives sequence b ``pages`` pages, those from ``first_open`` on its own.

        Raises:
            ValueError: the pool has too few free pages; nothing has changed.
        """
        missing = self.missing(needs)
        if missing > len(self.free):
            raise ValueError(
                f"num_pages: expected a pool with {missing} free pages for the new tokens, got "
                f"{len(self.free)} free of {len(self.users)}; `reset` frees those of a sequence"
            )
        changes = PageChanges()
        for b, (first_open, pages) in needs.items():
            table = self.tables[b]
            for column in self._shared(b, first_open):
                old, table[column] = table[column], self._take()
                self.users[old] -= 1
                changes.copies.append((old, table[column]))
                changes.entries.append((b, column, table[column]))
            while len(table) < pages:
                table.append(self._take())
                changes.entries.append((b, len(table) - 1, table[-1]))
        return changes

    def release(self, b: int) -> PageChanges:
        """Takes all pages from sequence b."""
        changes = PageChanges([(b, column, -1) for column in range(len(self.tables[b]))])
        for page in self.tables[b]:
            self._drop(page)
        self.tables[b] = []
        return changes

    def assign(self, sources: dict[int, int]) -> PageChanges:
        """Sequence b shares the pages of sequence sources[b], all at once."""
        tables = {b: list(self.tables[source]) for b, source in sources.items()}
        changes = PageChanges()
        for table in tables.values():
            for page in table:
                self.users[page] += 1
        for b, table in tables.items():
            before = self.tables[b]
            for page in before:
                self._drop(page)
            self.tables[b] = table
            columns = range(max(len(before), len(table)))
            padded = table + [-1] * (len(columns) - len(table))
            changes.entries += [(b, column, padded[column]) for column in columns]
        return changes

    def _shared(self, b: int, first_open: int) -> list[int]:
        table = self.tables[b]
        return [j for j in range(first_open, len(table)) if self.users[table[j]] > 1]

    def _take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self.users[page] -= 1
        if self.users[page] == 0:
            self.free.append(page)
