"""Random numbers by name: every stream is Philox(seed, purpose, index), so no draw depends on another."""

from __future__ import annotations

import secrets
from enum import IntEnum
from typing import Any

import numpy as np

from streamgmm.errors import ParameterError, shown


class Purpose(IntEnum):
    """What a stream is for. Values are part of the reproducibility promise: never renumber."""

    SAMPLE_ROWS = 1
    STARTS = 2
    SAMPLES = 3
    EXPECTED = 4
    BLOCK_ORDER = 5
    SAMPLE_ORDER = 6
    SAMPLE_VALUES = 7


def draw_seed(random_state: Any) -> int:
    """One 128-bit seed from None (fresh), an integer, or a numpy RandomState or Generator (which moves on)."""
    if random_state is None:
        return secrets.randbits(128)
    if (
        isinstance(random_state, (int, np.integer))
        and not isinstance(random_state, bool)
        and 0 <= random_state < 2**128
    ):
        words = np.random.SeedSequence(int(random_state)).generate_state(4)
    elif isinstance(random_state, np.random.Generator):
        words = random_state.integers(2**32, size=4, dtype=np.uint32)
    elif isinstance(random_state, np.random.RandomState):
        words = random_state.randint(2**32, size=4, dtype=np.uint32)
    else:
        raise ParameterError(
            "random_state must be None, a non-negative integer below 2**128, a numpy RandomState or a numpy Generator, "
            f"but it is {shown(random_state)}."
        )
    return sum(int(word) << (32 * i) for i, word in enumerate(words))


def stream(seed: int, purpose: Purpose, index: int = 0) -> np.random.Generator:
    """The generator for one purpose and index under a seed."""
    key = np.array([seed & (2**64 - 1), seed >> 64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, index, purpose], dtype=np.uint64)))


def sample_index(seed: int, n_rows: int, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rising row numbers of a uniform sample without replacement; all rows where ``size`` reaches ``n_rows``."""
    if size >= n_rows:
        return np.arange(n_rows)
    return np.sort(stream(seed, Purpose.SAMPLE_ROWS).choice(n_rows, size, replace=False, shuffle=False))
