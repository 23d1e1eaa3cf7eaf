"""The covariance structures, one file each. A new one is a new file and a line here."""

from __future__ import annotations

from streamgmm.covariance.base import AbstractCovariance
from streamgmm.covariance.diag import DiagCovariance
from streamgmm.covariance.full import FullCovariance
from streamgmm.covariance.spherical import SphericalCovariance
from streamgmm.covariance.tied import TiedCovariance

STRUCTURES: dict[str, type[AbstractCovariance]] = {
    structure.kind: structure for structure in (FullCovariance, TiedCovariance, DiagCovariance, SphericalCovariance)
}

__all__ = ["STRUCTURES", "AbstractCovariance"]
