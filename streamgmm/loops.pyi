from typing import Any

import numpy as np

from streamgmm.protocols import Floats, Integers

FAR: float
PANEL_ROWS: int
TOGETHER: int
GROUP: int
MOST_FUSED: int

def scratch_numbers(d: int, k: int, n_moments: int, shared: bool) -> int: ...

class Lens:
    eta: Floats
    whitener: Floats
    fused: bool
    def __init__(
        self,
        shift: Floats,
        scale: Floats,
        terms: tuple[Integers, Integers, Integers],
        eta: Floats,
        whitener: Floats | None,
        reach: Floats,
        limit: float,
        dtype: type[np.floating[Any]] = ...,
    ) -> None: ...
    def tally(self) -> Floats: ...
    def moments(self, tally: Floats) -> Floats: ...
    def learn(
        self,
        rows: Floats,
        weights: Floats | None,
        omits_nan: bool,
        tally: Floats,
        common: Floats | None,
        totals: Floats,
    ) -> int: ...

def softmax(joint: Floats) -> Floats: ...
def expand(z: Floats, left: Integers, right: Integers, into: Integers, products: Floats) -> None: ...
