"""Runs dieharder and TestU01 on the random words, if they are installed.

words.cpp writes the words in the order in which the kernels use them; testu01.cpp passes them to TestU01.
PractRand's `RNG_test stdin32` reads the same stream; no package of Debian or PyPI has it.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import TypedDict

from scipy import stats

HERE = Path(__file__).parent
STREAMS = ("training", "noise", "rounding", "steps", "tensors", "seeds")
TESTU01 = ["-ltestu01", "-ltestu01probdist", "-ltestu01mylib", "-lm"]
DIEHARDER = re.compile(r"^\s*(\S+)\|\s*(\d+)\|\s*(\d+)\|\s*(\d+)\|\s*([\d.]+)\|\s*(\w+)", re.MULTILINE)


class Battery(TypedDict):
    """One battery on one stream. `least` and `greatest`: p-values. `p`: that of the more extreme of the two,
    two-sided and times the number of tests. `uniformity`: Kolmogorov-Smirnov's p-value for all of them."""

    battery: str
    stream: str
    order: str
    tests: int
    least: float
    greatest: float
    p: float
    uniformity: float
    complete: bool
    verdicts: dict[str, int]
    values: list[tuple[str, float]]


def compile_(folder: Path, flags: list[str]) -> dict[str, Path]:
    """The programs that could be built: `words`, and `testu01` if its library is installed."""
    built = {}
    for name, libraries in (("words", []), ("testu01", TESTU01)):
        command = ["g++", "-O3", "-march=native", "-std=c++17", *flags, str(HERE / f"{name}.cpp")]
        done = subprocess.run(
            [*command, "-o", str(folder / name), *libraries], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            built[name] = folder / name
        elif name == "words":
            raise RuntimeError(done.stderr)
    return built


def run(
    battery: str, stream: str, order: str, programs: dict[str, Path], folder: Path, seed: int
) -> Path | None:
    """Writes the battery's report to a file; returns None if it is not installed."""
    if battery == "dieharder":
        if shutil.which("dieharder") is None:
            return None
        command = ["dieharder", "-a", "-g", "200"]
    else:
        if "testu01" not in programs:
            return None
        command = [str(programs["testu01"]), battery, order]
    file = folder / f"{battery}-{stream}-{order}.txt"
    with file.open("w", encoding="utf-8") as out:
        words = subprocess.Popen([str(programs["words"]), stream, str(seed)], stdout=subprocess.PIPE)
        subprocess.run(command, stdin=words.stdout, stdout=out, stderr=subprocess.DEVNULL, check=False)
        words.kill()
        words.wait()
    return file


def read(file: Path) -> Battery:
    """Reads a battery's report. The file's name has the battery, the stream and the order of bits."""
    battery, stream, order = file.stem.split("-")
    text = file.read_text(encoding="utf-8")
    verdicts: dict[str, int] = {}
    if battery == "dieharder":
        rows = [(f"{name} {n}", float(p), verdict) for name, n, _, _, p, verdict in DIEHARDER.findall(text)]
        complete = "dab_monobit2" in text  # its last test
    else:
        found = re.findall(r"^P \d+ (\S+) (.*)$", text, re.MULTILINE)
        rows = [(name, float(p), "PASSED" if 1e-3 < float(p) < 1 - 1e-3 else "WEAK") for p, name in found]
        complete = bool(rows)
    for _, _, verdict in rows:
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    values = [p for _, p, _ in rows]
    least, greatest = min(values), max(values)
    # TestU01 gives the upper tail: near 1 is as bad as near 0. dieharder prints eight digits.
    extreme = min(least, max(1 - greatest, 1e-8))
    return {
        "battery": battery,
        "stream": stream,
        "order": order,
        "tests": len(values),
        "least": least,
        "greatest": greatest,
        "p": min(1.0, 2 * extreme * len(values)),
        "uniformity": float(stats.kstest(values, "uniform").pvalue),
        "complete": complete,
        "verdicts": verdicts,
        "values": [(name, p) for name, p, _ in rows],
    }
