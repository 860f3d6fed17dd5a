"""Keeps TensorFlow from telling users to replace what efl, not they, calls."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def no_deprecation_warnings() -> Iterator[None]:
    """Drops the deprecation warnings that TensorFlow logs inside a ``with`` block; everything else is logged."""
    logger = logging.getLogger("tensorflow")

    def keep(record: logging.LogRecord) -> bool:
        return "deprecated" not in str(record.msg)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
