"""Buffers that are used again."""

from __future__ import annotations

import numpy as np
import pytest

from efl.transport.spares import Spares

MIB = 1 << 20
LARGE = 40 * MIB


def address(buffer: np.ndarray) -> int:
    return buffer.ctypes.data


def test_a_buffer_is_used_again_only_when_nothing_shows_it_any_more():
    spares = Spares(4 * LARGE)
    first = spares.allocate(LARGE, 0)
    assert first.size == LARGE
    assert first.ctypes.data % 64 == 0
    tensor = np.ndarray((10, MIB), np.float32, first.data)  # as a message's array
    part = tensor[3:4]
    where = address(first)
    del first, tensor
    second = spares.allocate(LARGE, 1)
    assert address(second) != where
    part[:] = 1.0
    second[:] = 0
    assert part.min() == 1.0
    del part
    third = spares.allocate(LARGE, 2)
    assert address(third) == where


def test_another_size_gets_other_memory():
    spares = Spares(4 * LARGE)
    where = address(spares.allocate(LARGE, 0))
    assert address(spares.allocate(LARGE + 64, 0)) != where
    assert address(spares.allocate(LARGE, 0)) == where


@pytest.mark.parametrize(("most", "count"), [(LARGE - 1, 1), (4 * LARGE, 256)], ids=["too-much", "not-used-lately"])
def test_what_lies_unused_is_given_back(most, count):
    spares = Spares(most)
    spares.allocate(LARGE, 0)
    assert [spare.size for spare in spares._spares] == [LARGE]
    spares.allocate(MIB, count)
    assert not spares._spares


def test_what_is_in_use_is_never_given_back():
    spares = Spares(1)
    held = spares.allocate(LARGE, 0)
    held[:] = 7
    other = spares.allocate(LARGE, 1000)
    other[:] = 0
    assert held.min() == 7
