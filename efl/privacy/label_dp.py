"""Labels that are randomised once, before anything is computed from them: differential privacy of the labels alone.

    label_dp = efl.privacy.LabelDP(epsilon=3.0, num_classes=10)

    def loss_fn(model, sample):
        labels = label_dp(sample.sample_ids, sample["label"])
        return label_dp.loss(logits_of(sample), labels)

Whoever sees anything that was computed from the result, the peer and the gradients that it receives included, learns
at most ε about a row's label (pure, δ = 0; two data sets are neighbours that differ in the label of one sample id).
Columns are no secret of this promise. It holds as long as the labels themselves are used nowhere else, which is looked
for in the graph when the model is compiled.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._task_scope import MODE, current_task_scope
from efl.errors import ConfigError, ModelError
from efl.privacy._label_use import LabelUse
from efl.privacy.noise import Question
from efl.privacy.noise.response import LEAST_EPSILON, MOST_CLASSES, WORDS, wrong_words
from efl.privacy.optimizers import checked_number

__all__ = ["LabelDP", "RRWithPrior"]


class _Randomiser:
    """What both have in common."""

    def __init__(self, epsilon: float, num_classes: int, name: str = "label") -> None:
        who = type(self).__name__
        self.epsilon = checked_number(f"{who}: epsilon", epsilon, LEAST_EPSILON, may_be_least=True)
        if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)):
            raise ConfigError(f"{who}: num_classes={num_classes!r}: expected a whole number of at least 2")
        if not 2 <= num_classes <= MOST_CLASSES:
            raise ConfigError(f"{who}: num_classes={num_classes}: expected a number from 2 to {MOST_CLASSES}")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{who}: name={name!r}: expected a string that is not empty")
        self.num_classes, self.name = int(num_classes), name

    def _randomise(self, sample_ids: Any, labels: Any, prior: Any) -> tf.Tensor:
        who = f"{type(self).__name__} {self.name!r}"
        if current_task_scope().mode is MODE.EVAL:
            raise ModelError(
                f"{who} in evaluation: labels are randomised for training only. Metrics of evaluation data need its "
                "labels as they are: leave this out in eval_fn (what you publish of them is outside the promise)"
            )
        if sample_ids is None:
            raise ModelError(
                f"{who}: there is no sample id. A label is randomised once, by a function of a secret and its sample "
                "id; without one it would be drawn anew in every epoch, and averaging the draws gives the label away. "
                "Pass sample.sample_ids of an efl.FederalSample with sample_id_name=…, or a column that numbers the "
                "rows of the data, such as sample.features['id']"
            )
        use = LabelUse(who, Question(self.name, self.epsilon, self.num_classes))
        return use.build(sample_ids, labels, prior)

    def _flat(self, logits: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Logits of rank 1 (two classes, the log odds of class 1) or 2, and labels of rank 1."""
        logits, labels = tf.convert_to_tensor(logits), tf.convert_to_tensor(labels)
        if not (labels.dtype.is_integer and logits.dtype.is_floating):
            raise ModelError(
                f"{type(self).__name__} {self.name!r}: loss of logits of {logits.dtype.name} and labels of "
                f"{labels.dtype.name}: expected floating point, and the integers that were randomised"
            )
        width = logits.shape[-1] if logits.shape.rank else None
        binary = self.num_classes == 2 and (logits.shape.rank == 1 or width == 1)
        if not binary and (logits.shape.rank != 2 or width not in (None, self.num_classes)):
            also = ", [batch, 1] or [batch]" if self.num_classes == 2 else ""
            raise ModelError(
                f"{type(self).__name__} {self.name!r}: logits have shape {logits.shape}: expected "
                f"[batch, {self.num_classes}]{also}"
            )
        return tf.reshape(logits, [-1]) if binary else logits, tf.reshape(labels, [-1])


class LabelDP(_Randomiser):
    """Randomised response: each label is kept with probability e^ε / (e^ε + K - 1), else it becomes any of the others.

    It is randomised once: by a function of the secret seed of the model's ``checkpoint_dir`` and the sample id, so that
    it is the same in every epoch, after every restart and in every task. The promise, which is entered in the ledger of
    releases before the first label is used and shown by ``model.privacy_spent``: ε-differential privacy (pure, δ = 0)
    of the label of a sample id, against everybody who sees what was computed from the result; in a federation that is
    the peer, with gradients, activations and all.

    Two of different names are two releases, whose ε add up: of two labels, or of one that is released twice.

    Args:
      epsilon: ε, at least 1e-6. Randomisation is exact in integers of 64 bits, so beyond 44 it is no weaker.
      num_classes: K, from 2 to 2**20.
      name: Of the label, in the ledger. The same name with another ε is refused.

    Raises:
      ConfigError: A number that cannot be.
    """

    def __call__(self, sample_ids: Any, labels: Any) -> tf.Tensor:
        """Makes the labels to train on.

        Args:
          sample_ids: Integers or strings ``[batch]`` or ``[batch, 1]``: they name the rows of the whole data, not those
            of a batch. An id has one label, wherever it comes up; one that comes with another fails the step.
          labels: Integers, booleans, or whole floats (as of a feature column), ``[batch]`` or ``[batch, 1]``, of 0 to
            K - 1.

        Returns:
          int64 ``[batch]``.

        Raises:
          ModelError: No sample ids, no such labels (one-hot ones, say), or in evaluation.
        """
        return self._randomise(sample_ids, labels, None)

    def weights(self, labels: Any, dtype: tf.DType = tf.float32) -> tf.Tensor:
        """An unbiased estimate of the one-hot label: its expectation over the randomisation is the label's own.

        Any loss that is linear in the one-hot label, ``sum_j weights[:, j] * loss_j``, is unbiased with it: the method
        of unbiased estimators of Natarajan et al., "Learning with Noisy Labels" (NeurIPS 2013, section 3), for K
        classes. One entry is above 1 and the others are negative: such a loss of one row may be negative too.

        Args:
          labels: Integers ``[batch]`` or ``[batch, 1]``: randomised ones; here, or by the party that has the labels.
          dtype: Floating point.

        Returns:
          ``[batch, K]``; each row sums to one.
        """
        kept, other = self._weights()
        return tf.one_hot(tf.reshape(labels, [-1]), self.num_classes, kept, other, dtype=dtype)

    def loss(self, logits: Any, labels: Any) -> tf.Tensor:
        """The unbiased cross entropy of each row: its expectation is the cross entropy with the row's own label.

        The same holds of its gradient. It is convex in the logits; of single rows it may be negative, and a model that
        can learn each row by heart drives it to minus infinity. For such a model the plain cross entropy of the
        randomised labels, which is biased and bounded, is the better choice; the promise is the same.

        Args:
          logits: float ``[batch, K]``; with two classes also ``[batch]`` or ``[batch, 1]``, log odds of class 1.
          labels: Integers ``[batch]`` or ``[batch, 1]``: randomised ones; here, or by the party that has the labels.

        Returns:
          ``[batch]``.

        Raises:
          ModelError: Shapes or dtypes that do not fit.
        """
        logits, labels = self._flat(logits, labels)
        if logits.shape.rank == 1:
            kept, other = self._weights()
            of_one = tf.where(tf.equal(labels, 1), kept * tf.ones_like(logits), other * tf.ones_like(logits))
            return tf.nn.sigmoid_cross_entropy_with_logits(labels=of_one, logits=logits)
        return tf.nn.softmax_cross_entropy_with_logits_v2(
            labels=tf.stop_gradient(self.weights(labels, logits.dtype)), logits=logits
        )

    def _weights(self) -> tuple[float, float]:
        """Of the label that was told, and of each other one: a row of the inverse of the matrix of probabilities."""
        wrong = Fraction(wrong_words(self.epsilon, self.num_classes), WORDS)  # as it is, not as it should be
        margin = 1 - self.num_classes * wrong  # of the right answer above a wrong one
        return float((1 - wrong) / margin), float(-wrong / margin)


class RRWithPrior(_Randomiser):
    """Randomised response among the k labels that a prior says are likeliest; k such that most labels survive.

    Algorithms 1 and 2 of Ghazi et al., "Deep Learning with Label Differential Privacy" (NeurIPS 2021,
    arXiv:2102.06062, section 3): no mechanism of the same ε keeps a label that is drawn from the prior with higher
    probability. The promise and its conditions are those of ``LabelDP``.

    **The prior must not come from the labels**, unless through a release that is itself counted: it may be public, or
    made by a model that was trained on *other* rows' randomised labels, as in the paper's training in several stages
    (LP-MST): randomise half of the labels with ``LabelDP`` and train; then the other half by that model's
    probabilities, with an ``RRWithPrior`` of the same name. Every label is released once, and ε is that of one release.
    A row of equal probabilities gets what ``LabelDP`` gave it, so the second stage may train on all rows.

    A row keeps its prior for ever: one that allows other answers than before fails the step, since two answers to
    different questions would tell more than ε. So compute priors once and keep them with the data; the model in
    training is no prior.

    Args:
      epsilon: As of ``LabelDP``.
      num_classes: K.
      name: As of ``LabelDP``.

    Raises:
      ConfigError: A number that cannot be.
    """

    def __call__(self, sample_ids: Any, labels: Any, prior: Any) -> tf.Tensor:
        """Makes the labels to train on.

        Args:
          sample_ids: As of ``LabelDP``.
          labels: As of ``LabelDP``.
          prior: Probabilities, float ``[K]`` (an array or a tensor, the same for all rows) or ``[batch, K]``.

        Returns:
          int64 ``[batch]``.

        Raises:
          ModelError: No sample ids, no such labels, no such prior, or in evaluation.
        """
        if prior is None:
            raise ModelError(f"RRWithPrior {self.name!r}: prior=None: expected probabilities; LabelDP needs none")
        return self._randomise(sample_ids, labels, prior)

    def loss(self, logits: Any, labels: Any) -> tf.Tensor:
        """The cross entropy of each row with its randomised label, as in the paper.

        There is no unbiased loss: labels that no answer stands for leave no trace.

        Args:
          logits: float ``[batch, K]``; with two classes also ``[batch]`` or ``[batch, 1]``, log odds of class 1.
          labels: Integers ``[batch]`` or ``[batch, 1]``: randomised ones.

        Returns:
          ``[batch]``.

        Raises:
          ModelError: Shapes or dtypes that do not fit.
        """
        logits, labels = self._flat(logits, labels)
        if logits.shape.rank == 1:
            return tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.cast(labels, logits.dtype), logits=logits)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
