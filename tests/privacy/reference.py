"""tensorflow-privacy's optimizers and queries, as references.

Its package imports tensorflow_estimator, which newer TensorFlows break; the modules that are needed here do not.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest


def module(name: str) -> Any:
    """A module of tensorflow-privacy; skips the test where it is not installed."""
    if "tensorflow_privacy" not in sys.modules:
        spec = importlib.util.find_spec("tensorflow_privacy")
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip("tensorflow-privacy is not installed (the extra 'privacy')")
        package = types.ModuleType("tensorflow_privacy")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["tensorflow_privacy"] = package
    return importlib.import_module(f"tensorflow_privacy.privacy.{name}")
