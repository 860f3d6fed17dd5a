"""A sample whose rows are checked against the peer's: both parties must train on the same ids in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow.compat.v1 as tf

from efl.errors import ConfigError, DataError, ModelError
from efl.sample import Sample


class FederalSample(Sample):
    """One party's half of a batch.

    With ``verify_id`` the ids of every batch are compared with the peer's: one keyed digest of them, with a fresh key
    in every run, rides on the step's first message. A difference stops both parties before the step changes any
    weight, with step, block and row. What the peer learns: both parties know the key, so a peer who guesses all ids of
    a batch, in order, can confirm the guess, which is nothing new where it holds the same rows. After a difference,
    and once, short digests of the single rows are exchanged: then it can confirm guesses id by id. Use aliases as
    sample ids where they must not be guessed at.

    Args:
      features: As in ``Sample``. Those of ``FederalDataIO.read()`` also say which row of which block a
        difference is in.
      columns: As in ``Sample``.
      federal_role: ``model.federal_role``.
      communicator: ``model.communicator``. May be None only with ``verify_id=False``.
      sample_id_name: The feature that identifies a row on both sides: integers or strings, ``[batch]`` or
        ``[batch, 1]``.
      verify_id: Whether to compare ids.
      name: As in ``Sample``.

    Raises:
      ConfigError: A role that is not the communicator's, or no communicator.
      ModelError: ``verify_id`` without ``sample_id_name``; what ``Sample`` refuses.
      DataError: There is no such feature, or it cannot be an id.
    """

    def __init__(
        self,
        features: Mapping[str, Any],
        columns: Mapping[str, Any],
        federal_role: str,
        communicator: Any,
        sample_id_name: str | None = None,
        verify_id: bool = True,
        name: str = "sample",
    ) -> None:
        if federal_role not in ("leader", "follower"):
            raise ConfigError(f"{name}: federal_role={federal_role!r}: expected 'leader' or 'follower'")
        if communicator is not None and communicator.federal_role != federal_role:
            raise ConfigError(
                f"{name}: federal_role={federal_role!r}, but the communicator is the {communicator.federal_role}'s"
            )
        if verify_id and communicator is None:
            raise ConfigError(f"{name}: verify_id=True needs a communicator; pass model.communicator")
        if verify_id and sample_id_name is None:
            raise ModelError(
                f"{name}: verify_id=True needs to know which feature identifies a row: pass sample_id_name=..., or "
                "verify_id=False to train without comparing ids"
            )
        super().__init__(features, columns, name)
        self.federal_role = federal_role
        self.communicator = communicator
        self.sample_id_name = sample_id_name
        self._ids = None if sample_id_name is None else self._find_ids(sample_id_name)
        self._verifies = bool(verify_id)
        if self._verifies:
            origin = getattr(features, "origin", None)
            if origin is None:
                communicator.watch_ids(self._ids)
            else:
                communicator.watch_ids(self._ids, origin.block, origin.row)
                communicator.name_blocks(origin.blocks)

    @property
    def sample_ids(self) -> tf.Tensor | None:
        """The ids, ``[batch]`` or ``[batch, 1]``; None without ``sample_id_name``."""
        return self._ids

    def verify_sample_id(self) -> tf.Operation:
        """Returns an op that reads this step's ids.

        The comparison is no op: it rides on the messages of the step, and fails the step. A step that runs this op
        has taken the batch whose ids are compared.

        Raises:
          ModelError: The sample was made with ``verify_id=False``.
        """
        if not self._verifies:
            raise ModelError(f"{self.name} was made with verify_id=False; its ids are not compared")
        return tf.group(self._ids, name="verify_sample_id")

    def before_step_ops(self) -> list[tf.Operation]:
        """Returns ``verify_sample_id`` where ids are compared."""
        return [self.verify_sample_id()] if self._verifies else []

    def _find_ids(self, sample_id_name: str) -> tf.Tensor:
        who = f"{self.name}: sample_id_name={sample_id_name!r}"
        ids = self._features.get(sample_id_name)
        if ids is None:
            raise DataError(f"{who} names no feature; the features are: {', '.join(map(repr, self._features))}")
        if isinstance(ids, tf.SparseTensor):
            raise DataError(f"{who} is sparse; every row needs one id: use fixedlen_feature({sample_id_name!r}, 1)")
        if not (ids.dtype.is_integer or ids.dtype == tf.string):
            raise DataError(f"{who} is {ids.dtype.name}; ids are integers or strings")
        if ids.shape.rank not in (None, 1, 2) or (ids.shape.rank == 2 and ids.shape.as_list()[1] not in (None, 1)):
            raise DataError(f"{who} has shape {ids.shape}; expected [batch] or [batch, 1]")
        return ids
