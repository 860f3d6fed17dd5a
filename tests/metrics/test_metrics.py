"""efl.metrics against scikit-learn."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from sklearn.metrics import roc_auc_score

from efl import metrics
from efl.errors import ModelError

# On this grid all different scores fall into different bins at the default resolution.
GRID = 512


@pytest.fixture(autouse=True)
def _graph():
    with tf.Graph().as_default():
        yield


def _stream(pair, batches, feeds):
    """Runs the updates batch by batch, then reads the value, as a model does."""
    value, update = pair
    with tf.Session() as session:
        session.run(tf.local_variables_initializer())
        for batch in batches:
            session.run(update, dict(zip(feeds, batch)))
        return session.run(value)


def _auc(labels, scores, weights=None, batch=64, **options):
    labels, scores = np.asarray(labels), np.asarray(scores)
    feeds = [tf.placeholder(labels.dtype, [None]), tf.placeholder(scores.dtype, [None])]
    columns = [labels, scores]
    if weights is not None:
        feeds.append(tf.placeholder(tf.float32, [None]))
        columns.append(np.asarray(weights))
    pair = metrics.auc(*feeds, **options)
    batches = [[c[i : i + batch] for c in columns] for i in range(0, len(labels), batch)]
    return _stream(pair, batches, feeds)


def _gauc(labels, scores, groups, weights=None, batch=64, **options):
    columns = [np.asarray(labels), np.asarray(scores), np.asarray(groups)]
    feeds = [tf.placeholder(c.dtype if c.dtype.kind not in "SUO" else tf.string, [None]) for c in columns]
    if weights is not None:
        columns.append(np.asarray(weights))
        feeds.append(tf.placeholder(tf.float32, [None]))
    pair = metrics.gauc(*feeds, **options)
    batches = [[c[i : i + batch] for c in columns] for i in range(0, len(columns[0]), batch)]
    return _stream(pair, batches, feeds)


def _reference_gauc(labels, scores, groups, weights=None):
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights)
    areas, impressions = [], []
    for group in np.unique(groups):
        rows = groups == group
        if len(np.unique(labels[rows])) == 2:
            areas.append(roc_auc_score(labels[rows], scores[rows], sample_weight=weights[rows]))
            impressions.append(weights[rows].sum())
    return np.average(areas, weights=impressions)


def _data(seed, n=1000, grid=GRID):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, grid + 1, n) / grid
    labels = (rng.random(n) < 0.2 + 0.6 * scores).astype(np.int64)
    return labels, scores.astype(np.float32), rng


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_exact_on_scores_that_the_bins_tell_apart(seed):
    labels, scores, _ = _data(seed)
    assert _auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-7)


def test_auc_with_weights_is_exact():
    labels, scores, rng = _data(1)
    weights = rng.random(len(labels)).astype(np.float32)
    expected = roc_auc_score(labels, scores, sample_weight=weights)
    assert _auc(labels, scores, weights) == pytest.approx(expected, abs=1e-7)
    assert abs(expected - roc_auc_score(labels, scores)) > 1e-4  # the weights matter here


@pytest.mark.parametrize("bins", [49, 200, 1000, 8192])
@pytest.mark.parametrize("law", ["uniform", "rare"])
def test_auc_error_stays_within_the_stated_bound(bins, law):
    rng = np.random.default_rng(0)
    n = 4000
    logits = rng.normal(size=n) * 2 - (6 if law == "rare" else 0)
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    labels = rng.random(n) < 1 / (1 + np.exp(-logits))
    value = _auc(labels, scores, batch=n, num_thresholds=bins)

    # Pairs that the documentation allows to be confused: closer than 46 / bins of the distance from the end.
    up, down = scores[labels].astype(np.float64)[:, None], scores[~labels].astype(np.float64)[None, :]
    distance = np.maximum(np.minimum(up, 1 - up), np.minimum(down, 1 - down))
    per_octave = (bins - 3) // 46
    confused = (up != down) & (np.abs(up - down) <= distance / per_octave)
    bound = 0.5 * confused.mean()
    assert abs(value - roc_auc_score(labels, scores)) <= bound + 1e-7
    if bins == 8192:
        assert abs(value - roc_auc_score(labels, scores)) < 1e-4


def test_auc_tells_tiny_probabilities_apart():
    scores = np.array([1e-6, 1.01e-6, 1 - 1e-5, 1 - 1.2e-5], np.float32)
    assert _auc([0, 1, 1, 0], scores) == 0.75
    assert _auc([1, 0, 0, 1], scores) == 0.25


def test_bins_never_turn_an_order_around():
    bits = np.random.default_rng(0).integers(0, np.float32(1).view(np.int32), 200_000, dtype=np.int32)
    scores = np.unique(np.concatenate([bits.view(np.float32), np.linspace(0, 1, 50_001, dtype=np.float32)]))
    for per_octave in (1, 7, 178):
        with tf.Session() as session:
            bins = session.run(metrics._bin(tf.constant(scores), per_octave))
        assert (np.diff(bins) >= 0).all()
        assert bins[0] == 0 and bins[-1] == 2 * 23 * per_octave + 2


def test_auc_of_ties():
    labels = np.array([0, 1, 0, 1, 1])
    scores = np.array([0.5, 0.5, 0.5, 0.5, 0.9], np.float32)
    assert _auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-7)
    assert _auc(labels, np.full(5, 0.25, np.float32)) == 0.5


@pytest.mark.parametrize("make", [_auc, lambda y, s: _gauc(y, s, np.zeros(len(y), np.int64))])
@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0]])
def test_without_both_classes_the_value_is_nan(make, labels):
    assert np.isnan(make(np.array(labels, np.int64), np.full(len(labels), 0.5, np.float32)))


def _read_twice(pair, feeds, *batches):
    """Reads the value, which starts afresh each time, after each of the batches and again."""
    value, update = pair
    with tf.Session() as session:
        for batch in batches:
            session.run(tf.local_variables_initializer())
            session.run(value)
            session.run(update, dict(zip(feeds, batch)))
            session.run(value)
            session.run(value)


@pytest.mark.parametrize("only", [0, 1])
def test_one_class_alone_is_told_once_for_each_metric(only, caplog):
    label, score = tf.placeholder(tf.int64, [None]), tf.placeholder(tf.float32, [None])
    batch = [only] * 3, [0.1, 0.2, 0.3]
    for name in ("ctr", "cvr"):
        _read_twice(metrics.auc(label, score, name=name), [label, score], batch, batch)
    first, second = caplog.messages
    assert first.startswith(f"metric 'ctr' is nan: all labels so far are {only}, and the area needs both 0 and 1")
    assert second.startswith("metric 'cvr' is nan")


def test_groups_without_both_classes_are_told_once(caplog):
    columns = [tf.placeholder(dtype, [None]) for dtype in (tf.int64, tf.float32, tf.int64)]
    batch = [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], [7, 7, 8, 9]
    _read_twice(metrics.gauc(*columns), columns, batch, batch)
    (message,) = caplog.messages
    assert message.startswith(
        "metric 'gauc' is nan: none of the 3 groups so far (4 impressions) has both labels, 0 and 1"
    )


def test_values_that_exist_and_metrics_that_have_seen_nothing_are_not_told(caplog):
    columns = [tf.placeholder(dtype, [None]) for dtype in (tf.int64, tf.float32, tf.int64)]
    for pair in (metrics.auc(*columns[:2]), metrics.gauc(*columns)):
        _read_twice(pair, columns, ([], [], []), ([0, 1], [0.3, 0.4], [1, 1]))
    assert not caplog.messages


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.bool_, np.float32, np.float64])
@pytest.mark.parametrize("column", [False, True])
def test_label_dtypes_and_shapes(dtype, column):
    labels, scores, _ = _data(2, n=100)
    groups = np.arange(100) % 3
    shape = (-1, 1) if column else (-1,)
    label, prediction = tf.constant(labels.astype(dtype).reshape(shape)), tf.constant(scores.reshape(-1, 1))
    value = _stream(metrics.auc(label, prediction), [()], ())
    grouped = _stream(metrics.gauc(label, prediction, tf.constant(groups.reshape(shape))), [()], ())
    assert value == pytest.approx(roc_auc_score(labels, scores), abs=1e-7)
    assert grouped == pytest.approx(_reference_gauc(labels, scores, groups), abs=1e-7)


def test_update_op_of_auc_returns_the_new_value():
    labels, scores, _ = _data(3, n=300)
    label, score = tf.placeholder(tf.int64, [None]), tf.placeholder(tf.float32, [None])
    value, update = metrics.auc(label, score)
    with tf.Session() as session:
        session.run(tf.local_variables_initializer())
        for end in (100, 200, 300):
            new = session.run(update, {label: labels[end - 100 : end], score: scores[end - 100 : end]})
            assert new == pytest.approx(roc_auc_score(labels[:end], scores[:end]), abs=1e-7)
            assert session.run(value) == new


def test_initializing_the_metric_variables_starts_afresh():
    labels, scores, _ = _data(4, n=400)
    groups = np.arange(400) % 5
    label, score = tf.placeholder(tf.int64, [None]), tf.placeholder(tf.float32, [None])
    group = tf.placeholder(tf.int64, [None])
    area, grouped = metrics.auc(label, score), metrics.gauc(label, score, group)
    afresh = tf.variables_initializer(tf.get_collection(tf.GraphKeys.METRIC_VARIABLES))
    with tf.Session() as session:
        for half in (slice(0, 200), slice(200, 400)):
            session.run(afresh)
            session.run([area[1], grouped[1]], {label: labels[half], score: scores[half], group: groups[half]})
            got = session.run([area[0], grouped[0]])
            assert got[0] == pytest.approx(roc_auc_score(labels[half], scores[half]), abs=1e-7)
            assert got[1] == pytest.approx(_reference_gauc(labels[half], scores[half], groups[half]), abs=1e-7)


def test_state_is_local_and_not_trained():
    metrics.auc(tf.constant([1]), tf.constant([0.5]))
    metrics.gauc(tf.constant([1]), tf.constant([0.5]), tf.constant([1]))
    assert tf.trainable_variables() == [] and tf.global_variables() == []
    assert len(tf.get_collection(tf.GraphKeys.METRIC_VARIABLES)) == 4
    assert set(tf.local_variables()) == set(tf.get_collection(tf.GraphKeys.METRIC_VARIABLES))


def test_two_metrics_do_not_share_state():
    label, score = tf.constant([0, 1]), tf.constant([0.2, 0.8])
    first, second = metrics.auc(label, score), metrics.auc(label, 1 - score)
    with tf.Session() as session:
        session.run(tf.local_variables_initializer())
        session.run([first[1], second[1]])
        assert session.run([first[0], second[0]]) == [1.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weighted", [False, True])
def test_gauc_is_exact(seed, weighted):
    rng = np.random.default_rng(seed)
    n = 2000
    groups = rng.zipf(1.5, n) % 300  # few large groups, many of one row, many of one class
    scores = np.round(rng.random(n), 2 if seed % 2 else 6).astype(np.float32)  # with and without ties
    labels = (rng.random(n) < scores).astype(np.int64)
    weights = rng.random(n).astype(np.float32) if weighted else None
    expected = _reference_gauc(labels, scores, groups, weights)
    assert _gauc(labels, scores, groups, weights) == pytest.approx(expected, abs=1e-6)
    assert abs(expected - roc_auc_score(labels, scores)) > 1e-3  # groups matter here


def test_gauc_of_string_groups():
    labels, scores, rng = _data(6, n=500)
    groups = rng.integers(0, 20, 500)
    names = np.array([f"user-{g}" for g in groups], dtype=object)
    expected = _reference_gauc(labels, scores, groups)
    assert _gauc(labels, scores, names) == pytest.approx(expected, abs=1e-7)


def test_gauc_keeps_large_integer_ids_apart():
    base = 1 << 40
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.4, 0.3], np.float32)
    groups = np.array([base, base, base + 1, base + 1])
    assert _gauc(labels, scores, groups) == 0.5


@pytest.mark.parametrize("batch", [7, 64, 300, 1000])
def test_gauc_beyond_its_table_is_that_of_the_newest_rows(batch, caplog):
    labels, scores, rng = _data(7, n=1000)
    groups = rng.integers(0, 10, 1000)
    with caplog.at_level(logging.WARNING, logger="efl.metrics"):
        value = _gauc(labels, scores, groups, batch=batch, max_impressions=256)
    newest = slice(-256, None)
    assert value == pytest.approx(_reference_gauc(labels[newest], scores[newest], groups[newest]), abs=1e-7)
    assert "1000 impressions seen, the newest 256 kept" in caplog.text


def test_gauc_update_counts_impressions():
    _, update = metrics.gauc(tf.constant([0, 1]), tf.constant([0.2, 0.8]), tf.constant([1, 1]))
    with tf.Session() as session:
        session.run(tf.local_variables_initializer())
        assert [session.run(update), session.run(update)] == [2, 4]


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("inf"), 3.0])
def test_predictions_outside_the_unit_interval_fail_the_step(bad):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"efl.metrics, auc: .*in \[0, 1\].*not logits"):
        _auc([0, 1], np.array([0.5, bad], np.float32))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"efl.metrics, auc_1: .*in \[0, 1\]"):
        _auc([0, 1], np.array([bad, 0.5], np.float32))


def test_predictions_that_are_nan_fail_the_step_as_such():
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"efl.metrics, auc: predictions must be numbers"):
        _auc([0, 1], np.array([0.5, np.nan], np.float32))


def test_rounding_just_outside_the_unit_interval_is_clipped():
    assert _auc([0, 1], np.array([-5e-7, 1 + 5e-7], np.float32)) == 1.0


def test_labels_other_than_0_and_1_fail_the_step():
    with pytest.raises(tf.errors.InvalidArgumentError, match="labels must be 0 or 1"):
        _auc([0, 2], np.array([0.5, 0.5], np.float32))
    with pytest.raises(tf.errors.InvalidArgumentError, match="labels must be 0 or 1"):
        _auc([0, 0.5], np.array([0.5, 0.5], np.float32))


def test_negative_weights_fail_the_step():
    with pytest.raises(tf.errors.InvalidArgumentError, match="weights must be finite and not negative"):
        _auc([0, 1], np.array([0.5, 0.6], np.float32), weights=np.array([1.0, -1.0], np.float32))


def test_infinite_scores_fail_the_step_of_gauc():
    for bad in (np.inf, -np.inf, np.nan):
        with pytest.raises(tf.errors.InvalidArgumentError, match="predictions must be finite"):
            _gauc([0, 1], np.array([0.5, bad], np.float32), [1, 1])


def test_lengths_that_differ_only_at_run_time_fail_the_step():
    label, score = tf.placeholder(tf.int64, [None]), tf.placeholder(tf.float32, [None])
    _, update = metrics.auc(label, score)
    with tf.Session() as session:
        session.run(tf.local_variables_initializer())
        with pytest.raises(tf.errors.InvalidArgumentError):
            session.run(update, {label: [1], score: [0.1, 0.2]})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: metrics.auc(tf.zeros([3]), tf.zeros([2])),
            r"predictions of shape \(2,\) hold 2 .* 3 labels",
        ),
        (lambda: metrics.auc(tf.zeros([3]), tf.zeros([3]), tf.zeros([2])), r"weights of shape \(2,\)"),
        (
            lambda: metrics.auc(tf.zeros([3]), tf.zeros([3], tf.int32)),
            "predictions are int32: expected floats",
        ),
        (lambda: metrics.auc(tf.constant(["a"]), tf.zeros([1])), "labels are string"),
        (lambda: metrics.auc(tf.zeros([3]), tf.zeros([3]), num_thresholds=10), "num_thresholds=10"),
        (
            lambda: metrics.gauc(tf.zeros([3]), tf.zeros([3]), tf.zeros([3])),
            "group_ids are float32.*sample.features",
        ),
        (lambda: metrics.gauc(tf.zeros([3]), tf.zeros([3]), tf.zeros([2], tf.int64)), "group_ids of shape"),
        (
            lambda: metrics.gauc(tf.zeros([1]), tf.zeros([1]), tf.constant([1]), max_impressions=0),
            "max_impressions=0",
        ),
    ],
)
def test_what_cannot_fit_is_refused_when_the_graph_is_built(build, message):
    with pytest.raises(ModelError, match=message):
        build()
