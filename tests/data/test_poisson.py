"""Poisson samples: each record by itself, the same again after a restart, hidden without a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.data import DataIO
from efl.data._poisson import poisson_sample
from efl.errors import ConfigError, DataError
from tests.data.records import example, write, write_ids

KEYS = [bytes([i % 256, i // 256]) + bytes(30) for i in range(4000)]


# ---- the sample


@pytest.mark.parametrize("probability", [0.5, 0.05, 1e-3])
def test_every_record_is_drawn_with_the_probability_and_alone(probability: float) -> None:
    stats = pytest.importorskip("scipy.stats")  # comes with dp-accounting
    count = 50
    drawn = np.zeros((len(KEYS), count), bool)
    for row, key in zip(drawn, KEYS):
        sample = poisson_sample(key, count, probability)
        assert np.all(np.diff(sample) > 0) and (not len(sample) or (sample[0] >= 0 and sample[-1] < count))
        row[sample] = True
    hits = drawn.sum(0)
    observed = np.stack([hits, len(KEYS) - hits], 1).ravel()
    expected = np.tile([probability, 1 - probability], count) * len(KEYS)
    assert stats.chisquare(observed, expected, ddof=count - 1).pvalue > 1e-4
    sizes = drawn.sum(1)
    variance = count * probability * (1 - probability)
    assert abs(sizes.var() / variance - 1) < 6 * np.sqrt((2 + 1 / variance) / len(KEYS))
    if probability > 0.01:
        correlations = np.corrcoef(drawn.T.astype(float)) - np.eye(count)
        assert abs(correlations).max() < 6 / np.sqrt(len(KEYS))


def test_a_sample_is_the_same_for_the_same_key_only() -> None:
    first = poisson_sample(KEYS[0], 10_000, 0.1)
    np.testing.assert_array_equal(first, poisson_sample(KEYS[0], 10_000, 0.1))
    assert 30 < len(np.intersect1d(first, poisson_sample(KEYS[1], 10_000, 0.1))) < 200
    np.testing.assert_array_equal(poisson_sample(KEYS[0], 5, 1.0), np.arange(5))


# ---- the reader


def reader(folder: Path, **kwargs: object) -> DataIO:
    made = DataIO(str(folder), 8, 0, 1, **{"num_epochs": 3, "sampling": "poisson", **kwargs})
    made.fixedlen_feature("id", 1, dtype=tf.int64)
    return made


def run(folder: Path, most: int | None = None, state: str | None = None, **kwargs: object) -> tuple[list, str]:
    """Batches of a reader, and its position after them."""
    with tf.Graph().as_default():
        return _run(folder, most, state, **kwargs)


def _run(folder: Path, most: int | None, state: str | None, **kwargs: object) -> tuple[list, str]:
    made = reader(folder, **kwargs)
    made.use_secret(bytes(range(32)))
    features = made.read()
    fetched = features["id"], features.origin.block, features.origin.row
    found = []
    op = None if state is None else made.restore_from_reader_state_op(state)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        if op is not None:
            sess.run(op)
        made.initialize_iter(sess)
        while most is None or len(found) < most:
            try:
                found.append([part.ravel().tolist() for part in sess.run(fetched)])
            except tf.errors.OutOfRangeError:
                break
        return found, made.reader_state(sess)


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_batches_are_samples_of_all_files_and_say_where_rows_come_from(tmp_path: Path, compression: str) -> None:
    sizes, start = (30, 0, 50), 0
    for number, size in enumerate(sizes):
        write(tmp_path / f"part-{number}", (example({"id": i}) for i in range(start, start + size)), compression)
        start += size
    batches, _ = run(tmp_path)
    assert len(batches) == 3 * 80 // 8
    assert len({len(ids) for ids, _, _ in batches}) > 3
    assert abs(np.mean([len(ids) for ids, _, _ in batches]) - 8) < 3
    seen = [i for ids, _, _ in batches for i in ids]
    assert max(seen) >= 70 and min(seen) < 10 and len(set(seen)) > 60
    for ids, block, row in batches:
        assert ids == sorted(set(ids))
        assert ids == [(0, 30, 30)[b] + r for b, r in zip(block, row)]


def test_a_restarted_reader_draws_the_same_again_and_another_secret_does_not(tmp_path: Path) -> None:
    write_ids(tmp_path, [40, 40])
    first, after = run(tmp_path, most=5)
    rest, _ = run(tmp_path, state=after)
    assert len(first) + len(rest) == 30
    again, _ = run(tmp_path, most=9, state=after.replace('"row": 5', '"row": 0'))
    assert again[:5] == first and again[5:] == rest[:4]
    other, _ = run(tmp_path, most=5)  # a pass of its own
    assert other != first


def test_with_a_seed_everybody_can_draw_the_same(tmp_path: Path) -> None:
    write_ids(tmp_path, [40])
    assert run(tmp_path, seed=3) == run(tmp_path, seed=3)
    assert run(tmp_path, seed=3) != run(tmp_path, seed=4)
    assert not reader(tmp_path, seed=3).hides_batches and reader(tmp_path).hides_batches


def test_a_pass_after_another_draws_afresh(tmp_path: Path) -> None:
    write_ids(tmp_path, [40])
    for kwargs in ({}, {"seed": 3}):
        made = reader(tmp_path, name=f"reader-{len(kwargs)}", **kwargs)
        ids = made.read()["id"]
        passes = []
        with tf.Session() as sess:
            sess.run(tf.global_variables_initializer())
            made.initialize_iter(sess)
            for _ in range(2):
                passes.append([sess.run(ids).ravel().tolist() for _ in range(15)])
                with pytest.raises(tf.errors.OutOfRangeError):
                    sess.run(ids)
                made.restart(sess)
        assert passes[0] != passes[1]


def test_a_dataset_of_samples(tmp_path: Path) -> None:
    write_ids(tmp_path, [40])
    batch = tf.data.make_one_shot_iterator(reader(tmp_path).init_dataset()).get_next()["id"]
    with tf.Session() as sess:
        assert all(sess.run(batch).shape[1:] == (1,) for _ in range(15))
        with pytest.raises(tf.errors.OutOfRangeError):
            sess.run(batch)


def test_no_batch_is_empty(tmp_path: Path) -> None:
    write_ids(tmp_path, [40])
    made = DataIO(str(tmp_path), 1, 0, 1, num_epochs=10, sampling="poisson")
    made.fixedlen_feature("id", 1, dtype=tf.int64)
    batch = tf.data.make_one_shot_iterator(made.init_dataset()).get_next()["id"]
    with tf.Session() as sess:
        sizes = [len(sess.run(batch)) for _ in range(400)]
    # Of a Poisson number that is not 0: 1 / (1 - 1 / e) on average.
    assert min(sizes) == 1 and abs(np.mean(sizes) - 1.58) < 0.25


def test_records_are_counted(tmp_path: Path) -> None:
    write_ids(tmp_path, [30, 7, 5])
    for compression in ("GZIP", "ZLIB"):
        write(tmp_path / f"{compression}.zz", [example({"id": 1})] * 11, compression)
    for kwargs in ({}, {"sampling": None}):
        made = reader(tmp_path, name=f"reader-{len(kwargs)}", **kwargs)
        made.read()
        assert made.num_examples() == 30 + 7 + 5 + 2 * 11


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampling": "uniform"}, "sampling='uniform': expected None or 'poisson'"),
        ({"shuffle": True}, "sampling='poisson' with shuffle=True: samples are drawn at random"),
        ({"drop_remainder": True}, "sampling='poisson' with drop_remainder=True"),
    ],
)
def test_arguments_that_contradict(tmp_path: Path, kwargs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reader(tmp_path, **kwargs)


def _starts(folder: Path) -> None:
    run(folder, most=1)


def test_fewer_records_than_a_batch(tmp_path: Path) -> None:
    write_ids(tmp_path, [7])
    with pytest.raises(ConfigError, match="batch_size=8 is more than the 7 records that there are to be sampled"):
        _starts(tmp_path)


@pytest.mark.parametrize("cut", [3, 1, 60])
def test_a_file_that_is_cut_off_is_told_at_the_start(tmp_path: Path, cut: int) -> None:
    write_ids(tmp_path, [40])
    path = tmp_path / "part-0.tfrecord"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"part-0.tfrecord.* cut off"):
        _starts(tmp_path)
    made = reader(tmp_path, sampling=None, name="counting")
    made.read()
    with pytest.raises(DataError, match=r"cannot read .*part-0.tfrecord' to its end: it is cut off"):
        made.num_examples()


def test_a_damaged_record_is_told_at_the_start(tmp_path: Path) -> None:
    write_ids(tmp_path, [40])
    path = tmp_path / "part-0.tfrecord"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"cannot read record \d+ of .*part-0.tfrecord': it is damaged or cut off"):
        _starts(tmp_path)


def test_a_model_trains_on_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 2)).astype(np.float32)
    write(tmp_path / "part", (example({"x": x, "y": float(x.sum())}) for x in rows))
    model = efl.Model()

    def input_fn(m: efl.Model, mode: efl.MODE) -> efl.Sample:
        made = DataIO(str(tmp_path), 20, 0, 1, num_epochs=10, sampling="poisson")
        made.fixedlen_feature("x", 2)
        made.fixedlen_feature("y", 1)
        columns: dict[str, Sequence] = {"x": [tf.feature_column.numeric_column("x", 2)],
                                        "y": [tf.feature_column.numeric_column("y")]}  # fmt: skip
        return efl.Sample(made.read(), columns)

    model.input_fn(input_fn).loss_fn(
        lambda m, s: tf.losses.mean_squared_error(s["y"], tf.layers.dense(s["x"], 1, name="w"))
    ).optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1)))
    model.compile().fit(efl.procedure_fn.train())
    assert model.steps_trained == 100
    np.testing.assert_allclose(model.get_weights()["w/kernel"], 1.0, atol=0.01)
