"""The command line. Results go to stdout; progress, warnings and errors to stderr."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import streamgmm
from streamgmm import demo as demonstration
from streamgmm.checks import RULES
from streamgmm.covariance import STRUCTURES
from streamgmm.errors import MissingPackageError, ParameterError, StreamGMMError
from streamgmm.prediction import is_array, write_rows
from streamgmm.sources import open_source, uninterrupted

#: Arguments of open_source that errors advise, alone or in a call of it, and that are options here.
ADVICE = re.compile(r"""(open_source\(\.\.\., )?\b(array|nan_policy|missing_chunks|decode)=(["']?)(\w+)\3(?(1)\))""")
#: Arguments of update that reports and errors advise, or speak of.
SWITCHES = re.compile(r"\b(stop|flush|batch_id)=(ROWS|True|NAME)")
SPOKEN = re.compile(r"(?<![-\w])(stop and flush|stop|batch_id)(?= (are|is|must|names)\b)")
#: What is meant as a number of rows, and not as the name of an attribute.
NUMBER = re.compile(r"[+-]?\d{1,30}")
#: The exit code of a command that Ctrl-C ended, as shells count it: 128 + SIGINT.
INTERRUPTED = 130

stderr = Console(stderr=True)
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Gaussian mixtures by EM for data larger than memory.",
)

Store = Annotated[str, typer.Argument(metavar="STORE", help="A zarr store: its path or URL.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A model file that fit wrote.")]
ArrayName = Annotated[str | None, typer.Option("--array", help="The array to read, where STORE is a group of arrays.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Components = Annotated[int, typer.Option("-k", "--n-components", help="Components of the mixture.")]
NanPolicy = Annotated[str, typer.Option(help="raise: refuse rows with NaN. omit: leave them out.")]
MissingChunks = Annotated[
    str, typer.Option(help="refuse: chunks that STORE does not hold are an error. fill: they are its fill value.")
]
Decode = Annotated[
    str, typer.Option(help="refuse: packed values are an error. cf: apply scale_factor, add_offset and _FillValue.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed and the same rows give the same model.")]


def main() -> None:
    """The entry point. What the encoding of a terminal does not have is shown as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()


# -- commands ------------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False) -> None:
    if version:
        typer.echo(f"streamgmm {streamgmm.__version__}")
        raise typer.Exit


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where to write.")] = Path("streamgmm-demo"),
    rows: Annotated[int, typer.Option("--rows", min=1_000, help="Rows to generate.")] = 2_000_000,
    seed: Seed = 0,
) -> None:
    """Write rows with known truth to a zarr store, fit them, and compare.

    Example: streamgmm demo --rows 200000
    """
    with _plain_speech():
        files, truth = demonstration.claim(directory), demonstration.known_mixture(seed)
        array = demonstration.new_store(files.rows, truth, rows)
        size = f"{array.nbytes / 1e6:.3g} MB in {array.nchunks} chunks"
        typer.echo(
            f"Writing {rows:,} rows x {array.shape[1]} features {array.dtype} ({size}) to {files.rows}", err=True
        )
        with _bar("writing", rows) as written:
            demonstration.fill(array, truth, seed, written)
        with _passes_shown():
            estimate = demonstration.matched(demonstration.fit(files, seed), truth)
        typer.echo(demonstration.comparison(truth, estimate))
        typer.echo(f"\n{demonstration.verdict(truth, estimate, rows)}")
        typer.echo(f"\nRows:    {files.rows}\nModel:   {files.model}")
        try:
            demonstration.draw_picture(files, truth, estimate)
            typer.echo(f"Picture: {files.picture}")
        except MissingPackageError as error:
            typer.echo(f"No picture: {error}", err=True)
        typer.echo(f"Next:    streamgmm info {files.model}")


@app.command()
def fit(
    store: Store,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="MODEL", help="The model file to write.")],
    n_components: Components = 1,
    array: ArrayName = None,
    covariance_type: Annotated[str, typer.Option(help=f"One of {', '.join(STRUCTURES)}.")] = "full",
    tol: Annotated[
        float | None,
        typer.Option(help="How near the optimum to end, nats a row; by default a tenth of the statistical error."),
    ] = None,
    reg_covar: Annotated[float, typer.Option(help="Added to every variance, in the data's units squared.")] = 1e-6,
    max_iter: Annotated[int, typer.Option(help="Most passes over the rows.")] = 100,
    n_init: Annotated[int, typer.Option(help="Starts; all are tried on a sample, and the best one is kept.")] = 1,
    init_params: Annotated[str, typer.Option(help=f"How starts are found: {RULES['init_params'].words}.")] = "auto",
    solver: Annotated[str, typer.Option(help=f"How passes are made: {RULES['solver'].words}.")] = "auto",
    sample_rows: Annotated[int | None, typer.Option(help="Rows of the sample; by default as many as pay.")] = None,
    compute_dtype: Annotated[
        str, typer.Option(help=f"In what passes are computed: {RULES['compute_dtype'].words}.")
    ] = "float64",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A file that is written after every read; the same command goes on from it.")
    ] = None,
    nan_policy: NanPolicy = "raise",
    missing_chunks: MissingChunks = "refuse",
    decode: Decode = "refuse",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Learn a mixture from the rows of a zarr array and save it.

    Example: streamgmm fit rows.zarr -k 5 -o model.sgmm
    """
    with _plain_speech():
        if output.is_dir():
            raise ParameterError(f"{output} is a folder, but a model is one file. Give the name of a file with -o.")
        _require_free(output, store, overwrite)
        if checkpoint is not None:
            _require_beside(checkpoint, store, "--checkpoint")
            if checkpoint.resolve() == output.resolve():
                raise ParameterError(f"{checkpoint} would be checkpoint and model. Choose another --checkpoint.")
        model = streamgmm.GaussianMixture(
            n_components,
            covariance_type=covariance_type,
            tol=tol,
            reg_covar=reg_covar,
            max_iter=max_iter,
            n_init=n_init,
            init_params=init_params,
            solver=solver,
            sample_rows=sample_rows,
            compute_dtype=compute_dtype,
            random_state=seed,
        )
        with _passes_shown():
            source = open_source(
                store, array=array, nan_policy=nan_policy, missing_chunks=missing_chunks, decode=decode
            )
            model.fit(source, checkpoint=checkpoint)
        model.save(output)
        typer.echo(f"{output}: {model.describe()}")


@app.command()
def update(
    store: Store,
    model: Model,
    array: ArrayName = None,
    batch_id: Annotated[str | None, typer.Option(help="Learn all of STORE as one batch of this name, once.")] = None,
    stop: Annotated[
        str | None, typer.Option(help="Rows that are written, or the attribute of the array that says so.")
    ] = None,
    flush: Annotated[bool, typer.Option("--flush", help="Learn a rest of less than a chunk too.")] = False,
    nan_policy: NanPolicy = "raise",
    missing_chunks: Annotated[
        str, typer.Option(help="wait: rows behind a missing chunk wait. fill: it is the fill value. refuse: an error.")
    ] = "wait",
    decode: Decode = "refuse",
) -> None:
    """Learn the rows of a zarr array that MODEL has not learned yet, each once, and replace MODEL.

    Example: streamgmm update rows.zarr model.sgmm --flush
    """
    with _plain_speech():
        if batch_id is not None and missing_chunks == "wait":
            missing_chunks = "refuse"
        source = open_source(store, array=array, nan_policy=nan_policy, missing_chunks=missing_chunks, decode=decode)
        limit = int(stop) if stop is not None and NUMBER.fullmatch(stop) else stop
        learner = _loaded(model, streamgmm.GaussianMixture, "a model")
        with _passes_shown():
            report = learner.update(source, batch_id=batch_id, stop=limit, flush=flush, checkpoint=model)
        typer.echo(f"{model}: {_in_options(str(report))}")


@app.command()
def statistics(
    store: Store,
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="STATISTICS", help="The file to write.")],
    array: ArrayName = None,
    nan_policy: NanPolicy = "raise",
    missing_chunks: MissingChunks = "refuse",
    decode: Decode = "refuse",
    overwrite: Overwrite = False,
) -> None:
    """Write what the rows of a zarr array say at the parameters of MODEL: numbers that add, and hold no row.

    Example: streamgmm statistics rows.zarr model.sgmm -o here.sgmm
    """
    with _plain_speech():
        _require_free(output, store, overwrite)
        source = open_source(store, array=array, nan_policy=nan_policy, missing_chunks=missing_chunks, decode=decode)
        taken = _with_mixture(model).statistics(source)
        taken.save(output)
        typer.echo(f"{output}: {taken}")


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(metavar="STATISTICS...", help="Files that statistics wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="MODEL", help="The model file to write.")],
    reg_covar: Annotated[float, typer.Option(help="Added to every variance, in the data's units squared.")] = 1e-6,
    overwrite: Overwrite = False,
) -> None:
    """Make the next model from the statistics of all sites: one step of EM on rows that stay where they are.

    Example: streamgmm merge here.sgmm there.sgmm -o model.sgmm
    """
    with _plain_speech():
        if output.exists() and not overwrite:
            raise ParameterError(f"{output} exists already. Add --overwrite to replace it, or choose another -o.")
        once = {part.resolve() for part in parts}
        if len(once) < len(parts):
            raise ParameterError(
                f"{len(parts)} files of statistics are given, but only {len(once)} different ones: the rows of a site "
                "would count more than once. Name each file once."
            )
        merged = reduce(add, (_loaded(part, streamgmm.Statistics, "statistics") for part in parts))
        model = streamgmm.GaussianMixture.from_statistics(merged, reg_covar=reg_covar)
        model.save(output)
        typer.echo(f"{output}: {merged}\n{model.describe()}")


@app.command()
def predict(
    store: Store,
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="LABELS", help="The zarr array to write.")],
    array: ArrayName = None,
    nan_policy: NanPolicy = "raise",
    missing_chunks: MissingChunks = "refuse",
    decode: Decode = "refuse",
    overwrite: Overwrite = False,
) -> None:
    """Write the component of every row to a zarr array with the row chunks of the store; -1 for rows left out.

    Example: streamgmm predict rows.zarr model.sgmm -o labels.zarr
    """
    with _plain_speech():
        _require_free(output, store, overwrite)
        _require_zarr_or_nothing(output)
        source = open_source(store, array=array, nan_policy=nan_policy, missing_chunks=missing_chunks, decode=decode)
        labels = _with_mixture(model).predict(source)
        with _bar("predicting", labels.shape[0]) as written:
            stored = write_rows(labels, output, overwrite=overwrite, written=written)
        chunks = f"{labels.numblocks[0]:,} chunk{'s' * (labels.numblocks[0] != 1)}"
        typer.echo(f"{output}: {labels.shape[0]:,} labels {labels.dtype} in {chunks} of {labels.chunks[0][0]:,}")
        if nan_policy == "omit":
            step = labels.chunks[0][0]
            left_out = sum(_n_below_zero(stored, i, i + step) for i in range(0, labels.shape[0], step))
            typer.echo(f"{left_out:,} rows have NaN and the label -1")


@uninterrupted()
def _n_below_zero(labels: Any, start: int, stop: int) -> int:
    return int((np.asarray(labels[start:stop]) < 0).sum())


@app.command()
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A model file or a zarr store.")],
    n_components: Components = 8,
    array: ArrayName = None,
    nan_policy: NanPolicy = "raise",
    missing_chunks: MissingChunks = "refuse",
    decode: Decode = "refuse",
) -> None:
    """Describe a model file, or a zarr store and what a fit of it would read.

    Example: streamgmm info model.sgmm
    """
    with _plain_speech():
        if Path(path).is_file():
            found = streamgmm.load(path)
            typer.echo(f"{path}: {found if isinstance(found, streamgmm.Statistics) else _in_words(found)}")
        else:
            source = open_source(path, array=array, nan_policy=nan_policy, missing_chunks=missing_chunks, decode=decode)
            _show_store(source, n_components)


# -- how it speaks -------------------------------------------------------------------------------------------------


@contextmanager
def _plain_speech() -> Iterator[None]:
    """Warnings and expected errors as one line each on stderr; exit code 1 after an error, 130 after Ctrl-C."""
    said = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            typer.echo(f"Warning: {_one_line(str(message))}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        try:
            yield
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # nobody reads any more, which typer ends quietly
        except (StreamGMMError, OSError) as error:
            typer.echo(f"Error: {_sentence(error)}", err=True)
            raise typer.Exit(1) from None


def _sentence(error: Exception) -> str:
    """An error in the words of the command line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    text = _in_options(_one_line(str(error)))
    return re.sub(r"^[a-z]+(_[a-z]+)*(?= must be )", lambda found: f"--{found[0].replace('_', '-')}", text)


def _in_options(text: str) -> str:
    """Advice for Python in the words of the command line."""
    text = ADVICE.sub(lambda found: f"--{found[2].replace('_', '-')} {found[4]}", text)
    text = SWITCHES.sub(lambda found: f"--{found[1].replace('_', '-')} {found[2]}".removesuffix(" True"), text)
    return SPOKEN.sub(lambda found: f"--{found[0]}".replace("_", "-").replace("and ", "and --"), text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


class _Lines(logging.Handler):
    """Log records as plain lines above a spinner."""

    def emit(self, record: logging.LogRecord) -> None:
        stderr.print(record.getMessage(), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _passes_shown() -> Iterator[None]:
    """What the log "streamgmm" says, the plan and a line a pass, goes to stderr while this is open."""
    log, handler = logging.getLogger("streamgmm"), _Lines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with stderr.status("reading"):
            yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over rows on a terminal, nothing elsewhere; yields what advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda rows: progress.advance(task, rows)


# -- models and stores ---------------------------------------------------------------------------------------------


def _in_words(model: Any) -> str:
    """The table of a model; one without a mixture says what it waits for."""
    return str(model.describe() if hasattr(model, "weights_") else repr(model).splitlines()[-1])


def _loaded(path: Path, kind: type, word: str) -> Any:
    """What a file holds; ParameterError where that is something else than the word says."""
    found = streamgmm.load(path)
    if not isinstance(found, kind):
        raise ParameterError(f"{path} holds a {type(found).__name__}, but {word} was expected there.")
    return found


def _with_mixture(path: Path) -> Any:
    """The model of a file; ParameterError where it has no mixture yet."""
    model = _loaded(path, streamgmm.GaussianMixture, "a model")
    if not hasattr(model, "weights_"):
        raise ParameterError(f"{path}: {_in_words(model)}. Give it more rows first: streamgmm update STORE {path}.")
    return model


def _show_store(source: Any, n_components: int) -> None:
    stored = source.array
    shards = "" if stored.shards is None else f" in shards {stored.shards}"
    typer.echo(f"{source.name}: shape {stored.shape}, {stored.dtype}, chunks {stored.chunks}{shards}")
    plan = streamgmm.GaussianMixture(n_components).plan(source)
    typer.echo(f"Fitting {n_components} components would read, a pass: {plan}")


# -- outputs -------------------------------------------------------------------------------------------------------


def _require_free(output: Path, store: str, overwrite: bool) -> None:
    """ParameterError, before any work, where the output has no folder, is taken, or would replace the rows."""
    if not output.parent.is_dir():
        raise ParameterError(f"There is no folder {output.parent} to write {output.name} into. Make it first.")
    _require_beside(output, store, "-o")
    if output.exists() and not overwrite:
        raise ParameterError(f"{output} exists already. Add --overwrite to replace it, or choose another -o.")


def _require_beside(file: Path, store: str, option: str) -> None:
    """ParameterError where a file would be written over the rows, or among their chunks."""
    rows = Path(store.removeprefix("file://")).resolve()
    if rows.is_relative_to(file.resolve()) or file.resolve().is_relative_to(rows):
        raise ParameterError(f"{file} holds the rows that would be read. Choose another {option}.")


def _require_zarr_or_nothing(output: Path) -> None:
    """ParameterError where labels would replace anything but a zarr array."""
    if output.exists() and not is_array(output):
        raise ParameterError(f"{output} is not a zarr array, so it is not replaced. Choose another -o.")


if __name__ == "__main__":
    main()
