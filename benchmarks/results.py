"""Runs over cells and seeds whose results are stored one by one, so that a run that is cut off goes on where it was."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import dask
from cells import Cell, MissingDataError, cells_like

#: One result: plain values, among them "cell", "seed" and "method".
Line = dict[str, Any]
#: Measures a cell and a seed by the methods that are named, one line each.
Work = Callable[[Cell, int, list[str]], Iterator[Line]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of all benchmarks over cells."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, required=True, help="file of JSON lines; what is in it is not run again")
    made.add_argument("--cells", nargs="+", default=["*"], help="names, or patterns such as 'gaussian-*-0.8'")
    made.add_argument("--seeds", type=int, help="seeds of each cell; without it 10, and 5 where d is 8")
    made.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    return made


def read(path: Path) -> list[Line]:
    """The lines of a file of results; none where there is no file yet."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a line that was cut off is measured anew


def append(path: Path, line: Line) -> None:
    """In one write, so that processes do not break each other's lines."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def measure(arguments: argparse.Namespace, work: Work, methods: list[str]) -> list[Line]:
    """Measure what is not stored yet; returns the lines of the cells and seeds that were asked for."""
    cells = cells_like(arguments.cells)
    wanted = {(cell.name, seed): cell for cell in cells for seed in range(arguments.seeds or cell.seeds)}
    done = {(line["cell"], line["seed"], line["method"]) for line in read(arguments.results)}
    tasks = []
    for (name, seed), cell in wanted.items():
        missing = [method for method in methods if (name, seed, method) not in done]
        if missing:
            tasks.append((work, cell, seed, missing, arguments.results))
    for said in _run(tasks, arguments.jobs):
        print(said, file=sys.stderr, flush=True)
    lines = read(arguments.results)
    return [line for line in lines if (line["cell"], line["seed"]) in wanted and line["method"] in methods]


def _run(tasks: list[tuple[Any, ...]], jobs: int) -> Iterable[str]:
    if jobs == 1:
        yield from (_task(*task) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_task, *task) for task in tasks]):
            yield future.result()


def _task(work: Work, cell: Cell, seed: int, methods: list[str], path: Path) -> str:
    """Measure and store; returns what to say of it."""
    began = time.perf_counter()
    try:
        with warnings.catch_warnings(), dask.config.set(scheduler="synchronous"):
            warnings.simplefilter("ignore")  # fits of a few passes do not converge, and need not
            for line in work(cell, seed, methods):
                append(path, {"cell": cell.name, "seed": seed, **line})
    except MissingDataError as reason:
        return f"{cell.name} skipped, no {reason}"
    return f"{cell.name} seed {seed}: {time.perf_counter() - began:.1f} s"
