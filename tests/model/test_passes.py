"""Which data sets of the user's own can bring a row more than once in a pass, by their graphs."""

import math
import re
from collections import Counter

import numpy as np
import pytest

import efl
from efl.privacy.accounting import Mechanism, compute_epsilon

import tensorflow.compat.v1 as tf  # isort: skip
from efl import _passes
from efl._program import Program
from efl._task_scope import MODE, TaskScope

D = tf.data.Dataset
N = 12
X = np.arange(N)


def rows():
    return D.from_tensor_slices(X)


def program_over(iterator):
    x = tf.reshape(tf.cast(iterator.get_next(), tf.float32), [-1, 1])
    sample = efl.Sample({"x": x}, {"x": [tf.feature_column.numeric_column("x", 1)]})
    return Program(TaskScope(MODE.TRAIN, None), sample=sample)


def of(program):
    passes = _passes.passes_of(program, None)
    return passes.twice, passes.straddles


def told(data, one_shot=False):
    make = tf.data.make_one_shot_iterator if one_shot else tf.data.make_initializable_iterator
    program = program_over(make(data()))
    return of(program)


def most(data, passes=3):
    """How often a row comes at most, in as many rows as so many passes have."""
    with tf.Graph().as_default(), tf.Session() as session:
        following = tf.data.make_one_shot_iterator(data()).get_next()
        seen = []
        while len(seen) < passes * N:
            try:
                seen.extend(np.ravel(session.run(following)).astype(int).tolist())
            except tf.errors.OutOfRangeError:
                break
    return max(Counter(seen[: passes * N]).values())


ONCE = {
    "in order": lambda: rows().repeat().batch(4),
    "shuffled, then repeated": lambda: rows().shuffle(N, seed=1).repeat().batch(4),
    "batches repeated": lambda: rows().shuffle(N).batch(5).repeat(3),
    "one pass": lambda: rows().shuffle(5).batch(4),
    "repeated once": lambda: rows().repeat(1).shuffle(N).batch(4),
    "mapped and prefetched": lambda: rows().shuffle(N).map(lambda x: x).repeat().batch(4).prefetch(2),
    "cached": lambda: rows().cache().shuffle(N).repeat().batch(4),
    "files by turns": lambda: (
        D.range(4).shuffle(4).interleave(lambda i: D.from_tensor_slices(X).shard(4, i), 2).repeat().batch(4)
    ),
    "files one after the other": lambda: D.range(4).repeat().flat_map(lambda i: D.range(3 * i, 3 * i + 3)).batch(4),
    "an epoch for each element": lambda: D.range(3).flat_map(lambda e: rows().shuffle(N, seed=e)).batch(4),
    "zipped with itself": lambda: (
        D.zip((rows().map(lambda x: x), rows().map(lambda x: x))).map(lambda x, y: x).repeat()
    ),
    "numbered": lambda: rows().enumerate().shuffle(N).map(lambda i, x: x).repeat().batch(4),
    "beside endless seeds": lambda: D.zip((rows(), D.range(5).repeat())).shuffle(N).map(lambda x, y: x).repeat(),
    "windows side by side": lambda: rows().window(3, 3).flat_map(lambda w: w.batch(3)).repeat(),
    "of several sources": lambda: D.range(6).concatenate(D.range(6, 12)).shuffle(N).repeat().batch(4),
    "drawn from several": lambda: (
        tf.data.experimental.sample_from_datasets([D.range(6), D.range(6, 12)], [0.5, 0.5]).repeat().batch(4)
    ),
    "a generator": lambda: D.from_generator(lambda: iter(X), tf.int64, []).shuffle(N).repeat().batch(4),
}


def _same_rows_twice():
    data = rows()
    return data.concatenate(data.map(lambda x: x)).shuffle(2 * N).repeat()


def _joined_with_others():
    data = rows()
    return D.zip((data, data.skip(1))).map(lambda x, y: tf.stack([x, y]))


MORE = {
    "repeated, then shuffled": (lambda: rows().repeat().shuffle(10 * N, seed=1).batch(4), "shuffles what Repeat"),
    "shuffled between": (lambda: rows().shuffle(N).repeat().map(lambda x: x).shuffle(5 * N), "shuffles what Repeat"),
    "batches shuffled": (lambda: rows().repeat(9).batch(4).shuffle(20), "shuffles what Repeat"),
    "numbered": (lambda: rows().repeat().enumerate().shuffle(10 * N).map(lambda i, x: x), "shuffles what Repeat"),
    "epochs shuffled": (lambda: D.range(9).flat_map(lambda e: rows()).shuffle(9 * N), "shuffles what FlatMap"),
    "each several times": (
        lambda: rows().flat_map(lambda x: D.from_tensors(x).repeat(3)).shuffle(N).batch(4),
        "repeats rows before all have come",
    ),
    "drawn from what repeats": (
        lambda: tf.data.experimental.sample_from_datasets(
            [D.range(2).repeat(), D.range(2, N).repeat()], [0.5, 0.5], seed=1
        ),
        "takes rows of several data sets, of which Repeat",
    ),
    "chosen among what repeats": (
        lambda: tf.data.experimental.choose_from_datasets(
            [D.range(2).repeat(), D.range(2, N).repeat()], D.range(2).repeat()
        ),
        "takes rows of several data sets, of which Repeat",
    ),
    "files that repeat by turns": (
        lambda: D.range(2).interleave(lambda i: D.range(i * 9, i * 9 + 3 + 6 * (1 - i)).repeat(), 2),
        "takes turns among data sets that come again",
    ),
    "repeated files by turns": (
        lambda: D.range(2).repeat().interleave(lambda i: D.range(i * 10, i * 2 + 10), 4).batch(4),
        "takes turns among data sets that come again",
    ),
    "the same by turns": (lambda: D.range(4).interleave(lambda i: rows(), 4), "takes turns among data sets"),
    "overlapping windows": (
        lambda: rows().window(3, 1, drop_remainder=True).flat_map(lambda w: w.batch(3)),
        "the windows of Window.* overlap",
    ),
    "the same rows twice": (_same_rows_twice, "takes rows of TensorSliceDataset.* several times"),
    "joined with others": (_joined_with_others, "joins rows of TensorSliceDataset.* with others of it"),
    "groups that wait": (
        lambda: (
            rows()
            .repeat()
            .apply(
                tf.data.experimental.group_by_window(
                    lambda x: tf.cast(x > 9, tf.int64), lambda key, w: w.batch(5), window_size=5
                )
            )
        ),
        "groups what Repeat.* has repeated",
    ),
}


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("name", ONCE)
def test_a_row_comes_once_in_a_pass(name, one_shot):
    if name == "a generator" and one_shot:
        pytest.skip("a one-shot iterator cannot call Python")
    assert most(ONCE[name]) <= 3
    assert told(ONCE[name], one_shot)[0] == ""


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("name", MORE)
def test_a_row_that_comes_more_often_is_told_of(name, one_shot):
    if one_shot and name in ("the same rows twice", "joined with others"):
        pytest.skip("a one-shot iterator has a copy of the source for each of its uses")
    data, why = MORE[name]
    if name != "groups that wait":  # whose rows are late, not many, in the first passes
        assert any(most(data) > 3 or most(data, 1) > 1 for _ in range(20))  # most of them draw at random
    reason = told(data, one_shot)[0]
    assert re.search(why, reason) and re.match(r"(OneShot)?Iterator", reason), reason


SEAMS = {
    "in order": False,
    "shuffled, then repeated": True,
    "batches repeated": False,
    "one pass": False,
    "mapped and prefetched": True,
    "cached": True,
    "files by turns": True,
    "files one after the other": False,
    "an epoch for each element": True,
    "of several sources": True,
    "drawn from several": True,
    "a generator": True,
}


@pytest.mark.parametrize("name", SEAMS)
def test_a_batch_across_two_passes_in_different_orders_is_told_of(name):
    reason = told(ONCE[name])[1]
    assert bool(reason) is SEAMS[name]
    assert not reason or re.search(r"makes batches across the passes of \w+, which \w+ orders anew", reason)


def test_a_batch_at_the_seam_holds_a_row_twice():
    def data():
        return rows().shuffle(N, seed=3).repeat().batch(5)

    with tf.Graph().as_default(), tf.Session() as session:
        following = tf.data.make_one_shot_iterator(data()).get_next()
        batches = [session.run(following) for _ in range(100)]
    assert max(max(Counter(batch.tolist()).values()) for batch in batches) == 2
    assert told(data)[0] == "" and "a row can be in a batch twice" in told(data)[1]


@pytest.mark.parametrize(
    "data",
    [
        lambda: rows().shuffle(N, seed=1, reshuffle_each_iteration=False).repeat().batch(5),
        lambda: rows().shuffle(N, seed=1).cache().repeat().batch(5),
    ],
)
def test_passes_in_the_same_order_have_no_row_twice_in_a_batch(data):
    assert told(data) == ("", "")


def test_a_data_set_that_is_fed_and_one_of_several_by_turns():
    held = tf.placeholder(tf.int64, [None])
    fed = tf.data.make_initializable_iterator(D.from_tensor_slices(held).repeat().shuffle(9).batch(2))
    assert "shuffles what Repeat" in of(program_over(fed))[0]
    either = tf.data.Iterator.from_structure(tf.int64, [None])
    either.make_initializer(rows().repeat().batch(4))
    either.make_initializer(rows().repeat().shuffle(99).batch(4))
    assert "shuffles what Repeat" in of(program_over(either))[0]


def test_where_nobody_can_tell_nothing_is_said():
    x = tf.random.uniform([4, 1])
    drawn = efl.Sample({"x": x}, {"x": [tf.feature_column.numeric_column("x", 1)]})
    for sample in (drawn, None):
        program = Program(TaskScope(MODE.TRAIN, None), sample=sample)
        assert of(program) == ("", "")


def private_model(data, **config):
    tf.reset_default_graph()
    x = tf.reshape(tf.cast(tf.data.make_initializable_iterator(data()).get_next(), tf.float32), [-1, 1])
    model = efl.Model(seed=1)
    model.input_fn(lambda m, mode: efl.Sample({"x": x}, {"x": [tf.feature_column.numeric_column("x", 1)]}))

    def loss(m, sample):
        weight = tf.get_variable("weight", [1], initializer=tf.ones_initializer())
        return tf.reduce_sum(tf.square(sample["x"] / 10.0 * weight - 0.5), 1)

    noisy = efl.DPGradientDescentGaussianOptimizer(1.0, 4.0, learning_rate=0.1)
    model.loss_fn(loss).optimizer_fn(efl.optimizer_fn.optimizer_setter(noisy))
    return model.compile(opt_config={"NUM_EXAMPLES": N, **config})


def test_a_private_model_over_such_data_gives_no_figure(caplog):
    pytest.importorskip("dp_accounting")
    model = private_model(lambda: rows().repeat().shuffle(99).batch(4), BATCH_SIZE=4)
    with caplog.at_level("WARNING", logger="efl"):
        model.fit(efl.procedure_fn.train(max_step=6))
    why = r"a row can come more than once in a pass \(.*shuffle before"
    assert re.search(f"{why}.*; privacy_spent will give no figure", caplog.text)
    with pytest.raises(efl.errors.ModelError, match=f"how often a row takes part is not known: {why}"):
        model.privacy_spent(1e-3)


@pytest.mark.parametrize(("batch", "doubles"), [(4, 0), (5, 1)])
def test_a_row_that_is_in_a_batch_twice_counts_four_times(batch, doubles):
    pytest.importorskip("dp_accounting")
    model = private_model(lambda: rows().shuffle(N).repeat().batch(batch), BATCH_SIZE=batch)
    steps = 3 * N // batch  # three passes: two of them may meet in a batch
    model.fit(efl.procedure_fn.train(max_step=steps))
    scaled = 4.0 / math.sqrt((3 + 2 * doubles) / 3)
    expected = compute_epsilon([Mechanism(scaled, steps, 3)], 1e-3, sampling="none").epsilon
    assert model.privacy_spent(1e-3).rows[0].epsilon == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch", [4, 5])
def test_a_private_model_over_whole_passes_gives_one(batch, caplog):
    pytest.importorskip("dp_accounting")
    model = private_model(lambda: rows().shuffle(N).batch(batch).repeat(), BATCH_SIZE=batch)
    model.fit(efl.procedure_fn.train(max_step=6))
    assert model.privacy_spent(1e-3).rows[0].epsilon is not None
    assert "no figure" not in caplog.text
