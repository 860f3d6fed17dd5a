"""Ranking metrics that cost little per step: ``auc`` and ``gauc`` (AUC within groups).

Both return the ``(value, update_op)`` pair that ``tf.metrics.*`` return. Their state lies in local variables
of the collections ``LOCAL_VARIABLES`` and ``METRIC_VARIABLES``, so that running those variables' initializers
starts the metric afresh (a model does it before every evaluation):

    auc = efl.metrics.auc(sample['label'], tf.nn.sigmoid(logits))
    model.add_metric('auc', auc, efl.MODE.EVAL)

Where an area is not defined, because one of the two classes has not been seen, the value is NaN, as in
scikit-learn, and a warning says so once.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from efl._graph_checks import check
from efl.errors import ModelError

__all__ = ["auc", "gauc"]

_LOG = logging.getLogger("efl.metrics")

# Binary orders of magnitude between the smallest distance of a float32 from 1.0 (2^-24) and 0.5.
_OCTAVES = 23
# Rounding may push a probability this far out of [0, 1]; what is further out is no probability.
_SLACK = 1e-6
# The histogram is summed up in rows of this many bins.
_ROW = 8


def auc(
    labels: Any,
    predictions: Any,
    weights: Any = None,
    num_thresholds: int = 8192,
    name: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Area under the ROC curve of everything seen since the last initialization.

    The scores are counted in a histogram of ``num_thresholds`` bins, one count per class, and pairs within a
    bin count one half, as tied pairs do. The bins are fine where probabilities of rare events lie: every
    octave of the distance from the nearer end (0 or 1) has the same number of them. **Resolution**: two
    scores are told apart when they differ by more than ``46 / num_thresholds`` of that distance (at most
    ``12 / num_thresholds`` absolutely), and both are further than 6e-8 from the end. The value is exact when all
    different scores are told apart; otherwise it is off by at most half the share of the (positive, negative)
    pairs that are not.

    A step costs a scatter of the batch and one pass over the histogram, whatever has been seen before.

    Args:
      labels: 0/1 or booleans of any numeric dtype, shape ``[batch]`` or ``[batch, 1]``.
      predictions: Probabilities of class 1, floats of the same number of elements, read as float32.
        Values outside [0, 1] by more than rounding, and NaN, fail the step: logits are a mistake worth
        hearing of.
      weights: None, or non-negative numbers: a scalar or one per label.
      num_thresholds: Bins of the histogram, at least 49. The state takes 16 bytes for each.
      name: Name scope, ``"auc"`` when None.

    Returns:
      ``(value, update_op)``: two float32 scalars, the area before and after counting this batch. NaN while
      positives or negatives are missing.

    Raises:
      ModelError: Static shapes or dtypes do not fit, or ``num_thresholds`` is less than 49.
    """
    if isinstance(num_thresholds, bool) or not isinstance(num_thresholds, int) or num_thresholds < 2 * _OCTAVES + 3:
        raise ModelError(f"efl.metrics.auc: num_thresholds={num_thresholds!r}: expected an int of at least 49")
    with tf.name_scope(name, "auc") as scope:
        label = scope.rstrip("/")
        batch = _Batch(labels, predictions, weights, label)
        per_octave = (num_thresholds - 3) // (2 * _OCTAVES)
        bins = -(-(2 * _OCTAVES * per_octave + 3) // _ROW) * _ROW
        # float64 counts exactly to 2^53; float32 would stand still at 2^24 rows of one kind.
        histogram = _metric_variable([2 * bins], tf.float64, "histogram")
        index = _bin(batch.scores, per_octave) + bins * tf.cast(batch.positive, tf.int32)
        counted = tf.raw_ops.ResourceScatterAdd(
            resource=histogram.handle, indices=index, updates=tf.cast(batch.weights, tf.float64)
        )
        # Not stateful, as below: a model reads it after the step.
        value = tf.numpy_function(_Area(label), _area(histogram.read_value(), bins), tf.float32, stateful=False)
        value.set_shape([])
        with tf.control_dependencies([counted]):
            update = tf.identity(_area(histogram.read_value(), bins)[0], name="update_op")
        return tf.identity(value, name="value"), update


def gauc(
    labels: Any,
    predictions: Any,
    group_ids: Any,
    weights: Any = None,
    max_impressions: int = 1 << 20,
    name: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Grouped AUC: the mean of the AUCs within each group, weighted by the groups' numbers of impressions.

    Groups in which one class is missing are left out, from the mean and from the weights. (Zhou et al., "Deep
    Interest Network", arXiv:1706.06978, section 5.2, with one group per user.)

    The impressions themselves are kept, so that groups may be as many as they like, and the value is
    **exact** over the newest ``max_impressions`` (ties count one half). Beyond that it is a moving window,
    and a warning says so once. An update costs a copy of the batch; reading the value sorts what is kept
    (0.7 s for 2^20), so read it when it is wanted: pass the pair to ``model.add_metric``.

    Args:
      labels: 0/1 or booleans of any numeric dtype, shape ``[batch]`` or ``[batch, 1]``.
      predictions: Probabilities or any other finite scores of the same number of elements, read as float32.
        Only their order within a group counts.
      group_ids: Integers or strings of the same number of elements. Floats are refused: a large id would lose
        digits on the way (``sample['user']`` is a float column, ``sample.features['user']`` is the id).
      weights: None, or non-negative numbers: a scalar or one per label. A group then counts with the sum of
        its weights.
      max_impressions: How many impressions are kept, 20 bytes each.
      name: Name scope, ``"gauc"`` when None.

    Returns:
      ``(value, update_op)``: ``value`` is a float32 scalar, NaN while no group has both classes.
      ``update_op`` is the number of impressions seen so far, an int64 scalar (not the area: sorting at every
      step is dear).

    Raises:
      ModelError: Static shapes or dtypes do not fit, or ``max_impressions`` is not positive.
    """
    if isinstance(max_impressions, bool) or not isinstance(max_impressions, int) or max_impressions < 1:
        raise ModelError(f"efl.metrics.gauc: max_impressions={max_impressions!r}: expected an int of at least 1")
    with tf.name_scope(name, "gauc") as scope:
        label = scope.rstrip("/")
        batch = _Batch(labels, predictions, weights, label, probabilities=False)
        groups = _flat_like(_group_keys(group_ids), batch.labels, "group_ids", label)
        kept_groups = _metric_variable([max_impressions], tf.int64, "groups")
        kept_rows = _metric_variable([max_impressions, 3], tf.float32, "rows")
        seen = _metric_variable([], tf.int64, "seen")

        rows = tf.stack([batch.scores, tf.cast(batch.positive, tf.float32), batch.weights], axis=1)
        size = tf.size(groups, out_type=tf.int64)
        # Of a batch that is larger than the table, only the last rows: no slot is written twice.
        first = tf.maximum(size - max_impressions, 0)
        start = seen.read_value()
        slots = tf.math.floormod(start + tf.range(first, size), max_impressions)
        put_groups = tf.raw_ops.ResourceScatterUpdate(
            resource=kept_groups.handle, indices=slots, updates=groups[first:]
        )
        put_rows = tf.raw_ops.ResourceScatterUpdate(resource=kept_rows.handle, indices=slots, updates=rows[first:])
        with tf.control_dependencies([put_groups, put_rows]):
            update = tf.identity(seen.assign_add(size, read_value=True), name="update_op")

        # Not stateful: it depends on the variables alone, so it may be read after the step and only when
        # wanted.
        state = [kept_groups.read_value(), kept_rows.read_value(), seen.read_value()]
        value = tf.numpy_function(_GroupedArea(label), state, tf.float32, stateful=False)
        value.set_shape([])
        return tf.identity(value, name="value"), update


class _Batch:
    """The checked inputs of one step: ``labels``, ``positive``, ``scores`` and ``weights``, each ``[n]``."""

    def __init__(self, labels: Any, predictions: Any, weights: Any, label: str, probabilities: bool = True) -> None:
        self.labels = tf.reshape(_numeric(labels, "labels", label), [-1])
        scores = _numeric(predictions, "predictions", label)
        if not scores.dtype.is_floating:
            raise ModelError(f"efl.metrics, {label}: predictions are {scores.dtype.name}: expected floats")
        scores = _flat_like(tf.cast(scores, tf.float32), self.labels, "predictions", label)
        if weights is None:
            self.weights = tf.ones_like(scores)
        else:
            weights = tf.cast(_numeric(weights, "weights", label), tf.float32)
            if weights.shape.rank == 0:
                weights = tf.fill(tf.shape(scores), weights)
            self.weights = _flat_like(weights, self.labels, "weights", label)

        self.positive = tf.cast(self.labels, tf.bool)
        checks = []
        if self.labels.dtype != tf.bool:
            binary = tf.equal(self.labels, tf.cast(self.positive, self.labels.dtype))
            checks.append(
                check(tf.reduce_all(binary), label, "labels must be 0 or 1", ["labels begin with", self.labels])
            )
        low, high = tf.reduce_min(scores), tf.reduce_max(scores)  # NaN where one score is
        if probabilities:
            number = ~tf.math.is_nan(low)
            expected = (
                "predictions must be numbers: lower the learning rate, or look at what makes them, and at the input"
            )
            checks.append(check(number, label, expected, ["predictions range from", low, "to", high]))
            fine = ((low >= -_SLACK) & (high <= 1 + _SLACK)) | ~number
            expected = "predictions must lie in [0, 1]: pass probabilities, such as tf.sigmoid(logits), not logits"
        else:
            # Of no scores at all the smallest is infinite, and greater than the largest.
            fine = (tf.math.is_finite(low) & tf.math.is_finite(high)) | (low > high)
            expected = "predictions must be finite: lower the learning rate, or look at what makes them"
        checks.append(check(fine, label, expected, ["predictions range from", low, "to", high]))
        if weights is not None:
            legal = (self.weights >= 0) & tf.math.is_finite(self.weights)
            arrived = ["weights begin with", self.weights]
            checks.append(check(tf.reduce_all(legal), label, "weights must be finite and not negative", arrived))
        with tf.control_dependencies(checks):
            self.scores = tf.clip_by_value(scores, 0.0, 1.0) if probabilities else tf.identity(scores)


def _numeric(value: Any, what: str, label: str) -> tf.Tensor:
    tensor = tf.convert_to_tensor(value)
    if not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
        raise ModelError(f"efl.metrics, {label}: {what} are {tensor.dtype.name}: expected numbers or booleans")
    return tensor


def _group_keys(group_ids: Any) -> tf.Tensor:
    tensor = tf.convert_to_tensor(group_ids)
    if tensor.dtype == tf.string:
        return tf.strings.to_hash_bucket_fast(tensor, (1 << 63) - 1)
    if tensor.dtype.is_integer:
        return tf.cast(tensor, tf.int64)
    raise ModelError(
        f"efl.metrics.gauc: group_ids are {tensor.dtype.name}: expected integers or strings (a float id loses digits;"
        " take the id from sample.features, or cast it)"
    )


def _flat_like(tensor: tf.Tensor, labels: tf.Tensor, what: str, label: str) -> tf.Tensor:
    """Returns ``tensor`` as ``[n]``, as long as ``labels``; other lengths are refused, in the step at the latest."""
    have, want = tensor.shape.num_elements(), labels.shape.num_elements()
    if have is not None and want is not None and have != want:
        raise ModelError(
            f"efl.metrics, {label}: {what} of shape {tensor.shape} hold {have} elements, but there are {want} labels"
        )
    return tf.reshape(tensor, tf.shape(labels))


def _metric_variable(shape: list[int], dtype: tf.DType, name: str) -> tf.Variable:
    return tf.Variable(
        lambda: tf.zeros(shape, dtype),
        trainable=False,
        collections=[tf.GraphKeys.LOCAL_VARIABLES, tf.GraphKeys.METRIC_VARIABLES],
        use_resource=True,
        name=name,
    )


def _bin(scores: tf.Tensor, per_octave: int) -> tf.Tensor:
    """Bin of each score of [0, 1], not decreasing in the score; ``2 * _OCTAVES * per_octave + 3`` bins.

    Exact integer arithmetic on the float's own bits, so no rounding can turn an order around.
    """
    below = scores < 0.5
    distance = tf.where(below, scores, 1.0 - scores)  # exact: both are multiples of the same power of two
    bits = tf.bitcast(distance, tf.int32)
    octave = tf.bitwise.right_shift(bits, 23) - (127 - _OCTAVES - 1)
    mantissa = tf.cast(tf.bitwise.bitwise_and(bits, (1 << 23) - 1), tf.int64)
    within = tf.cast(tf.bitwise.right_shift(mantissa * per_octave, tf.constant(23, tf.int64)), tf.int32)
    # 0: nearer to the end than 2^-24; then the octaves; the last one is 0.5 itself.
    position = tf.where(octave < 0, tf.zeros_like(octave), 1 + octave * per_octave + within)
    return tf.where(below, position, 2 * (_OCTAVES * per_octave + 1) - position)


def _area(histogram: tf.Tensor, bins: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The area, and the sums of the weights of positives and negatives."""
    negatives, positives = tf.unstack(tf.reshape(histogram, [2, bins // _ROW, _ROW]))
    # Negatives that score lower, plus half of those in the same bin. tf.cumsum takes 13 ns an element, four
    # times as long as all the rest: only the rows' totals go through it, a product with a triangle does the
    # row.
    triangle = np.triu(np.ones((_ROW, _ROW)), 1) + 0.5 * np.eye(_ROW)
    rows = tf.reduce_sum(negatives, axis=1, keepdims=True)
    beaten = tf.matmul(negatives, triangle) + tf.cumsum(rows, exclusive=True)
    up, down = tf.reduce_sum(positives), tf.reduce_sum(rows)
    # 0 / 0 is NaN: no pairs, no area.
    return tf.cast(tf.reduce_sum(positives * beaten) / (up * down), tf.float32), up, down


class _Area:
    """The value of ``auc``: says once why it is NaN."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._warned = False

    def __call__(self, area: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
        if np.isnan(area) and positives + negatives > 0 and not self._warned:
            self._warned = True
            _LOG.warning(
                "metric '%s' is nan: all labels so far are %d, and the area needs both 0 and 1 (with a weight above 0)."
                " Where one of them is rare, more rows help; otherwise look at the labels",
                self._label, positives > 0,
            )  # fmt: skip
        return area


class _GroupedArea:
    """Computes the value of ``gauc`` from the kept rows; says once why it is NaN."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._warned = False
        self._warned_of_nan = False

    def __call__(self, groups: np.ndarray, rows: np.ndarray, seen: np.ndarray) -> np.float32:
        kept = min(int(seen), len(groups))
        if int(seen) > kept and not self._warned:
            self._warned = True
            _LOG.warning(
                "metric '%s': %d impressions seen, the newest %d kept: the value is of those only"
                " (raise max_impressions to cover all)",
                self._label, int(seen), kept,
            )  # fmt: skip
        groups, rows = groups[:kept], rows[:kept]
        area = _grouped_area(groups, rows[:, 0], rows[:, 1] > 0, rows[:, 2])
        if np.isnan(area) and kept and not self._warned_of_nan:
            self._warned_of_nan = True
            _LOG.warning(
                "metric '%s' is nan: none of the %d groups so far (%d impressions) has both labels, 0 and 1 (with a"
                " weight above 0). Where one of them is rare, more rows help; otherwise look at labels and group_ids",
                self._label, len(np.unique(groups)), kept,
            )  # fmt: skip
        return area


def _grouped_area(groups: np.ndarray, scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.float32:
    """Impression-weighted mean of the groups' AUCs, NaN if no group holds both classes. All ``[n]``."""
    if not len(groups):
        return np.float32(np.nan)
    order = np.lexsort((scores, groups))
    groups, scores, weights = groups[order], scores[order], weights[order].astype(np.float64)
    up = np.where(positive[order], weights, 0.0)
    down = weights - up

    new_group = np.concatenate([[True], groups[1:] != groups[:-1]])
    new_score = new_group | np.concatenate([[True], scores[1:] != scores[:-1]])
    score_starts = np.flatnonzero(new_score)
    # From here on one entry per (group, score): tied rows are one.
    up, down = np.add.reduceat(up, score_starts), np.add.reduceat(down, score_starts)
    group_starts = np.flatnonzero(new_group[score_starts])
    group_of = np.cumsum(new_group[score_starts]) - 1

    positives, negatives = np.add.reduceat(up, group_starts), np.add.reduceat(down, group_starts)
    below = np.cumsum(down) - down
    below -= below[group_starts][group_of]
    wins = np.add.reduceat(up * (below + 0.5 * down), group_starts)

    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return np.float32(np.nan)
    areas = wins[both] / (positives[both] * negatives[both])
    return np.float32(np.average(areas, weights=positives[both] + negatives[both]))
