"""What can go wrong, one sentence each. Every error says what was found, where, what was expected and the way out."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


class StreamGMMError(Exception):
    """Base of all errors that streamgmm raises on purpose."""


class DataError(StreamGMMError, ValueError):
    """The rows, weights or shapes that were given cannot be learned from."""


class NothingLeftError(DataError):
    """Every row of what was given has NaN and is left out."""


class DataTypeError(StreamGMMError, TypeError):
    """The data have a type that is not a real number of at most 64 bits."""


class ParameterError(StreamGMMError, ValueError):
    """A hyper-parameter or a given model parameter has no meaning."""


class NumericalError(StreamGMMError, ValueError):
    """A statistic or covariance cannot be used: not finite, or not positive definite."""


class SourceError(StreamGMMError, OSError):
    """A store could not be opened, or a chunk of it could not be read."""


class FileFormatError(StreamGMMError, OSError):
    """A file is not a streamgmm file, is damaged, or was written by a newer version."""


class MemoryPlanError(StreamGMMError, MemoryError):
    """The work does not fit into memory; raised before anything is read."""


class SchedulerError(StreamGMMError, RuntimeError):
    """The dask scheduler in force cannot run this work."""


class ClusterError(StreamGMMError, RuntimeError):
    """The processes that do the work are gone, die again and again, or finish nothing any more."""


class MissingPackageError(StreamGMMError, ImportError):
    """An optional package is not installed."""


class DegenerateComponentWarning(UserWarning):
    """A component has lost its rows; it keeps its mean and covariance while its weight falls."""


class SampleWarning(UserWarning):
    """The sample of a fit was a poor guide to all rows."""


class RegularisationWarning(UserWarning):
    """reg_covar is not small against the variance of a feature, so it shapes the result."""


def shown(value: object) -> str:
    """A value in the words of a sentence: its representation, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # numbers of thousands of digits have none, and foreign objects may do what they like
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def warn(message: str, kind: type[Warning]) -> None:
    """Warn at the line of the caller's own code that called into this package."""
    here = str(Path(__file__).parent)
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, kind, stacklevel=level)
