"""What ``input_fn`` returns: a batch's features, and what the feature columns make of them.

    columns = {"deep": [tf.feature_column.numeric_column("dense", 2)],
               "label": [tf.feature_column.numeric_column("label", 1)]}
    sample = efl.Sample(features, columns)
    logits = tf.layers.dense(sample["deep"], 1)

In a federation, ``efl.FederalSample`` also compares the rows with the peer's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow.compat.v1 as tf

from efl._columns import check_features, check_tensor, dense_groups
from efl.errors import ModelError


class UnknownGroup(ModelError, KeyError):
    """A sample has no group of that name."""

    __str__ = Exception.__str__  # KeyError quotes its message


class Sample(Mapping[str, tf.Tensor]):
    """A batch: a mapping from group to the dense outputs of the group's columns.

    All tensors are made here, in the caller's scope. An embedding table is a variable named by the caller's variable
    scope, the task (where there is one), group and column; two samples that agree in these, for example those of
    training and evaluation, share it, without any reuse scope. ``tf.feature_column.shared_embedding_columns``
    share theirs across groups too.

    Args:
      features: Name to tensor or SparseTensor, as ``DataIO.read()`` or an iterator's ``get_next()`` return them.
        Features of rank 1, 2, 3 and of unknown rank are given the shape that the column asks for; the
        first dimension is the batch.
      columns: Group to a list of feature columns (or one).
      name: Name of the sample in messages and op names; no part of any variable's name.

    Raises:
      ModelError: Features that are no tensors of the graph, or columns that are none or cannot read their feature.
      DataError: A column names a feature that is not there, or of another size.
    """

    def __init__(self, features: Mapping[str, Any], columns: Mapping[str, Any], name: str = "sample") -> None:
        if not isinstance(name, str) or not name:
            raise ModelError(f"sample name={name!r}: expected a string that is not empty")
        self.name = name
        self._features = check_features(features, name)
        self._groups = dense_groups(self._features, columns, name)

    @property
    def features(self) -> dict[str, Any]:
        """Name to tensor or SparseTensor, as they were given."""
        return dict(self._features)

    def __getitem__(self, group: str) -> tf.Tensor:
        """Returns a group: float32 ``[batch, sum of its columns' widths]``.

        Raises:
          UnknownGroup: There is none of that name (a ModelError and a KeyError).
        """
        if group not in self._groups:
            raise UnknownGroup(f"{self.name} has no group {group!r}; there is: {', '.join(map(repr, self._groups))}")
        return self._groups[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, group: object) -> bool:
        return group in self._groups

    # A sample is equal to itself only: comparing tensors would build ops.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        groups = ", ".join(f"{group!r}: {tensor.shape}" for group, tensor in self._groups.items())
        return f"{type(self).__name__}({self.name!r}, {{{groups}}})"

    def to_dict(self) -> dict[str, tf.Tensor]:
        """Returns the groups as a plain dict."""
        return dict(self._groups)

    def create(self, fgrps: Mapping[str, tf.Tensor]) -> Sample:
        """Returns a copy of this sample with some groups replaced or added.

        Args:
          fgrps: Group to tensor, for example what a layer made of the group.

        Raises:
          ModelError: A value is no tensor of the graph.
        """
        other = copy.copy(self)
        other.set_transformed_feature_groups(fgrps)
        return other

    def set_transformed_feature_groups(self, fgrps: Mapping[str, tf.Tensor]) -> None:
        """Replaces or adds groups of this sample; groups that are not named stay.

        Args:
          fgrps: Group to tensor.

        Raises:
          ModelError: A value is no tensor of the graph.
        """
        if not isinstance(fgrps, Mapping):
            raise ModelError(f"{self.name}: expected a dict of group -> tensor, got {type(fgrps).__name__}")
        for group, tensor in fgrps.items():
            check_tensor(tensor, f"{self.name}: group {group!r}")
        self._groups = {**self._groups, **fgrps}

    def before_step_ops(self) -> list[tf.Operation]:
        """Returns ops that a step has to run although nothing it fetches needs them."""
        return []
