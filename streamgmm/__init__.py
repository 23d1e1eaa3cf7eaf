"""Gaussian mixtures by EM for data larger than memory.

Public names are resolved on first use (PEP 562), so that a worker never imports scikit-learn.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamgmm.estimator import GaussianMixture as GaussianMixture
    from streamgmm.estimator import load as load
    from streamgmm.merging import Statistics as Statistics
    from streamgmm.prediction import write_rows as write_rows
    from streamgmm.sources import open_source as open_source

if find_spec("streamgmm.loops") is None:
    raise ImportError(
        f"The compiled part of streamgmm is not in {__path__[0]}: these are its sources. Install them with "
        "`pip install -e .`, or start Python in another folder."
    )

__version__ = version("streamgmm")

_HOMES = {
    "GaussianMixture": "streamgmm.estimator",
    "Statistics": "streamgmm.merging",
    "load": "streamgmm.estimator",
    "open_source": "streamgmm.sources",
    "write_rows": "streamgmm.prediction",
}

__all__ = ["GaussianMixture", "Statistics", "__version__", "load", "open_source", "write_rows"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamgmm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
