"""Results as lines of JSON, one a run, in files of one folder."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read(folder: Path) -> dict[str, Line]:
    """All lines of all files, by the run's identity.

    A last line that was cut off as it was written is left out: that run is made again.
    """
    found: dict[str, Line] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):
                line = json.loads(text)
                found[line["id"]] = line
    return found


def append(file: Path, line: Line) -> None:
    """Writes one line, in the place of one that was cut off, if there is one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        stream.seek(0)
        whole = stream.read().rfind(b"\n") + 1
        stream.truncate(whole)
        stream.write(json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other drivers off the folder: two of them would make the same runs twice.

    Raises:
        BlockingIOError: there is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another driver writes to {folder}") from error
        yield
    finally:
        os.close(held)
