"""Noise that is no noise: the same in two programs, whatever the values, so that weights can be compared."""

import numpy as np


def wave(count: int, step: int, group: str) -> np.ndarray:
    return np.sin(1.7 * np.arange(count) + step + len(group)).astype(np.float32)


def install() -> None:
    """Has the models of this process add waves."""
    from efl.privacy._holder import NoiseHolder

    def noised(self, values, *, step, group, clip, noise_multiplier, rows, beside):  # type: ignore[no-untyped-def]
        added = clip * noise_multiplier * wave(values.size, step, group)
        return values + added.reshape(values.shape)

    NoiseHolder.noised = noised  # type: ignore[method-assign]
