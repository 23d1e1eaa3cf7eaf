"""Where the bits of a model come from: the versions of packages and the processor that a fit ran on."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

PACKAGES = ("streamgmm", "numpy", "scipy", "dask", "zarr")


@cache
def provenance() -> dict[str, Any]:
    """Plain values: packages, Python, the machine, and what numpy and BLAS make of the processor of this process."""
    build: Any = np.show_config(mode="dicts")
    simd = build.get("SIMD Extensions", {})
    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_features": [*simd.get("baseline", []), *simd.get("found", [])],
        "blas": sorted({f"{b['internal_api']} {b['version']} {b.get('architecture', '')}".strip() for b in libraries}),
    }
