"""What cannot be right, as rows of tables, and how it is refused: with an error of ours, and without a trace."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask
import numpy as np
import pytest
import zarr
from mixtures import blobs, fitted
from sklearn.exceptions import NotFittedError

from streamgmm import GaussianMixture
from streamgmm.errors import StreamGMMError

ROWS = blobs(200)

NO_NUMBERS = "Rows must be real numbers of at most 64 bits"


@dataclass(frozen=True)
class Bad:
    """One thing that is refused. made: makes it, in a folder. words: a pattern of the message."""

    name: str
    made: Callable[[Path], Any]
    error: type[StreamGMMError]
    words: str


def table(*rows: tuple[str, Any, type[StreamGMMError], str]) -> pytest.MarkDecorator:
    """The rows as cases of a test. What is no function is the thing itself."""
    cases = [Bad(name, made if callable(made) else lambda _, it=made: it, *rest) for name, made, *rest in rows]
    return pytest.mark.parametrize("bad", cases, ids=lambda bad: bad.name)


def stored(rows: Any, chunks: tuple[int, ...] = (), **options: Any) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        path = folder / f"{uuid4().hex}.zarr"
        zarr.create_array(str(path), data=np.asarray(rows), chunks=chunks or "auto", **options)
        return path

    return made


def refuses(use: Callable[[Any], Any], thing: Any, bad: Bad) -> None:
    """``use`` raises the error, at the latest when its lazy result is computed."""
    with pytest.raises(bad.error, match=bad.words):
        dask.compute(use(thing))


def state(model: GaussianMixture) -> dict[str, Any]:
    return {name: getattr(value, "tobytes", lambda value=value: value)() for name, value in vars(model).items()}


@cache
def only_fit() -> GaussianMixture:
    return fitted()


def model() -> GaussianMixture:
    """A fitted model of its own for each test."""
    return deepcopy(only_fit())


def fit_refuses(thing: Any, bad: Bad, **given: Any) -> None:
    """A model that was fitted stays as it was; one that was not stays unfitted."""
    new, old = GaussianMixture(2, random_state=0), model()
    before = state(old)
    refuses(lambda rows: new.fit(rows, **given), thing, bad)
    refuses(lambda rows: old.fit(rows, **given), thing, bad)
    assert state(old) == before
    with pytest.raises(NotFittedError, match="not fitted"):
        new.predict(ROWS)
