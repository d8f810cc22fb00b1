"""A growing JSON Lines file, read once: each call gives what is new since the last one. Nothing is read twice, nothing is written.

Bytes flow in, dictionaries flow out. A line that is not complete yet waits for its end; one that a kill cut short is passed over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lossguard.sinks import SCHEMA

NOT_ALLOWED = "{} cannot be read ({}); ask whoever runs the job for the right to"
HEAD = 96  # first bytes by which a file is known again
CHUNK = 1 << 20  # bytes held at once
BLOCK = 1 << 16  # bytes at a file's end in which its newest losses are looked for first
FARTHEST = 1 << 23  # and at most; a line of samples is far shorter
_LOSSES = re.compile(rb'\{"kind":"losses","first":(\d+),"total":\[([^\]]*)\]')


class Tail:
    """One file. ``consumed`` counts the bytes ever read, ``born`` how often the file was begun anew (replaced, or cut).

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"; tail = Tail(path)
    >>> _ = path.write_text('{"kind":"losses","first":0}\\n{"kind":"los')
    >>> list(tail.read()), list(tail.read())
    ([{'kind': 'losses', 'first': 0}], [])
    >>> with path.open("a") as file: _ = file.write('ses","first":1}\\n')
    >>> list(tail.read())
    [{'kind': 'losses', 'first': 1}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.consumed, self.born, self.size, self.changed = 0, 0, 0, 0.0
        self._offset, self._rest = 0, b""
        self._identity: tuple[int, int] | None = None
        self._head = b""  # the file's first bytes, with the time of the run in them: a disk gives a new file the old one's number again

    @property
    def behind(self) -> int:
        """Bytes that were there at the last look and are not read yet."""
        return max(0, self.size - self._offset)

    def look(self) -> bool:
        """Whether the file is there; notices that it was begun anew. Reads nothing of it. ``ValueError`` where that is not allowed."""
        try:
            found = self.path.stat()
        except PermissionError as error:
            raise ValueError(NOT_ALLOWED.format(self.path, error.strerror)) from None
        except OSError:  # not there yet, or a far disk that does not answer now
            self.size = 0
            return False
        identity = found.st_dev, found.st_ino
        grown = found.st_size != self.size or found.st_mtime != self.changed
        if self._offset and (identity != self._identity or found.st_size < self._offset or (grown and self._is_another())):
            self._offset, self._rest, self._head = 0, b"", b""
            self.born += 1
        self._identity, self.size, self.changed = identity, found.st_size, found.st_mtime
        return True

    def read(self, budget: int | None = None) -> Iterator[dict[str, Any]]:
        """The new lines, oldest first, of at most ``budget`` bytes. Raises ``ValueError`` for a newer schema, or where reading is not allowed."""
        if not self.look() or not self.behind:
            return
        wanted = self.behind if budget is None else min(self.behind, budget)
        while wanted > 0:
            new = self._more(min(wanted, CHUNK))
            if not new:
                return
            wanted -= len(new)
            *lines, rest = (self._rest + new).split(b"\n")
            self._rest = rest
            for text in lines:
                line = _parsed(text)
                if line is None:
                    continue
                if line["kind"] == "header" and line.get("schema", 0) > SCHEMA:
                    raise ValueError(f"{self.path} has schema {line['schema']}, this version reads up to {SCHEMA}; update lossguard")
                yield line

    def _more(self, count: int) -> bytes:
        new = self._bytes(self._offset, count)
        if self._offset < HEAD:
            self._head = (self._head + new)[:HEAD]
        self._offset += len(new)
        self.consumed += len(new)
        return new

    def _is_another(self) -> bool:
        first = self._bytes(0, len(self._head))
        return bool(first) and first != self._head

    def _bytes(self, begin: int, count: int) -> bytes:
        """Bytes of the file; none where it cannot be read now. ``ValueError`` where that is not allowed."""
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                return file.read(count)
        except PermissionError as error:
            raise ValueError(NOT_ALLOWED.format(self.path, error.strerror)) from None
        except OSError:
            return b""


def newest_loss(path: Path) -> tuple[int, float] | None:
    """The last step and loss in a file of rows, found from its end; None where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            block = BLOCK
            while True:
                file.seek(max(0, size - block))
                found = _LOSSES.findall(file.read(block))
                if found and found[-1][1]:
                    first, total = int(found[-1][0]), found[-1][1].split(b",")
                    return first + len(total) - 1, float(total[-1].strip(b'" '))
                if block >= min(size, FARTHEST):
                    return None
                block *= 8
    except (OSError, ValueError):
        return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "kind" in line else None
