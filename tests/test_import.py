"""What ``import efl`` does and does not do. Each order of imports is tried in an interpreter of its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

import efl

ROOT = Path(efl.__file__).parent.parent

# Every switch that a later line of a user's module relies on.
SHOW = """
    import os
    import tensorflow as _t
    v1 = _t.compat.v1
    with v1.Graph().as_default():
        variable = v1.get_variable('v', [2])
    print('eager', _t.executing_eagerly())
    print('resource', type(variable).__name__ == 'ResourceVariable')
    print('sizes', variable.shape[0] == 2 and type(variable.shape[0]) is int)
    print('legacy', os.environ.get('TF_USE_LEGACY_KERAS'))
"""
LEGACY = tuple(map(int, metadata.version("tensorflow").split(".")[:2])) >= (2, 16)  # before, there was only one Keras
SWITCHED = ["eager False", "resource True", "sizes True", f"legacy {1 if LEGACY else None}"]


def python(code: str, **env: str) -> list[str]:
    """Runs code in a fresh interpreter; returns the lines that it printed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("EFL_KEEP_EAGER", "TF_USE_LEGACY_KERAS")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def script(*parts: str) -> str:
    return "\n".join(textwrap.dedent(part) for part in parts)


def fake_package(folder: Path, text: str) -> str:
    """A package named tensorflow: what is tested is our side of the import, and the real one takes seconds."""
    (folder / "tensorflow").mkdir()
    (folder / "tensorflow" / "__init__.py").write_text(textwrap.dedent(text))
    return os.pathsep.join([str(folder), str(ROOT)])


COUNTING = """
    import os, types
    __version__ = '2.16.1'
    calls = []
    legacy_at_import = os.environ.get('TF_USE_LEGACY_KERAS')
    compat = types.SimpleNamespace(v1=types.SimpleNamespace(
        disable_eager_execution=lambda: calls.append('graph'),
        enable_resource_variables=lambda: calls.append('resource'),
        enable_v2_tensorshape=lambda: calls.append('sizes')))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import efl\nimport tensorflow.compat.v1 as tf",
        "import tensorflow.compat.v1 as tf\nimport efl",
    ],
)
def test_graph_mode_holds_for_either_order_of_the_import_lines(imports: str) -> None:
    # An iterator at the top of the module and legacy layers, as a user writes them, and no use of efl in between.
    code = """
    iterator = tf.data.make_one_shot_iterator(tf.data.Dataset.from_tensor_slices([[1.0], [2.0]]).batch(1))
    batch = iterator.get_next()
    print('symbolic', batch.op.type == 'IteratorGetNext')
    out = tf.layers.dense(batch, 3, kernel_initializer=tf.ones_initializer())
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        print(sess.run(out).tolist(), sess.run(out).tolist())
    from tensorflow.keras.layers import Dense
    print(Dense.__module__.split('.')[0], tf.keras.layers.Dense.__module__.split('.')[0])
    """
    keras = "tf_keras tf_keras" if LEGACY else "keras keras"
    expected = ["symbolic True", "[[1.0, 1.0, 1.0]] [[2.0, 2.0, 2.0]]", keras, *SWITCHED]
    assert python(script(imports, code, SHOW)) == expected


@pytest.mark.parametrize("imports", ["import efl, tensorflow", "import tensorflow, efl"])
def test_the_environment_variable_leaves_tensorflow_alone(imports: str) -> None:
    lines = python(script(imports, SHOW), EFL_KEEP_EAGER="1")
    assert lines == ["eager True", "resource True", "sizes True", "legacy None"]


def test_without_efl_tensorflow_is_eager() -> None:
    """The control: the other tests could not fail if this were not so."""
    assert python(SHOW) == ["eager True", "resource True", "sizes True", "legacy None"]


def test_disable_v2_behavior_brings_back_reference_variables_and_they_are_found() -> None:
    code = """
    import efl
    import tensorflow.compat.v1 as tf
    from efl._tensorflow import reference_variables
    with tf.Graph().as_default() as graph:
        tf.get_variable('good', [2])
        print(reference_variables(graph))
        tf.disable_v2_behavior()
        tf.get_variable('bad', [2])
        print(reference_variables(graph))
        tf.enable_resource_variables()
        tf.get_variable('good_again', [2])
        print(reference_variables(graph))
    """
    assert python(code) == ["[]", "['bad']", "['bad']"]


def test_disable_v2_behavior_before_efl_is_undone_where_it_matters() -> None:
    assert python(script("import tensorflow.compat.v1 as tf\ntf.disable_v2_behavior()\nimport efl", SHOW)) == SWITCHED


def test_efl_loads_neither_tensorflow_nor_its_own_modules() -> None:
    code = """
    import sys
    before = set(sys.modules)
    import efl, efl.errors, efl.settings
    efl.MODE.TRAIN, efl.TaskScope, dir(efl), efl.__version__
    loaded = {name for name in set(sys.modules) - before if name.startswith(('tensorflow', 'grpc', 'numpy', 'efl.'))}
    print(sorted(loaded))
    print([t.name for t in __import__('threading').enumerate()])
    """
    assert python(code) == [
        "['efl._task_scope', 'efl._tensorflow', 'efl.errors', 'efl.settings']",
        "['MainThread']",
    ]


def test_all_names_exist_are_listed_once_and_nothing_else_is_public() -> None:
    assert len(efl.__all__) == len(set(efl.__all__))
    assert set(efl._SOURCES) == set(efl.__all__) - {"__version__"}
    assert set(efl.__all__) <= set(dir(efl))
    for name in efl.__all__:
        assert getattr(efl, name) is not None
    with pytest.raises(AttributeError, match="module 'efl' has no attribute 'Modle'"):
        efl.Modle  # noqa: B018


def test_type_checkers_see_what_the_table_says() -> None:
    (checked,) = (
        node
        for node in ast.parse((ROOT / "efl" / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {}
    for imported in checked.body:
        assert isinstance(imported, ast.ImportFrom)
        for name in imported.names:
            seen[name.name] = f"efl.{name.name}" if imported.module == "efl" else imported.module
    assert seen == efl._SOURCES


def test_task_scope_is_the_function_whatever_was_imported() -> None:
    import efl._task_scope

    assert callable(efl.task_scope)
    with efl.task_scope(mode=efl.MODE.EVAL, task="ctr") as scope:
        assert efl.current_task_scope() is scope
        assert scope == efl.TaskScope(efl.MODE.EVAL, "ctr")
    assert efl.current_task_scope() == efl.TaskScope()


@pytest.mark.skipif(not LEGACY, reason="this TensorFlow has one Keras only")
def test_legacy_keras_is_chosen_before_tensorflow_reads_the_choice(tmp_path: Path) -> None:
    path = fake_package(tmp_path, COUNTING)
    code = "import efl, tensorflow as t\nprint(t.legacy_at_import, t.calls)"
    assert python(code, PYTHONPATH=path) == ["1 ['graph', 'resource', 'sizes']"]
    assert python("import os\n" + code, PYTHONPATH=path, TF_USE_LEGACY_KERAS="0") == [
        "0 ['graph', 'resource', 'sizes']"
    ]


def test_tensorflow_2_15_has_no_keras_to_choose() -> None:
    from efl._tensorflow import _wants_legacy_keras

    versions = ["1.15.5", "2.15.1", "2.16.0rc0", "2.16.1", "2.21.0", "2.22.0-dev2025", "3", "3.0"]
    assert [_wants_legacy_keras(v) for v in versions] == [False, False, True, True, True, True, True, True]


def test_a_reload_stays_in_graph_mode_and_leaves_no_trace(tmp_path: Path) -> None:
    path = fake_package(tmp_path, COUNTING)
    code = """
    import efl, importlib, importlib.util, sys
    print(importlib.util.find_spec('tensorflow').origin.endswith('__init__.py'), 'tensorflow' in sys.modules)
    import tensorflow as t
    print(t.calls, type(t.__loader__).__name__, type(t.__spec__.loader).__name__)
    importlib.reload(t)
    print(t.calls, type(t.__loader__).__name__)
    importlib.reload(efl)
    print(len([f for f in sys.meta_path if type(f).__name__ == '_Finder']))
    """
    assert python(code, PYTHONPATH=path) == [
        "True False",
        "['graph', 'resource', 'sizes'] SourceFileLoader SourceFileLoader",
        "['graph', 'resource', 'sizes'] SourceFileLoader",
        "1",
    ]


def test_a_failing_import_fails_as_it_would_and_may_be_tried_again(tmp_path: Path) -> None:
    broken = "import os\nif os.environ.get('BROKEN'): raise ImportError('no libstdc++')\n"
    path = fake_package(tmp_path, broken + textwrap.dedent(COUNTING))
    code = """
    import efl, os
    try:
        import tensorflow
    except ImportError as error:
        print(error)
    del os.environ['BROKEN']
    import tensorflow
    print(tensorflow.calls)
    """
    assert python(code, PYTHONPATH=path, BROKEN="1") == ["no libstdc++", "['graph', 'resource', 'sizes']"]


def test_no_tensorflow_at_all_is_an_ordinary_error() -> None:
    code = """
    import efl, sys
    sys.path = [p for p in sys.path if 'site-packages' not in p]
    try:
        import tensorflow
    except ModuleNotFoundError as error:
        print(error)
    """
    assert python(code) == ["No module named 'tensorflow'"]


def test_finders_of_other_tools_are_asked_and_may_ask_back(tmp_path: Path) -> None:
    path = fake_package(tmp_path, COUNTING)
    code = """
    import efl, importlib.util, sys
    class Asks:
        asking = False
        def find_spec(self, name, path=None, target=None):
            if name != 'tensorflow' or self.asking:
                return None
            self.asking = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.asking = False
    sys.meta_path.insert(0 if 'FIRST' in __import__('os').environ else 1, Asks())
    import tensorflow
    print(tensorflow.calls)
    """
    assert python(code, PYTHONPATH=path) == ["['graph', 'resource', 'sizes']"]
    assert python(code, PYTHONPATH=path, FIRST="1") == ["['graph', 'resource', 'sizes']"]


def test_efl_imported_while_tensorflow_is_being_imported(tmp_path: Path) -> None:
    path = fake_package(tmp_path, "import efl\n" + textwrap.dedent(COUNTING))
    code = "import tensorflow, efl\nprint(tensorflow.calls)\nefl.MODE\nprint(tensorflow.calls)"
    assert python(code, PYTHONPATH=path) == ["[]", "['graph', 'resource', 'sizes']"]
