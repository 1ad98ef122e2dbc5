"""Runs what a study asks for and is not there yet; see the package's docstring."""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import fmean
from typing import Any

from replication import lines
from replication.grid import Configuration, Study, identity, is_of
from replication.lines import Line
from replication.studies import STUDIES, select
from replication.train import Places, finetune

SAID = (
    "learning_rate",
    "weight_decay",
    "noise_scale",
    "noise_unit",
    "uncertainty",
    "sensitivity",
    "neftune_alpha",
    "sage_beta",
    "seed",
)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "replication"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m replication",
        description="Fine-tunes over a grid, run by run; a stopped one goes on by the same command.",
    )
    parser.add_argument("study", nargs="+", help=f"one or more of {', '.join(STUDIES)}")
    parser.add_argument("--only", metavar="REGEX", default="", help="the studies whose names match")
    parser.add_argument("--models", help="the folder with the models' folders: python -m replication.models")
    parser.add_argument("--data_dir", help="GLUE's folder, as in run_glue.py")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where the lines are (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--plan", action="store_true", help="say what there is to do, and do nothing")
    parser.add_argument("--minutes", type=float, help="begin no run after this many minutes")
    options = parser.parse_args(argv)
    try:
        studies = select(options.study, options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.plan:
        print(plan(studies, lines.read(options.out), options.processes))
        return
    if not options.models or not options.data_dir:
        parser.error("--models and --data_dir are needed to run something")
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    with lines.alone(options.out):
        runner = Runner(
            Places(options.models, options.data_dir),
            options.out,
            options.processes,
            options.threads,
            deadline,
        )
        runner.make(studies)


class Runner:
    """Makes runs and writes their lines."""

    def __init__(
        self, places: Places, out: Path, processes: int, threads: int, deadline: float | None = None
    ) -> None:
        self.places, self.out, self.processes, self.threads = places, out, processes, threads
        self.deadline = deadline
        self.lines = lines.read(out)

    def make(self, studies: Sequence[Study]) -> None:
        """Study by study: first the trials, then what they choose.

        With several processes a study does not wait for the last run of the one before it: whoever is free
        takes the next run that is known.

        Raises:
            RuntimeError: runs failed. The others were made.
        """
        if self.processes == 1:
            pool: Executor = Inline()
        else:
            pool = ProcessPoolExecutor(self.processes, multiprocessing.get_context("spawn"))
        failed: dict[str, Exception] = {}
        jobs: dict[Future[Line], tuple[Study, Configuration]] = {}
        with pool:
            while True:
                busy = {identity(run) for _, run in jobs.values()}
                while len(jobs) < self.processes and self._in_time():
                    if (found := self._next(studies, busy | failed.keys())) is None:
                        break
                    jobs[pool.submit(finetune, found[1], self.places, self.threads)] = found
                    busy.add(identity(found[1]))
                if not jobs:
                    break
                for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                    study, run = jobs.pop(job)
                    try:
                        self._keep(study, job.result())
                    except Exception as error:
                        failed[identity(run)] = error
                        print(f"{study.name} {run} failed: {error!r}", flush=True)
        if failed:
            name, error = next(iter(failed.items()))
            raise RuntimeError(f"{len(failed)} runs failed, the first of them {name}") from error

    def _next(self, studies: Sequence[Study], besides: Container[str]) -> tuple[Study, Configuration] | None:
        """The first run that has no line and is not among `besides`: trials first, then what they chose."""
        for study in studies:
            for run in (*study.trials(), *study.finals(study.choose(self.lines))):
                name = identity(run)
                if name not in self.lines and name not in besides:
                    return study, run
        return None

    def _keep(self, study: Study, line: Line) -> None:
        lines.append(self.out / f"{study.name}.jsonl", line)
        self.lines[line["id"]] = line
        print(said(study, line), flush=True)

    def _in_time(self) -> bool:
        return self.deadline is None or time.monotonic() < self.deadline


class Inline(Executor):
    """One run at a time, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def said(study: Study, line: Line) -> str:
    scores = {split: {k: round(v, 4) for k, v in of.items()} for split, of in line["metrics"].items()}
    run = {k: v for k, v in line["run"].items() if k in SAID and v is not None}
    return f"{study.name} {line['run']['method']} {run} {scores} {line['seconds']['all']:.0f} s"


def plan(studies: Sequence[Study], found: dict[str, Line], processes: int = 1) -> str:
    """A row a study: its runs, how many are there, and how long the others will take.

    A run takes what those of its study's setting took, whatever the method; where there are none, what the
    study expects. Which runs a method's trials will choose is not known before, but how many are.
    """
    rows = [f"{'study':<34} {'runs':>5} {'done':>5} {'left':>5} {'s a run':>8} {'hours left':>10}"]
    total = [0, 0, 0.0]
    for study in studies:
        wanted = study.trial_count() + study.final_count()
        runs = [*study.trials(), *study.finals(study.choose(found))]
        done = sum(identity(run) in found for run in runs)
        seconds = seconds_a_run(study, found)
        hours = (wanted - done) * seconds / 3600 / processes
        rows.append(
            f"{study.name:<34} {wanted:>5} {done:>5} {wanted - done:>5} {seconds:>8.1f} {hours:>10.2f}"
        )
        total = [total[0] + wanted, total[1] + done, total[2] + hours]
    rows.append(f"{'all':<34} {total[0]:>5} {total[1]:>5} {total[0] - total[1]:>5} {'':>8} {total[2]:>10.2f}")
    return "\n".join(rows)


def seconds_a_run(study: Study, found: dict[str, Line]) -> float:
    taken = [line["seconds"]["all"] for line in found.values() if is_of(line["run"], study.setting)]
    return fmean(taken) if taken else study.seconds


if __name__ == "__main__":
    main()
