"""What a preparation leaves out because it cannot be read: lines, images, files and the like.

With `--on-fault stop` the first such item ends the preparation; with `skip` it is left out and
recorded, up to `--max-skipped`. What is left out depends on the input only, never on the number of
processes, and neither does the list, `skipped.jsonl`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from hg_scale.atomic_write import write_durable
from hg_scale.data.errors import DataError

T = TypeVar("T")

SKIPPED_FILE = "skipped.jsonl"
MAX_SKIPPED = 1000

ItemKind = Literal["line", "document", "image", "part", "file"]

_SHOWN = 3  # items that the report repeats


class SkippedItem(NamedTuple):
    """An item that was left out."""

    file: str
    kind: ItemKind
    position: int | None  # first byte of a line, document or part, number of an image; None: a file
    reason: str

    @property
    def where(self) -> str:
        """The file, and where the item is in it."""
        if self.position is None:
            return self.file
        at = "image" if self.kind == "image" else f"{self.kind} at byte"
        return f"{self.file}, {at} {self.position}"


@dataclass(frozen=True)
class SkipPolicy:
    """What to do about an item that cannot be read."""

    on_fault: Literal["stop", "skip"] = "stop"
    max_skipped: int = MAX_SKIPPED

    @property
    def limit(self) -> int:
        """Items that may be left out."""
        return self.max_skipped if self.on_fault == "skip" else 0


class SkippingRefused(DataError):
    """An item cannot be read, and the policy is to stop."""


class TooManySkipped(SkippingRefused):
    """More items cannot be read than may be left out."""


class PartError(DataError):
    """A part of a file cannot be read; other parts may be readable."""


class Unreadable(Exception):
    """A file or a part of it, of which some documents were read, cannot be read to its end."""

    def __init__(self, reason: DataError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class SkipLog:
    """Records the items that are left out, and counts other remarks for the report.

    `before` items were left out elsewhere; they count towards the limit of the policy.
    """

    def __init__(self, policy: SkipPolicy, before: int = 0) -> None:
        self.policy = policy
        self.items: list[SkippedItem] = []
        self.remarks: Counter[str] = Counter()
        self._before = before
        self._known: set[tuple[str, str, int | None]] = set()

    def skip(self, path: Path | str, kind: ItemKind, position: int | None, error: object) -> None:
        """Leave an item out. Raises DataError where the policy forbids it."""
        if self.policy.on_fault == "stop":
            raise SkippingRefused(str(error))
        file = str(path)
        self.add(SkippedItem(file, kind, position, str(error).removeprefix(f"{file}: ")))
        self.check()

    def add(self, item: SkippedItem) -> None:
        """Record an item, once: every part of a file that cannot be opened reports the file."""
        if item[:3] not in self._known:
            self._known.add(item[:3])
            self.items.append(item)

    def skip_part(self, path: str, begin: int | None, error: DataError) -> None:
        """Leave out a file, or the part of it that begins at `begin` and is read as one."""
        if isinstance(error, PartError) and begin is not None:
            self.skip(path, "part", begin, error)
        else:
            self.skip(path, "file", None, error)

    def guard(
        self,
        path: str,
        begin: int | None,
        documents: Iterator[T],
        problem: Callable[[], DataError | None] = lambda: None,
    ) -> Iterator[T]:
        """Yield the documents of a file or of a part of it; leave it out if it cannot be read.

        Raises Unreadable where that shows only after some documents. `problem` returns an error
        that ends the preparation for other reasons.
        """
        some = False
        try:
            for document in documents:
                some = True
                yield document
        except DataError as error:
            if isinstance(error, SkippingRefused) or error is problem():
                raise
            if some and self.policy.on_fault == "skip":
                raise Unreadable(error) from None
            self.skip_part(path, begin, error)

    def check(self) -> None:
        """Raise DataError where more items were left out than the policy permits."""
        count = self._before + len(self.items)
        if count <= self.policy.limit:
            return
        if self.policy.on_fault == "stop":
            raise TooManySkipped(
                f"--on-fault stop: an earlier start with --on-fault skip left out {self._counts()};"
                " set it again, or remove the output folder to start over"
            )
        last = self.items[-1]
        raise TooManySkipped(
            f"{last.where}: {last.reason}. With this, {count} items cannot be read, more than "
            f"--max-skipped {self.policy.max_skipped}: fix the input, or raise --max-skipped"
        )

    def summary(self) -> str:
        """Return `; left out: 2 lines, the first: ...` for an error message, or nothing."""
        if not self.items:
            return ""
        first = self.items[0]
        return f"; left out: {self._counts()}, the first: {first.where}: {first.reason}"

    def _counts(self) -> str:
        """Return `2 files, 1 line`."""
        counts = Counter(item.kind for item in self.items)
        return ", ".join(f"{n:,} {kind}{'s' * (n > 1)}" for kind, n in sorted(counts.items()))

    def write(self, path: Path) -> None:
        """Write the log for `read`; without content the file is removed."""
        if self.items or self.remarks:
            write_durable(path, json.dumps({"items": self.items, "remarks": self.remarks}) + "\n")
        else:
            path.unlink(missing_ok=True)

    def read(self, path: Path) -> None:
        """Merge a log that `write` wrote, if there is one."""
        if path.exists():
            content = json.loads(path.read_text())
            for item in content["items"]:
                self.add(SkippedItem(*item))
            self.remarks.update(content["remarks"])

    def write_list(self, path: Path) -> None:
        """Write the list for the user: a line of JSON per item. Without items there is none."""
        if self.items:
            write_durable(path, "".join(f"{json.dumps(item._asdict())}\n" for item in self.items))
        else:
            path.unlink(missing_ok=True)

    def report(self, listed_in: Path) -> Iterator[str]:
        """Yield lines for the user: the remarks, the number of items and the first ones."""
        for remark, count in sorted(self.remarks.items()):
            yield f"  {count:,} {remark}"
        if self.items:
            yield f"  left out {self._counts()}: {listed_in}"
            for item in self.items[:_SHOWN]:
                yield f"    {item.where}: {item.reason}"
            if len(self.items) > _SHOWN:
                yield f"    and {len(self.items) - _SHOWN:,} more"


STOP = SkipLog(SkipPolicy())  # raises every error


def read_list(path: Path) -> list[SkippedItem]:
    """Return the items of a list; none where there is no list. Raises DataError."""

    def item(line: str) -> SkippedItem:
        entry: dict[str, Any] = json.loads(line)
        return SkippedItem(**entry)

    try:
        return [item(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: is not a list of skipped items ({reason}); remove it") from None
