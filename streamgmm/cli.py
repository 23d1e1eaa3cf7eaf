"""The command line: demo, fit, predict, info. Results go to stdout; progress, warnings and errors to stderr."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import zarr
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

import streamgmm
from streamgmm.covariance import STRUCTURES
from streamgmm.errors import MissingPackageError, ParameterError, StreamGMMError
from streamgmm.plotting import draw, save_picture
from streamgmm.prediction import create_array, is_array, write_rows
from streamgmm.sources import open_source
from streamgmm.synthetic import Mixture, random_mixture

DEMO_COMPONENTS, DEMO_FEATURES, DEMO_SEPARATION = 5, 4, 4.0
DEMO_CHUNK_ROWS = 65_536
DEMO_TOL = 1e-6
#: The attribute that tells a store written by the demo, which it may replace, from one that is somebody's.
DEMO_MARK = "streamgmm-demo"
DEMO_FILES = ("rows.zarr", "model.sgmm", "mixture.png")
#: Features that a table shows; more do not fit a terminal.
MOST_COLUMNS = 4

stdout = Console()
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
Seed = Annotated[int, typer.Option("--seed", help="The same seed and the same rows give the same model.")]


def main() -> None:
    """The entry point."""
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
        store, model_path, picture = _demo_paths(directory)
        truth = random_mixture(DEMO_COMPONENTS, DEMO_FEATURES, DEMO_SEPARATION, seed)
        _write_demo_rows(store, truth, rows, seed)
        model = streamgmm.GaussianMixture(DEMO_COMPONENTS, tol=DEMO_TOL, random_state=seed)
        with _passes_shown():
            model.fit(str(store))
        model.save(model_path)
        order = truth.match(model.means_)
        estimate = Mixture(model.weights_[order], model.means_[order], model.covariances_[order])
        stdout.print(_comparison(truth, estimate))
        typer.echo(_verdict(truth, estimate, rows))
        drawn = _draw_demo(picture, store, truth, estimate)
        typer.echo(f"\nRows:    {store}\nModel:   {model_path}" + f"\nPicture: {picture}" * drawn)
        typer.echo(f"Next:    streamgmm info {model_path}")


@app.command()
def fit(
    store: Store,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="MODEL", help="The model file to write.")],
    n_components: Components = 1,
    array: ArrayName = None,
    covariance_type: Annotated[str, typer.Option(help=f"One of {', '.join(STRUCTURES)}.")] = "full",
    tol: Annotated[float, typer.Option(help="Stop when the log-likelihood a row changes by less.")] = 1e-3,
    reg_covar: Annotated[float, typer.Option(help="Added to every variance, in the data's units squared.")] = 1e-6,
    max_iter: Annotated[int, typer.Option(help="Most passes over the rows.")] = 100,
    n_init: Annotated[int, typer.Option(help="Starts; they share each pass and the best one is kept.")] = 1,
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
        model = streamgmm.GaussianMixture(
            n_components,
            covariance_type=covariance_type,
            tol=tol,
            reg_covar=reg_covar,
            max_iter=max_iter,
            n_init=n_init,
            random_state=seed,
        )
        with _passes_shown():
            model.fit(open_source(store, array=array))
        model.save(output)
        _show_model(model, output)


@app.command()
def predict(
    store: Store,
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="LABELS", help="The zarr array to write.")],
    array: ArrayName = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the component of every row to a zarr array with the row chunks of the store.

    Example: streamgmm predict rows.zarr model.sgmm -o labels.zarr
    """
    with _plain_speech():
        _require_free(output, store, overwrite)
        _require_zarr_or_nothing(output)
        labels = streamgmm.load(model).predict(open_source(store, array=array))
        with _bar("predicting", labels.shape[0]) as written:
            write_rows(labels, output, overwrite=overwrite, written=written)
        chunks = f"{labels.numblocks[0]:,} chunk{'s' * (labels.numblocks[0] != 1)}"
        typer.echo(f"{output}: {labels.shape[0]:,} labels {labels.dtype} in {chunks} of {labels.chunks[0][0]:,}")


@app.command()
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A model file or a zarr store.")],
    n_components: Components = 8,
    array: ArrayName = None,
) -> None:
    """Describe a model file, or a zarr store and what a fit of it would read.

    Example: streamgmm info model.sgmm
    """
    with _plain_speech():
        if Path(path).is_file() and not path.endswith(".zip"):
            _show_model(streamgmm.load(path), Path(path))
        else:
            _show_store(path, array, n_components)


# -- how it speaks -------------------------------------------------------------------------------------------------


@contextmanager
def _plain_speech() -> Iterator[None]:
    """Warnings and expected errors as one line each on stderr; exit code 1 after an error."""
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
        except (StreamGMMError, OSError) as error:
            typer.echo(f"Error: {_sentence(error)}", err=True)
            raise typer.Exit(1) from None


def _sentence(error: Exception) -> str:
    """An error in the words of the command line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return _one_line(str(error)).replace("array=NAME", "--array NAME")


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


def _show_model(model: Any, path: Path) -> None:
    k, d = model.means_.shape
    state = f"{'converged' if model.converged_ else 'not converged'} after {model.n_iter_} passes"
    typer.echo(f"{path}: {k} component{'s' * (k != 1)}, {model.covariance_type} covariances, {d} features")
    typer.echo(f"{state}, lower bound {model.lower_bound_:.6g} nats a row")
    dense = STRUCTURES[model.covariance_type](model.covariances_).dense(k, d)
    fitted = Mixture(model.weights_, model.means_, dense)
    names = [str(name) for name in getattr(model, "feature_names_in_", [f"feature {i}" for i in range(d)])]
    table = _table(["#"], names)
    for j, cells in enumerate(_cells(fitted)):
        table.add_row(str(j), *cells)
    stdout.print(table)
    typer.echo("Features are mean ± standard deviation." + _left_out(d))


def _left_out(d: int) -> str:
    return f" The first {MOST_COLUMNS} of {d} are shown." if d > MOST_COLUMNS else ""


def _show_store(path: str, array: str | None, n_components: int) -> None:
    source: Any = open_source(path, array=array)
    stored = source.array
    shards = "" if stored.shards is None else f" in shards {stored.shards}"
    typer.echo(f"{source.name}: shape {stored.shape}, {stored.dtype}, chunks {stored.chunks}{shards}")
    plan = streamgmm.GaussianMixture(n_components).plan(source)
    typer.echo(f"Fitting {n_components} components would read, a pass: {plan}")


def _table(first: list[str], names: list[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    for name in (*first, "weight", *names[:MOST_COLUMNS]):
        table.add_column(name, justify="left" if name in first else "right", overflow="fold")
    return table


def _cells(mixture: Mixture) -> Iterator[list[str]]:
    """For each component its weight, and mean ± deviation of the features that are shown."""
    for weight, means, deviations in zip(mixture.weights, mixture.means, mixture.deviations, strict=True):
        pairs = zip(means[:MOST_COLUMNS], deviations[:MOST_COLUMNS], strict=True)
        yield [f"{weight:.4f}", *(_mean_and_deviation(mean, deviation) for mean, deviation in pairs)]


def _mean_and_deviation(mean: float, deviation: float) -> str:
    """Both with the decimals that show three digits of the deviation."""
    decimals = 2 - int(np.floor(np.log10(deviation)))
    if not 0 <= decimals <= 5 or abs(mean) >= 1e5:
        return f"{mean:.6g} ± {deviation:.3g}"
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


# -- outputs -------------------------------------------------------------------------------------------------------


def _require_free(output: Path, store: str, overwrite: bool) -> None:
    """ParameterError, before any work, where the output has no folder, is taken, or would replace the rows."""
    if not output.parent.is_dir():
        raise ParameterError(f"There is no folder {output.parent} to write {output.name} into. Make it first.")
    rows = Path(store.removeprefix("file://")).resolve()
    if rows.is_relative_to(output.resolve()) or output.resolve().is_relative_to(rows):
        raise ParameterError(f"{output} holds the rows that would be read. Choose another -o.")
    if output.exists() and not overwrite:
        raise ParameterError(f"{output} exists already. Add --overwrite to replace it, or choose another -o.")


def _require_zarr_or_nothing(output: Path) -> None:
    """ParameterError where labels would replace anything but a zarr array."""
    if output.exists() and not is_array(output):
        raise ParameterError(f"{output} is not a zarr array, so it is not replaced. Choose another -o.")


# -- the demo ------------------------------------------------------------------------------------------------------


def _demo_paths(directory: Path) -> tuple[Path, ...]:
    """The files of the demo, in a folder that is new, empty, or an earlier demo's; ParameterError otherwise."""
    paths = tuple(directory / name for name in DEMO_FILES)
    directory.mkdir(parents=True, exist_ok=True)
    taken = [path.name for path in paths if path.exists()]
    if taken and not _is_demo(paths[0]):
        raise ParameterError(
            f"{directory} holds {', '.join(taken)}, which the demo did not write. Give it another folder."
        )
    return paths


def _is_demo(store: Path) -> bool:
    return is_array(store) and DEMO_MARK in zarr.open(str(store), mode="r").attrs


def _write_demo_rows(store: Path, truth: Mixture, n_rows: int, seed: int) -> None:
    """A store written chunk by chunk: at no moment is more than one chunk in memory."""
    shutil.rmtree(store, ignore_errors=True)
    array = create_array(
        store,
        (n_rows, DEMO_FEATURES),
        (DEMO_CHUNK_ROWS, DEMO_FEATURES),
        np.float32,
        fill_value=np.nan,
        attributes={DEMO_MARK: {"weights": truth.weights.tolist(), "means": truth.means.tolist()}},
    )
    typer.echo(
        f"Writing {n_rows:,} rows x {DEMO_FEATURES} features {array.dtype} ({array.nbytes / 1e6:.3g} MB in "
        f"{array.nchunks} chunks) to {store}",
        err=True,
    )
    with _bar("writing", n_rows) as written:
        for i, (rows, _) in enumerate(truth.chunks(n_rows, DEMO_CHUNK_ROWS, seed)):
            array[i * DEMO_CHUNK_ROWS : i * DEMO_CHUNK_ROWS + len(rows)] = rows
            written(len(rows))


def _comparison(truth: Mixture, estimate: Mixture) -> Table:
    """True beside estimated parameters, two lines a component."""
    table = _table(["#", ""], [f"feature {i}" for i in range(DEMO_FEATURES)])
    for j, (true, estimated) in enumerate(zip(_cells(truth), _cells(estimate), strict=True)):
        table.add_row(str(j), "true", *true, style="dim")
        table.add_row("", "fitted", *estimated, end_section=True)
    return table


def _verdict(truth: Mixture, estimate: Mixture, n_rows: int) -> str:
    """The largest difference between the two, beside what chance alone makes of so many rows."""
    means = np.abs(truth.means - estimate.means) / truth.deviations
    chance = 1.0 / np.sqrt(n_rows * truth.weights.min())
    return (
        f"\nLargest difference of a mean: {means.max():.4f} standard deviations (standard error of "
        f"the rarest component: {chance:.4f})."
    )


def _draw_demo(picture: Path, store: Path, truth: Mixture, estimate: Mixture) -> bool:
    """Write the picture; without matplotlib say so and go on."""
    array: Any = zarr.open(str(store), mode="r")
    rows = np.asarray(array[:DEMO_CHUNK_ROWS])
    model = streamgmm.GaussianMixture.from_parameters(estimate.weights, estimate.means, estimate.covariances)
    title = f"{len(truth.weights)} components fitted to {array.shape[0]:,} rows"
    try:
        save_picture(draw(rows, estimate, truth=truth, labels=model.predict(rows), title=title), picture)
    except MissingPackageError as error:
        typer.echo(f"\nNo picture: {error}", err=True)
        return False
    return True


if __name__ == "__main__":
    main()
