"""How often a row comes, where the graph says otherwise than the options, or nobody can know."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ConfigError, ModelError
from efl.privacy.accounting import Mechanism, compute_epsilon
from tests.data.records import example, write
from tests.federation.harness import run_both
from tests.privacy.test_what_is_public import COLUMNS, X, compiled, data, no_figure, plain, read

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEPS = 20


def spent(batches, loss=plain, **config) -> float | None:
    made = compiled(batches, loss, **config)
    made.fit(efl.procedure_fn.train(max_step=STEPS))
    return made.privacy_spent(1e-3).rows[0].epsilon


def taken(times: int) -> float | None:
    return compute_epsilon([Mechanism(2.0, STEPS, times)], 1e-3, sampling="none").epsilon


def rows(count: int) -> tf.data.Dataset:
    return data().take(count)


def of_python(batch: tf.Tensor) -> tf.Tensor:
    made = tf.numpy_function(lambda each: each * 1, [batch], tf.float32)
    made.set_shape([None, 3])
    return made


@pytest.mark.parametrize("then", [lambda batches: batches, lambda batches: batches.map(of_python)])
def test_passes_without_their_last_rows_are_shorter(then) -> None:
    """Also where the loss has lost its static length on the way."""
    dropping = spent(lambda: read(then(rows(15).batch(8, drop_remainder=True)).repeat()), NUM_EXAMPLES=15)
    keeping = spent(lambda: read(then(rows(15).batch(8)).repeat()), NUM_EXAMPLES=15)
    assert dropping == pytest.approx(taken(STEPS)) and keeping == pytest.approx(taken(STEPS // 2))


BATCHES = """
X = np.random.default_rng(0).normal(size=(15, 2)).astype(np.float32)
batch = tf.data.make_initializable_iterator(
    tf.data.Dataset.from_tensor_slices(X).batch(8, drop_remainder=True).repeat()).get_next()
"""
MODEL = """
model = efl.FederalModel()
model.input_fn(lambda m, mode: efl.Sample({"x": batch}, {"x": [tf.feature_column.numeric_column("x", 2)]}))
model.loss_fn(loss_fn)
private = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
model.optimizer_fn(efl.optimizer_fn.optimizer_setter(private))
model.compile(opt_config={"BATCH_SIZE": 8, "NUM_EXAMPLES": 15}).fit(efl.procedure_fn.train(max_step=20))
print("EPSILON", [row.epsilon for row in model.privacy_spent(1e-3).rows])
"""
FOLLOWER = """
def loss_fn(m, s):
    y = tf.matmul(s["x"], tf.get_variable("v", [2, 2]))
    m.send("y", y, require_grad=True)
    return y
"""
LEADER = """
def loss_fn(m, s):
    y = tf.reshape(m.recv("y", require_grad=True), [-1, 2])
    return tf.reduce_sum(tf.tanh(y) + tf.matmul(s["x"], tf.get_variable("v", [2, 2])), 1)
"""


def test_both_parties_count_as_many_passes(tmp_path) -> None:
    told = run_both(tmp_path, BATCHES + LEADER + MODEL, BATCHES + FOLLOWER + MODEL, end="")
    tables = {role: re.search("EPSILON (.*)", result.output)[1] for role, result in told.items()}
    assert tables["leader"] == tables["follower"]
    both = compute_epsilon([Mechanism(2.0, STEPS, STEPS)] * 2, 1e-3, sampling="none").epsilon
    assert f"[{both}, {both}, " in tables["leader"]


@pytest.mark.parametrize(
    ("pass_of", "most"),
    [
        (lambda: rows(8).batch(8), 8),
        (lambda: data().shuffle(40).batch(8).take(2), 16),
        (lambda: data().skip(30).batch(8), 10),
        (lambda: data().shard(4, 0).batch(8), 10),
        (lambda: tf.data.Dataset.from_tensors(X[:8]), 8),
        (lambda: tf.data.Dataset.from_tensors(X[:16]).unbatch().batch(8), 16),
        (lambda: tf.data.Dataset.from_tensor_slices(X.reshape(5, 8, 3)).take(3).unbatch().batch(5).rebatch(8), 24),
        (lambda: tf.data.Dataset.range(9).map(lambda i: tf.gather(X, i)).batch(8), 9),
        (lambda: tf.data.Dataset.zip((tf.data.Dataset.range(9), data())).map(lambda i, x: x).batch(8), 9),
        (lambda: tf.data.Dataset.from_tensor_slices(X.reshape(5, 8, 3)).take(2), 16),
        (
            lambda: (
                tf.data.Dataset.from_tensor_slices(X.reshape(10, 4, 3))
                .batch(2)
                .take(3)
                .map(lambda x: tf.reshape(x, [8, 3]))
            ),
            24,
        ),
    ],
)
def test_a_pass_of_fewer_rows_than_are_said_is_refused(pass_of, most: int) -> None:
    with pytest.raises(ConfigError, match=rf"NUM_EXAMPLES: 40, but a pass over the data of .* has {most} rows at most"):
        compiled(lambda: read(pass_of().repeat()), plain)
    compiled(lambda: read(pass_of().repeat()), plain, NUM_EXAMPLES=most)


@pytest.mark.parametrize(
    "batches",
    [
        lambda: tf.data.Dataset.from_tensor_slices(X.reshape(5, 8, 3)).repeat(),
        lambda: tf.data.Dataset.range(5).map(lambda i: tf.gather(X.reshape(5, 8, 3), i)).repeat(),
        lambda: tf.data.Dataset.from_tensor_slices(X.reshape(5, 8, 3)).unbatch().shuffle(40).batch(8).repeat(),
        lambda: tf.data.Dataset.from_tensor_slices(X.reshape(5, 8, 3)).unbatch().repeat().batch(8),
        lambda: tf.data.Dataset.range(4).interleave(lambda i: data().shard(4, i)).batch(8).repeat(),
        lambda: tf.data.Dataset.range(4).flat_map(lambda i: tf.data.Dataset.from_tensor_slices(
            tf.gather(X.reshape(4, 10, 3), i)).skip(0)).batch(8).repeat(),
        lambda: data().repeat().batch(8).take(100),
        lambda: tf.data.Dataset.from_tensor_slices(X.reshape(10, 4, 3)).batch(2).map(
            lambda x: tf.reshape(x, [8, 3])).repeat(),
        lambda: tf.data.Dataset.from_tensors(X).unbatch().batch(8).repeat(),
        lambda: fixed_shards().batch(8).repeat(),
        lambda: data().scan(np.int64(0), lambda count, row: (count + 1, row)).batch(8).repeat(),
        lambda: data().batch(8).repeat().apply(tf.data.experimental.prefetch_to_device("/cpu:0")),
        lambda: data().batch(8, num_parallel_calls=2, deterministic=True).repeat(),
    ],
    ids=["made before", "chosen", "unbatched", "unbatched and repeated", "shards", "parts", "steps", "chunks",
         "a tensor", "shards in one order", "scanned", "prefetched", "at once"],
)  # fmt: skip
def test_data_sets_that_bring_each_row_once_have_a_figure(batches) -> None:
    assert spent(lambda: read(batches())) == pytest.approx(taken(STEPS // 5))


def fixed_shards() -> tf.data.Dataset:
    ordered = data().shuffle(40, seed=3, reshuffle_each_iteration=False)
    return tf.data.Dataset.range(4).interleave(lambda i: ordered.shard(4, i))


def again(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.repeat()


def careless(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = False
    return dataset.with_options(options)


def numbers(count: int) -> tf.data.Dataset:
    return tf.data.Dataset.range(count)


def shards_of(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return numbers(4).interleave(lambda i: dataset.shard(4, i))


def beside_itself(dataset: tf.data.Dataset) -> tf.data.Dataset:
    both = tf.data.Dataset.zip((dataset.map(lambda x: x * 1.0), dataset.map(lambda x: x * 2.0)))
    return both.map(lambda x, y: x + y)


def parsed() -> tf.data.Dataset:
    read_x = tf.data.experimental.parse_example_dataset({"x": tf.FixedLenFeature([3], tf.float32)}, 4, False)
    written = tf.data.Dataset.from_tensor_slices([example({"x": row}) for row in X])
    return again(written.batch(8)).apply(read_x).map(lambda parts: parts["x"])


def grouped(dataset: tf.data.Dataset, make) -> tf.data.Dataset:
    by_sign = tf.data.experimental.group_by_window(lambda x: tf.cast(x[0] > 0, tf.int64), make, 8)
    return again(dataset.apply(by_sign))


@pytest.mark.parametrize(
    ("batches", "why"),
    [
        (lambda: again(again(data().batch(8)).take(1)), "RepeatDataset_1 repeats what TakeDataset has left of passes"),
        (lambda: again(again(data().batch(8)).skip(3).take(2)), "repeats what TakeDataset has left of passes"),
        (lambda: again(data().repeat(2).skip(72)).batch(8), "repeats what SkipDataset has left of passes"),
        (lambda: again(again(data()).take(8).cache()).batch(8), "repeats what TakeDataset has left of passes"),
        (lambda: again(data()).shard(2, 0).batch(8), "ShardDataset takes a part of what RepeatDataset has repeated"),
        (lambda: again(data().batch(8)).shard(5, 0), "ShardDataset takes a part of what RepeatDataset has repeated"),
        (lambda: again(data()).window(40).flat_map(lambda each: each.take(8).batch(8)), "come again for each"),
        (lambda: numbers(20).flat_map(lambda i: data().skip(i).take(20)).batch(8), "come again for each"),
        (lambda: numbers(20).flat_map(lambda i: data().shuffle(40).take(8)).batch(8), "come again for each"),
        (lambda: tf.data.Dataset.zip((again(numbers(8)), numbers(10**6))).map(lambda i, j: tf.gather(X, i)).batch(8),
         "ZipDataset joins numbers that RepeatDataset repeats with others"),
        (lambda: again(data().window(15).flat_map(lambda each: each.batch(8, drop_remainder=True))), "leaves out"),
        (lambda: again(data().batch(20, drop_remainder=True).unbatch().batch(8)), "leaves out rows of each pass"),
        (lambda: again(data().apply(tf.data.experimental.group_by_window(
            lambda x: tf.cast(x[0] > 0, tf.int64), lambda key, each: each.batch(8, drop_remainder=True), 8))),
         "leaves out rows of each group"),
        (lambda: again(data().batch(8)).map(lambda x: x * 1.0, 4, deterministic=False), "in which they are ready"),
        (lambda: careless(again(data().batch(8)).map(lambda x: x * 1.0, 4)), "in which they are ready, after"),
        (lambda: again(data()).batch(8, num_parallel_calls=4, deterministic=False), "ParallelBatch.* in which they"),
        (lambda: careless(again(data()).batch(8, num_parallel_calls=4)), "ParallelBatch.* in which they are ready"),
        (lambda: parsed(), "ParseExample.* in which they are ready, after RepeatDataset"),
        (lambda: again(shards_of(data().shuffle(40)).batch(8)), "rows that ShuffleDataset orders anew for each part"),
        (lambda: again(shards_of(data().shuffle(40).cache()).batch(8)), "that ShuffleDataset orders anew for each"),
        (lambda: again(shards_of(data().map(lambda x: x * 1.0, 4, deterministic=False)).batch(8)),
         "that ParallelMapDatasetV2 orders anew for each part"),
        (lambda: again(numbers(4).flat_map(lambda i: data().shuffle(40).shard(4, i)).batch(8)), "anew for each part"),
        (lambda: again(numbers(4).flat_map(
            lambda i: data().shuffle(40, reshuffle_each_iteration=False).shard(4, i)).batch(8)), "anew for each part"),
        (lambda: again(numbers(8).flat_map(lambda i: data().shard(4, i % 4)).batch(8)), "come again for each element"),
        (lambda: again(numbers(4).flat_map(lambda i: data().shard(i + 1, i)).batch(8)), "come again for each element"),
        (lambda: again(beside_itself(data().shuffle(40)).batch(8)), "joins rows of TensorSliceDataset with others"),
        (lambda: grouped(data(), lambda key, each: each.repeat(2).batch(8)), "reduce_func of .* repeats rows"),
        (lambda: grouped(data(), lambda key, each: data().batch(8)), "reduce_func of .* brings other rows than it is"),
    ],
)  # fmt: skip
def test_parts_of_what_comes_again_have_no_figure(batches, why: str) -> None:
    no_figure(compiled(lambda: read(batches()), plain), why)


@pytest.mark.parametrize(
    ("batches", "config"),
    [
        (lambda: data().shuffle(40).repeat().batch(12), {"BATCH_SIZE": 12}),
        (lambda: data().map(lambda x: x * 1.0, 4, deterministic=False).repeat().batch(12), {"BATCH_SIZE": 12}),
        (lambda: careless(data().map(lambda x: x * 1.0, 4).repeat().batch(12)), {"BATCH_SIZE": 12}),
        (lambda: data().shuffle(40).cache().take(30).repeat().batch(12), {"BATCH_SIZE": 12, "NUM_EXAMPLES": 30}),
        (lambda: data().shuffle(40).cache().cache().take(30).repeat().batch(12),
         {"BATCH_SIZE": 12, "NUM_EXAMPLES": 30}),
        (lambda: numbers(9).flat_map(lambda i: data().shuffle(40, reshuffle_each_iteration=False)).batch(12),
         {"BATCH_SIZE": 12}),
        (lambda: numbers(9).flat_map(lambda i: data().shuffle(40).cache()).batch(12), {"BATCH_SIZE": 12}),
        (lambda: data().shuffle(40).repeat().batch(7), {}),  # where 8 are said, of which no batch lies across a seam
    ],
    ids=["shuffled", "mapped", "mapped by options", "a cache that is never filled", "two such caches",
         "orders of a function", "caches of a function", "smaller batches"],
)  # fmt: skip
def test_a_batch_across_two_passes_in_other_orders_counts_more(batches, config) -> None:
    twice = spent(lambda: read(batches()), **config)
    once = spent(lambda: read(data().repeat().batch(config.get("BATCH_SIZE", 7))), **config)
    assert twice > 1.1 * once


def test_a_larger_batch_than_is_said_is_refused() -> None:
    made = compiled(lambda: read(data().repeat().batch(16)), plain)
    with pytest.raises(ConfigError, match=r"a batch has 16 rows, and opt_config BATCH_SIZE .* says 8"):
        made.fit(efl.procedure_fn.train(max_step=1))


def test_the_beginning_of_a_data_set_in_each_step_has_no_figure() -> None:
    first = lambda: tf.data.experimental.get_single_element(rows(8).batch(8))  # noqa: E731
    no_figure(compiled(first, plain), "a step reads a data set from its beginning")


def test_numbers_at_random_choose_a_row_several_times() -> None:
    drawn = tf.data.experimental.RandomDataset

    def chosen() -> tf.Tensor:
        return read(drawn().map(lambda i: tf.gather(X, i % 40)).batch(8))

    no_figure(compiled(chosen, plain), "draws numbers at random, and may draw one several times")

    def numbered() -> tf.Tensor:  # which is another thing than a seed for each row
        both = tf.data.Dataset.zip((data(), drawn())).map(lambda x, i: x)
        return read(both.batch(8).repeat())

    assert spent(numbered) == pytest.approx(taken(4))


def test_a_snapshot_is_read_in_an_order_of_its_own(tmp_path) -> None:
    def kept(dataset: tf.data.Dataset, name: str, **how) -> tf.data.Dataset:
        return dataset.snapshot(str(tmp_path / name), **how)

    assert spent(lambda: read(kept(data(), "a").batch(8).repeat())) == pytest.approx(taken(STEPS // 5))
    seam = {"BATCH_SIZE": 12}
    across = spent(lambda: read(kept(data(), "b").repeat().batch(12)), **seam)
    assert across > 1.1 * spent(lambda: read(data().repeat().batch(12)), **seam)
    no_figure(compiled(lambda: read(kept(data().repeat(9), "c").batch(8)), plain), "gives rows as its files hold them")
    twice = {"reader_func": lambda files: files.flat_map(lambda each: each.repeat(2))}
    no_figure(compiled(lambda: read(kept(data(), "d", **twice).batch(8).repeat()), plain), "repeats rows before all")


def test_the_data_set_of_a_handle_that_is_fed_is_not_known() -> None:
    held = {}

    def fed() -> tf.Tensor:
        batches = data().repeat(5).shuffle(1000).batch(8)
        held["own"] = tf.data.make_initializable_iterator(batches).string_handle()
        held["fed"] = tf.placeholder(tf.string, [])
        kinds = tf.data.get_output_types(batches), tf.data.get_output_shapes(batches)
        return tf.data.Iterator.from_string_handle(held["fed"], *kinds).get_next()

    class Feeds(tf.train.SessionRunHook):
        def before_run(self, run_context: tf.train.SessionRunContext) -> tf.train.SessionRunArgs:
            return tf.train.SessionRunArgs(None, {held["fed"]: run_context.session.run(held["own"])})

    made = compiled(fed, plain)
    made.add_hooks([Feeds()], mode=efl.MODE.TRAIN)
    no_figure(made, "IteratorFromStringHandleV2: the graph does not show what this iterator reads .*: read by the iter")


def test_a_data_set_of_a_kind_that_nobody_knows_has_no_figure() -> None:
    def scanned() -> tf.Tensor:  # which may bring an earlier row again
        again = tf.data.experimental.scan(np.zeros(3, np.float32), lambda kept, row: (row, kept + row))
        return read(data().apply(again).batch(8).repeat())

    no_figure(compiled(scanned, plain), r"nothing is known of how often .* \(ScanDataset\) brings a row")


def test_a_python_function_beside_the_input_is_refused() -> None:
    def beside(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        more = tf.numpy_function(lambda: X[:1].repeat(8, 0), [], tf.float32)
        more.set_shape([None, 3])
        return tf.reduce_sum(tf.layers.dense(s["x"] - more, 2, name="d"), 1)

    with pytest.raises(ModelError, match="a Python function that is handed no rows, beside other input"):
        compiled(lambda: read(data().batch(8).repeat()), beside)

    def alone() -> tf.Tensor:
        made = tf.numpy_function(lambda: X[:8], [], tf.float32)
        made.set_shape([8, 3])
        return made

    compiled(alone, plain)


def test_rows_that_a_hook_assigns_are_named() -> None:
    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        seen = tf.get_variable("seen", [8, 3], trainable=False)
        write_it = seen.assign(s["x"])

        class Writes(tf.train.SessionRunHook):
            def before_run(self, run_context: tf.train.SessionRunContext) -> tf.train.SessionRunArgs:
                return tf.train.SessionRunArgs(write_it)

        m.add_hooks([Writes()], mode=efl.MODE.TRAIN)
        return plain(m, s)

    made = compiled(lambda: read(data().batch(8).repeat()), loss_fn)
    made.fit(efl.procedure_fn.train(max_step=1))
    table = made.privacy_spent(1e-3)
    assert table.rows[0].epsilon is None and "seen" in str(table)


def rows_below(folder) -> int:
    held = b"".join(file.read_bytes() for file in Path(folder).rglob("*") if file.is_file())
    return sum(row.tobytes() in held for row in X)


def test_checkpoints_that_hold_rows_are_told(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    made = compiled(lambda: read(data().shuffle(40, seed=2).batch(8).repeat()), plain)
    made.fit(efl.procedure_fn.train(max_step=1), checkpoint_dir=str(tmp_path / "own"))
    assert "hold rows of the data" in caplog.text and rows_below(tmp_path / "own")
    caplog.clear()
    write(tmp_path / "data" / "a.tfrecord", [example({"x": row}) for row in X])
    tf.reset_default_graph()

    def input_fn(m: efl.Model, mode: efl.MODE) -> efl.Sample:
        reader = efl.data.DataIO(str(tmp_path / "data"), 8, 0, 1, shuffle=True, seed=2)
        reader.fixedlen_feature("x", 3)
        return efl.Sample(reader.read(), COLUMNS)

    made = efl.Model(seed=1).input_fn(input_fn).loss_fn(plain)
    private = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(private)).compile()
    made.fit(efl.procedure_fn.train(max_step=1), checkpoint_dir=str(tmp_path / "reader"))
    assert "hold rows of the data" not in caplog.text and not rows_below(tmp_path / "reader")
