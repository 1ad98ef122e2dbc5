"""Prints what a benchmark is doing meanwhile; otherwise it would be silent for minutes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

SECONDS = 10.0  # between two lines, where there is no terminal whose last line could change

Tell = Callable[[str], None]


@contextmanager
def progress(console: Console | None = None) -> Iterator[Tell]:
    """Gives a function that is called with what is being done now. On a terminal it shows one line, removed
    at the end; in a file or a pipe it writes a line now and then.

    Args:
        console: where to write; default: standard error, so that the result can be piped.
    """
    console = Console(stderr=True) if console is None else console
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, refresh_per_second=2) as line:
            task = line.add_task("starting ...", total=None)
            yield lambda doing: line.update(task, description=f"{doing} ...")
    else:
        yield _lines(console)


def _lines(console: Console) -> Tell:
    start = time.monotonic()
    last = -SECONDS

    def tell(doing: str) -> None:
        nonlocal last
        now = time.monotonic() - start
        if now - last >= SECONDS:
            last = now
            console.print(f"{now:4.0f} s: {doing} ...", markup=False, highlight=False, soft_wrap=True)

    return tell
