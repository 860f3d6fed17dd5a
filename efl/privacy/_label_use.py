"""One use of a label randomiser in a graph: its op, the checks of what it is handed, and what compiling adds to it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._graph import as_graph_tensor, mark_rowwise
from efl._task_scope import MODE
from efl.errors import DataError, EflError, ModelError
from efl.privacy.noise import LABEL, Question

if TYPE_CHECKING:
    from efl.model import Model
    from efl.privacy._holder import NoiseHolder

_log = logging.getLogger("efl")
COLLECTION = "efl_privacy_labels"
_SLACK = 1e-3  # a prior in float32 sums to one up to rounding; logits do not
_SHOWN = 5


class LabelUse:
    """A place in a graph where labels are randomised.

    Attributes:
      who: Class and name, for messages.
      question: What is asked about labels.
      labels: What was handed over.
      op: Randomises; its inputs are ids, labels, and a prior where there is one.
      holder: Knows seed and ledger; None before the model is compiled.
    """

    def __init__(self, who: str, question: Question) -> None:
        self.who, self.question = who, question
        self.labels: tf.Tensor | None = None
        self.op: tf.Operation | None = None
        self.holder: NoiseHolder | None = None

    def build(self, sample_ids: Any, labels: Any, prior: Any) -> tf.Tensor:
        """Makes the op and notes it in the graph.

        Returns:
          int64 ``[batch]``.

        Raises:
          ModelError: It can be seen already that these are no ids, labels or prior.
        """
        ids = self._column(sample_ids, "sample ids")
        self.labels = self._column(labels, "labels")
        if not (ids.dtype.is_integer or ids.dtype == tf.string):
            raise ModelError(
                f"{self.who}: sample ids are {ids.dtype.name}: expected integers or strings (sample['id'] of a numeric "
                "column is a float, which does not keep large numbers apart; sample.features['id'] is what was read)"
            )
        dtype = self.labels.dtype
        if not (dtype.is_integer or dtype.is_floating or dtype == tf.bool):
            raise ModelError(f"{self.who}: labels are {dtype.name}: expected numbers from 0 to K - 1")
        inputs = [ids, self.labels]
        if not ids.shape[:1].is_compatible_with(self.labels.shape[:1]):
            raise ModelError(
                f"{self.who}: {ids.shape[0]} sample ids for {self.labels.shape[0]} labels: expected one for each"
            )
        if prior is not None:
            inputs.append(self._prior(prior))
        randomised = tf.numpy_function(self._randomised, inputs, tf.int64, name="efl_label_dp")
        mark_rowwise(randomised)
        self.op = randomised.op
        randomised.set_shape(self.labels.shape[:1] if self.labels.shape.rank else [None])
        tf.add_to_collection(COLLECTION, self)
        return randomised

    def _column(self, value: Any, what: str) -> tf.Tensor:
        tensor = as_graph_tensor(value, f"{self.who}: {what}")
        shape, classes = tensor.shape, self.question.classes
        if shape.rank is not None and (shape.rank not in (1, 2) or (shape.rank == 2 and shape[1] not in (None, 1))):
            advice = ""
            if what == "labels" and shape.rank == 2 and shape[1] == classes:
                advice = "; of one-hot labels pass tf.argmax(labels, 1)"
            raise ModelError(f"{self.who}: {what} have shape {shape}: expected [batch] or [batch, 1]{advice}")
        return tensor

    def _prior(self, prior: Any) -> tf.Tensor:
        tensor = as_graph_tensor(prior, f"{self.who}: prior")
        classes = self.question.classes
        if not tensor.dtype.is_floating:
            raise ModelError(f"{self.who}: prior is {tensor.dtype.name}: expected probabilities, floating point")
        if tensor.shape.rank not in (None, 1, 2) or (tensor.shape.rank and tensor.shape[-1] not in (None, classes)):
            raise ModelError(f"{self.who}: prior has shape {tensor.shape}: expected [{classes}] or [batch, {classes}]")
        return tf.cast(tensor, tf.float64)

    # ---- in a step

    def _randomised(self, ids: np.ndarray, labels: np.ndarray, *prior: np.ndarray) -> np.ndarray:
        if self.holder is None:
            raise ModelError(f"{self.who}: used outside of a model; compile() says where its secret seed lies")
        try:
            ids, whole = self._checked(ids, labels)
            weighed = self._checked_prior(prior[0], len(whole)) if prior else None
        except EflError as error:
            self.holder.error = error  # TensorFlow hands it on only as text
            raise
        return self.holder.randomised(self.question, ids, whole, weighed)

    def _checked(self, ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for what, value in (("sample ids", ids), ("labels", labels)):
            if value.ndim not in (1, 2) or (value.ndim == 2 and value.shape[1] != 1):
                raise DataError(f"{self.who}: {what} of shape {list(value.shape)}: expected [batch] or [batch, 1]")
        ids, labels = ids.reshape(-1), labels.reshape(-1)
        if len(ids) != len(labels):
            raise DataError(f"{self.who}: {len(ids)} sample ids for {len(labels)} labels: expected one for each")
        bad = ~((labels >= 0) & (labels < self.question.classes))  # also what is no number
        if labels.dtype.kind == "f":
            bad |= labels != np.floor(labels)
        if bad.any():
            # Values stay in this party's log: the text of an error is told to the peer.
            _log.error("%s: labels that are none: %s", self.who, labels[bad][:_SHOWN].tolist())
            raise DataError(
                f"{self.who}: labels have to be whole numbers from 0 to {self.question.classes - 1}, and some are not "
                "(which, stands in the log of the party that has them)"
            )
        return ids, labels.astype(np.int64)

    def _checked_prior(self, prior: np.ndarray, rows: int) -> np.ndarray:
        classes = self.question.classes
        if prior.shape not in ((classes,), (rows, classes)):
            raise DataError(
                f"{self.who}: prior of shape {list(prior.shape)} for {rows} rows: expected [{classes}] or "
                f"[batch, {classes}]"
            )
        if not (np.all(prior >= 0) and np.all(np.abs(prior.sum(-1) - 1) < _SLACK)):
            raise DataError(
                f"{self.who}: a prior has to be probabilities that sum to 1 in each row, and it is not; of logits pass "
                "tf.nn.softmax(logits)"
            )
        return prior


def bind(model: Model) -> None:
    """Gives the randomisers of a compiled model their secret, and looks for other uses of the labels.

    Raises:
      ModelError: Labels that are randomised also reach a loss, a metric, a message or a variable as they are.
    """
    from efl.privacy import _label_checks

    uses: list[LabelUse] = [use for use in tf.get_collection(COLLECTION) if use.holder is None]
    _label_checks.check(model, uses, tf.get_collection(COLLECTION))
    for use in uses:
        use.holder = model._noise
    for scope in model._programs if uses else ():
        if scope.mode is MODE.TRAIN:  # what the handshake tells of the peer is kept here
            model._noise.conditions[f"{scope.wire}/labels"] = {"kind": LABEL}
