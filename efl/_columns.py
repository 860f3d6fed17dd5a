"""Feature columns to dense tensors, with embedding tables that train and eval share.

``tf.feature_column.input_layer`` names an embedding table after how many input layers were made before: a second
one, for evaluation, gets a second, untrained set. Here every column is an input layer of its own, in a variable scope
that is named by group and column and is entered anew each time, so that equal names mean the same table.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow
import tensorflow.compat.v1 as tf

from efl._quiet import no_deprecation_warnings
from efl._task_scope import current_task_scope
from efl.errors import DataError, ModelError

_FIXED = tf.io.FixedLenFeature


def check_features(features: Any, sample: str) -> dict[str, Any]:
    """Returns ``features`` as a dict of graph tensors.

    Raises:
      ModelError: Not a mapping of names to tensors and SparseTensors of the current graph.
    """
    if not isinstance(features, Mapping):
        raise ModelError(f"{sample}: features: expected a dict of name -> tensor, got {_what(features)}")
    for name, value in features.items():
        if not isinstance(name, str):
            raise ModelError(f"{sample}: feature name {name!r}: expected a string")
        check_tensor(value, f"{sample}: feature {name!r}")
    return dict(features)


def check_tensor(value: Any, who: str) -> None:
    """Raises ``ModelError`` unless ``value`` is a tensor or SparseTensor of the current graph."""
    sparse = isinstance(value, tf.SparseTensor)
    parts = [value.indices, value.values, value.dense_shape] if sparse else [value]
    for part in parts:
        if not isinstance(part, tf.Tensor) or not hasattr(part, "graph"):
            raise ModelError(f"{who}: expected a tensor or SparseTensor of the graph, got {_what(part)}")
        if part.graph is not tf.get_default_graph():
            raise ModelError(f"{who} was made in another graph; make it in the graph in which the model is compiled")


def dense_groups(features: Mapping[str, Any], columns: Mapping[str, Any], sample: str) -> dict[str, tf.Tensor]:
    """Computes every group: the dense outputs of its columns, side by side in the order given.

    Args:
      features: Name to tensor.
      columns: Group to feature columns.
      sample: Name of the sample, for messages and op names.

    Returns:
      Group to float32 tensor ``[batch, sum of the columns' widths]``.

    Raises:
      ModelError: Something is no feature column, or a column that cannot read what its feature is.
      DataError: A column names a feature that there is not, or of the wrong size.
    """
    if not isinstance(columns, Mapping):
        kind = type(columns).__name__
        raise ModelError(f"{sample}: columns: expected a dict of group -> list of feature columns, got {kind}")
    groups = {}
    with tf.name_scope(_scope_name(sample)):
        for group, members in columns.items():
            # A single column is a list of one; columns are namedtuples, so ask for exactly list or tuple.
            members = list(members) if type(members) in (list, tuple) else [members]
            if not isinstance(group, str) or not members:
                raise ModelError(f"{sample}: group {group!r}: expected a name (a string) and at least one column")
            outputs = [_dense(features, column, group, sample) for column in members]
            try:
                groups[group] = tf.concat(outputs, axis=1) if len(outputs) > 1 else outputs[0]
            except ValueError as error:
                raise DataError(f"{sample}: group {group!r}: its columns differ in batch size: {error}") from error
    return groups


def _dense(features: Mapping[str, Any], column: Any, group: str, sample: str) -> tf.Tensor:
    who = f"{sample}: group {group!r}, column {getattr(column, 'name', column)!r}"
    try:
        with no_deprecation_warnings():
            spec = tf.feature_column.make_parse_example_spec([column])
    except (ValueError, TypeError, AttributeError) as error:
        kind = type(column).__name__
        advice = f"; write tf.feature_column.numeric_column({column!r})" if isinstance(column, str) else ""
        if kind == "SharedEmbeddingColumn":  # its table lies outside of variable scopes: each sample would get another
            advice = " of TensorFlow 2's shared_embeddings; use tf.compat.v1.feature_column.shared_embedding_columns"
        raise ModelError(f"{who}: expected a tf.feature_column, got {kind}{advice}") from error
    missing = sorted(set(spec) - set(features))
    if missing:
        there = ", ".join(map(repr, features)) or "none"
        raise DataError(f"{who} needs the feature {missing[0]!r}; the features are: {there}")
    inputs = {key: _fit(features[key], spec[key], f"{who}, feature {key!r}") for key in spec}
    shared = getattr(column, "shared_embedding_collection_name", None)
    # Columns with one table must meet in one scope, whatever their groups.
    place = "shared" if shared else f"{_scope_name(group)}/{_scope_name(column.name)}"
    task = current_task_scope().task
    try:
        with (
            tf.variable_scope(place if task is None else f"{task}/{place}", reuse=tf.AUTO_REUSE),
            _hidden_collection(shared),
            no_deprecation_warnings(),
        ):
            return tf.cast(tf.feature_column.input_layer(inputs, [column]), tf.float32)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{who}: {error}") from error


@contextlib.contextmanager
def _hidden_collection(name: str | None) -> Iterator[None]:
    """Hides a graph collection from the columns of a shared embedding.

    They would find their table in it, anywhere in the graph, so that two tasks shared one unawares. Without it they
    find it by its name in the variable scope, as every other column.
    """
    if name is None:
        yield
        return
    collection = tf.get_collection_ref(name)
    others, collection[:] = collection[:], []
    try:
        yield
    finally:
        collection[:] = others


def _fit(value: Any, spec: Any, who: str) -> Any:
    """Gives a feature the shape that its column reads: ``[batch, *shape]`` (numbers) or ``[batch, n]`` (categories)."""
    rank = value.shape.rank
    if rank == 0:
        raise DataError(f"{who} is a scalar; expected a batch, [batch, ...]")
    if not isinstance(spec, _FIXED):
        if rank in (1, 2):
            return value
        sparse = isinstance(value, tf.SparseTensor)
        shape = tf.cast(value.dense_shape, tf.int64) if sparse else tf.shape(value, out_type=tf.int64)
        flat = tf.stack([shape[0], tf.reduce_prod(shape[1:])])
        return tf.sparse.reshape(value, flat) if sparse else tf.reshape(value, flat)
    if isinstance(value, tf.SparseTensor):
        raise ModelError(f"{who} is sparse; a numeric column needs a dense one: fixedlen_feature or tf.sparse.to_dense")
    if value.dtype == tf.string:
        raise ModelError(f"{who} holds strings; a numeric column needs numbers: tf.strings.to_number")
    wanted = [int(size) for size in spec.shape]
    row = value.shape[1:]
    count = row.num_elements()  # None where unknown
    if count is not None and count != np.prod(wanted):
        raise DataError(f"{who} has {count} value(s) a row (shape {value.shape}), the column asks for {wanted}")
    if rank == len(wanted) + 1:
        return value
    return tf.reshape(value, tf.concat([tf.shape(value)[:1], wanted], 0))


def _scope_name(name: str) -> str:
    """Returns a valid scope name; names that had to be changed stay different from each other."""
    valid = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
    valid = valid if re.match(r"[A-Za-z0-9.]", valid) else f"s{valid}"
    return valid if valid == name else f"{valid}_{zlib.crc32(name.encode()):08x}"


def _what(value: Any) -> str:
    """Says what something is that is no graph tensor, and what to do."""
    if isinstance(value, tensorflow.data.Iterator):  # of TensorFlow 2: iter(dataset), which works in eager mode only
        return (
            "an iterator made in eager mode; import efl before it and use "
            "tf.compat.v1.data.make_one_shot_iterator(dataset).get_next()"
        )
    if isinstance(value, tf.data.Iterator) or (hasattr(value, "get_next") and hasattr(value, "element_spec")):
        return "an iterator; use the tensors that its get_next() returns"
    if isinstance(value, tf.data.Dataset):
        return "a tf.data.Dataset; use tf.data.make_one_shot_iterator(dataset).get_next()"
    if isinstance(value, tf.RaggedTensor):
        return "a RaggedTensor; use its to_sparse()"
    if isinstance(value, tf.Tensor):
        return (
            "an eager tensor: it would be the same batch in every step. efl needs graph mode: import efl (or call "
            "tf.disable_eager_execution()) before the first use of TensorFlow"
        )
    if isinstance(value, (np.ndarray, np.generic, int, float, str, bytes, list, tuple)):
        return f"{type(value).__name__}: it would be the same batch in every step; use tf.data or tf.constant"
    return type(value).__name__
