"""Arrays as one vector and back, by numpy: in the graph, to join and to part them takes longer than to add noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def one_vector(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """All numbers of some arrays, one after the other, in the widest of their dtypes; empty where there are none."""
    return np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.empty(0, np.float32)


def parts_of(vector: np.ndarray, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The parts of a vector that ``one_vector`` made, in shape and dtype what it was made of."""
    ends = np.cumsum([array.size for array in arrays])
    return [
        vector[end - array.size : end].reshape(array.shape).astype(array.dtype, copy=False)
        for end, array in zip(ends, arrays)
    ]
