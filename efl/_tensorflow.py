"""Puts TensorFlow into graph mode with legacy Keras as soon as both efl and TensorFlow are imported.

Users make datasets and iterators at the top of a module, after the imports and before the first use of efl. With eager
execution on, ``iterator.get_next()`` would hand out one constant batch there, and the model would train on it in
silence. So the switch must happen at the import itself, in whichever order the two import lines come:

* TensorFlow first: ``install``, called by ``import efl``, switches at once.
* efl first: ``install`` leaves a finder on ``sys.meta_path`` that lets the ordinary finders find TensorFlow, and
  switches when its ``__init__`` has run. efl itself never imports TensorFlow to do so.

The environment variable ``EFL_KEEP_EAGER=1`` leaves TensorFlow as it is; a model then has to be built inside
``tf.Graph().as_default()``, and TF1-style layers need ``TF_USE_LEGACY_KERAS=1`` from the user.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow.compat.v1 as tf

KEEP_EAGER = "EFL_KEEP_EAGER"
_LEGACY_KERAS = "TF_USE_LEGACY_KERAS"
_REFERENCE_TYPES = frozenset({"Variable", "VariableV2"})


def install() -> None:
    """Arranges for graph mode, now or when TensorFlow is imported. Repeating it does no harm."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # stays: a reload of TensorFlow would turn eager execution on again
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None and not _is_initializing(tensorflow):
        _after_import(tensorflow)


def reference_variables(graph: tf.Graph) -> list[str]:
    """Names of the graph's reference variables, which ``tf.disable_v2_behavior()`` brings back.

    A read of such a variable is no snapshot: an op that has read it sees a later update of the same step. Whether a
    gradient that is returned to the peer was computed with the old or the new weights would then depend on timing.
    ``tf.enable_resource_variables()`` after ``tf.disable_v2_behavior()`` restores resource variables.

    Args:
      graph: Any TensorFlow graph.

    Returns:
      Names of the variables' ops in the order of their creation; empty where all variables are resource variables.
    """
    return [op.name for op in graph.get_operations() if op.type in _REFERENCE_TYPES]


def enable_int_sizes() -> None:
    """Lets ``shape[i]`` be an int or None, after ``tf.disable_v2_behavior()`` too, unless TensorFlow is left alone.

    That may be done at any time: what changes is how shapes are read, not the shapes.
    """
    if not _keep_eager():
        sys.modules["tensorflow"].compat.v1.enable_v2_tensorshape()


def has_int_sizes() -> bool:
    """Whether ``shape[i]`` is an int or None, as efl takes it to be.

    As a ``Dimension``, which it is after ``tf.disable_v2_behavior()``, an unknown size is not None, and what is to be
    checked when the program runs would be taken for known.
    """
    v1 = sys.modules["tensorflow"].compat.v1
    return not isinstance(v1.TensorShape([1])[0], v1.Dimension)


def _keep_eager() -> bool:
    return os.environ.get(KEEP_EAGER, "").strip().lower() not in ("", "0", "false", "no", "off")


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _wants_legacy_keras(version: str) -> bool:
    """Keras 3, which comes with TensorFlow 2.16 and later, has no ``tf.layers``; before, there is nothing to choose."""
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in (version + ".0").split(".")[:2])
    return (major, minor) >= (2, 16)


def _before_import() -> None:
    if _keep_eager():
        return
    try:
        version = importlib.metadata.version("tensorflow")
    except importlib.metadata.PackageNotFoundError:
        return  # a build under another name (tensorflow-cpu, ...): its version is known after its import
    if _wants_legacy_keras(version):
        os.environ.setdefault(_LEGACY_KERAS, "1")


def _after_import(tensorflow: ModuleType) -> None:
    v1: Any = getattr(getattr(tensorflow, "compat", None), "v1", None)
    if _keep_eager() or v1 is None:  # an empty namespace or a stand-in named tensorflow is not ours to configure
        return
    v1.disable_eager_execution()
    v1.enable_resource_variables()
    v1.enable_v2_tensorshape()
    if _wants_legacy_keras(tensorflow.__version__):
        os.environ.setdefault(_LEGACY_KERAS, "1")  # tf.layers and tf.keras read it when they are first touched
        _prefer_legacy_keras_submodules(tensorflow)


def _prefer_legacy_keras_submodules(tensorflow: ModuleType) -> None:
    """Lets ``from tensorflow.keras import ...`` find what ``tf.keras`` is, where TensorFlow was imported first.

    TensorFlow decides when it is imported which Keras's folder it puts on its ``__path__``, and only later, at first
    touch, which Keras ``tf.keras`` is.
    """
    if os.environ.get(_LEGACY_KERAS) not in ("1", "true", "True"):
        return
    spec = importlib.util.find_spec("tf_keras")
    for folder in (spec and spec.submodule_search_locations) or ():
        legacy = os.path.join(folder, "api", "_v2")
        if os.path.isdir(os.path.join(legacy, "keras")) and legacy not in tensorflow.__path__:
            tensorflow.__path__ = [legacy, *tensorflow.__path__]


class _Finder(MetaPathFinder):
    """Finds TensorFlow as everybody else on ``sys.meta_path`` does, with a loader that reports when it has run."""

    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "tensorflow" or getattr(self._searching, "now", False):
            return None
        self._searching.now = True  # other tools' finders ask all of sys.meta_path, and so us, again
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = find(fullname, path, target) if find and finder is not self else None
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _ReportingLoader(spec.loader)
                    return spec
            return None
        finally:
            self._searching.now = False


class _ReportingLoader(Loader):
    """Loads through another loader, and leaves no trace of itself on the module."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _before_import()
        self._loader.exec_module(module)
        _after_import(module)
