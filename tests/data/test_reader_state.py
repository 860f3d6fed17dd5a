"""The position of a reader: saved with the weights, restored with them, exact at every step."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from efl.data import DataIO
from efl.data._reader_state import ReaderState
from efl.errors import ConfigError, DataError
from tests.data.records import write_ids
from tests.data.test_dataio import drain, id_reader

SIZES = [5, 0, 7, 3, 6]


def ids_from(sess: tf.Session, ids: tf.Tensor) -> list[int]:
    return [int(i) for batch in drain(sess, ids) for i in batch.ravel()]


def full_order(folder: Path, **options: Any) -> list[int]:
    with tf.Graph().as_default(), tf.Session() as sess:
        reader = id_reader(folder, 4, **options)
        ids = reader.read()["id"]
        reader.initialize_iter(sess)
        return ids_from(sess, ids)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_checkpoint_after_any_step_resumes_at_the_next_row(tmp_path: Path, shuffle: bool, prefetch: int) -> None:
    write_ids(tmp_path / "data", SIZES)
    options: dict[str, Any] = {"num_epochs": 2, "shuffle": shuffle, "prefetch": prefetch}
    reader = id_reader(tmp_path / "data", 4, seed=3 if shuffle else None, **options)
    ids = reader.read()["id"]
    saver = tf.train.Saver(max_to_keep=None)
    order = full_order(tmp_path / "data", seed=3 if shuffle else None, **options)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        reader.initialize_iter(sess)
        paths, taken = [saver.save(sess, str(tmp_path / "model"), 0)], [0]
        for step in range(1, 12):
            taken.append(taken[-1] + len(sess.run(ids)))
            paths.append(saver.save(sess, str(tmp_path / "model"), step))
    assert len(order) == 2 * sum(SIZES)
    for step, path in enumerate(paths):
        with tf.Session() as sess:
            saver.restore(sess, path)
            reader.initialize_iter(sess)
            assert ids_from(sess, ids) == order[taken[step] :], f"after step {step}"


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_no_batch_in_random_order_holds_rows_of_two_epochs(tmp_path: Path, drop_remainder: bool) -> None:
    write_ids(tmp_path / "data", SIZES)
    reader = id_reader(tmp_path / "data", 4, seed=3, num_epochs=3, shuffle=True, drop_remainder=drop_remainder)
    ids, sizes = reader.read()["id"], []
    with tf.Session() as sess, contextlib.suppress(tf.errors.OutOfRangeError):
        reader.initialize_iter(sess)
        while True:
            sizes.append(len(sess.run(ids)))
    whole, rest = divmod(sum(SIZES), 4)
    assert rest and sizes == 3 * ([4] * whole + ([] if drop_remainder else [rest]))


def test_another_batch_size_and_more_epochs_go_on_from_the_same_row(tmp_path: Path) -> None:
    write_ids(tmp_path, SIZES)
    reader = id_reader(tmp_path, 4)
    ids = reader.read()["id"]
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        sess.run([ids])
        sess.run([ids])
        state = reader.reader_state(sess)
    with tf.Graph().as_default(), tf.Session() as sess:
        other = id_reader(tmp_path, 3, num_epochs=2)
        ids = other.read()["id"]
        sess.run(other.restore_from_reader_state_op(state))
        other.initialize_iter(sess)
        assert ids_from(sess, ids) == [*range(8, 21), *range(21)]


def test_the_position_moves_only_with_the_batch(tmp_path: Path) -> None:
    write_ids(tmp_path, [5, 4])
    reader = id_reader(tmp_path, 4, prefetch=5)
    features = reader.read()
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        seen = []
        for fetch in (features["id"], features.origin.row, features.origin.block):
            sess.run(fetch)
            state = json.loads(reader.reader_state(sess))
            assert state == json.loads(reader.reader_state(sess))
            seen.append((state["epoch"], state["position"], state["row"]))
    assert seen == [(0, 0, 4), (0, 1, 3), (0, 1, 4)]


def test_reader_state_is_json_and_restores_into_the_running_session(tmp_path: Path) -> None:
    write_ids(tmp_path, SIZES)
    reader = id_reader(tmp_path, 4)
    ids = reader.read()["id"]
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        sess.run(ids)
        state = reader.reader_state(sess)
        assert set(json.loads(state)) == {"seed", "epoch", "position", "row", "blocks"}
        rest = ids_from(sess, ids)
        op = reader.restore_from_reader_state_op(state)
        tf.get_default_graph().finalize()
        sess.run(op)
        reader.initialize_iter(sess)
        assert ids_from(sess, ids) == rest == list(range(4, 21))


def test_a_restored_end_is_the_end(tmp_path: Path) -> None:
    write_ids(tmp_path, [2])
    reader = id_reader(tmp_path, 4)
    ids = reader.read()["id"]
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        drain(sess, ids)
        state = reader.reader_state(sess)
        sess.run(reader.restore_from_reader_state_op(state))
        reader.initialize_iter(sess)
        assert drain(sess, ids) == []


@pytest.mark.parametrize("shuffle", [False, True])
def test_initialize_is_done_once_and_restart_begins_again_in_the_same_order(tmp_path: Path, shuffle: bool) -> None:
    write_ids(tmp_path, SIZES)
    reader = id_reader(tmp_path, 4, shuffle=shuffle)
    ids = reader.read()["id"]
    tf.get_default_graph().finalize()
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        first = [int(i) for i in sess.run(ids)]
        reader.initialize_iter(sess)
        first += ids_from(sess, ids)
        assert sorted(first) == list(range(21))
        reader.restart(sess)
        assert ids_from(sess, ids) == first
    with tf.Session() as sess:  # restart may also be the first call
        reader.restart(sess)
        assert sorted(ids_from(sess, ids)) == list(range(21))


def test_shuffle_permutes_blocks_and_rows_anew_in_every_epoch(tmp_path: Path) -> None:
    sizes = [30, 40, 20, 35]
    write_ids(tmp_path, sizes)
    order = full_order(tmp_path, num_epochs=2, shuffle=True, seed=1)
    epochs = [order[:125], order[125:]]
    bounds = np.cumsum([0, *sizes])
    block_orders = []
    for epoch in epochs:
        assert sorted(epoch) == list(range(125))
        blocks = np.searchsorted(bounds, epoch, side="right") - 1
        changes = [int(blocks[0]), *(int(b) for a, b in itertools.pairwise(blocks) if a != b)]
        assert sorted(changes) == [0, 1, 2, 3]  # a block is read to its end before the next
        block_orders.append(changes)
        for block in range(4):
            rows = [i for i, b in zip(epoch, blocks) if b == block]
            assert rows != sorted(rows)
    assert [i for i in epochs[0] if i < 30] != [i for i in epochs[1] if i < 30]
    assert full_order(tmp_path, num_epochs=2, shuffle=True, seed=2) != order
    many = {tuple(full_order(tmp_path, shuffle=True, seed=seed)[:1]) for seed in range(6)}
    assert len(many) > 2  # the first row is not always of the same block


def test_the_order_depends_on_the_readers_seed_alone(tmp_path: Path) -> None:
    write_ids(tmp_path, SIZES)
    tf.set_random_seed(1)
    expected = full_order(tmp_path, shuffle=True, seed=9)

    def with_run_seed(run_seed: int | None, **options: Any) -> list[int]:
        with tf.Graph().as_default() as graph, tf.Session() as sess:
            if run_seed is not None:
                tf.set_random_seed(run_seed)
            tf.random.uniform([3])  # other ops of the user's
            reader = id_reader(tmp_path, 4, shuffle=True, **options)
            ids = reader.read()["id"]
            assert graph.seed == run_seed  # and the user's seed is left alone
            reader.initialize_iter(sess)
            return ids_from(sess, ids)

    assert with_run_seed(5, seed=9) == with_run_seed(6, seed=9) == with_run_seed(None, seed=9) == expected
    assert with_run_seed(5) == with_run_seed(5) != with_run_seed(6)
    assert with_run_seed(None) != with_run_seed(None)  # from the operating system; 1 in 10**17 that they agree


def test_equal_counts_are_shuffled_equally_whatever_the_records_hold(tmp_path: Path) -> None:
    write_ids(tmp_path / "a", [40, 30])
    write_ids(tmp_path / "b", [40, 30], ["x", "y"])
    assert full_order(tmp_path / "a", shuffle=True, seed=4) == full_order(tmp_path / "b", shuffle=True, seed=4)


def test_a_position_in_other_files_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    write_ids(tmp_path, [3, 3])
    reader = id_reader(tmp_path, 4)
    reader.read()
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        state = reader.reader_state(sess)
    write_ids(tmp_path, [3], ["part-00.tfrecord"])
    with tf.Graph().as_default(), tf.Session() as sess:
        other = id_reader(tmp_path, 4)
        ids = other.read()["id"]
        sess.run(other.restore_from_reader_state_op(state))
        with pytest.raises(
            DataError, match=r"counts in other files than the 3 found now.*'efl_reader/run-?/?dataio/position'"
        ):
            other.initialize_iter(sess)
        other.restart(sess)  # to begin at the start is possible
        assert len(ids_from(sess, ids)) == 9


@pytest.mark.parametrize(
    "state", ["", "x", "[]", "{}", None, '{"seed": 0, "epoch": 0, "position": 0, "row": -1, "blocks": 1}',
              '{"seed": 0, "epoch": 0, "position": 0, "row": 1.5, "blocks": 1}']
)  # fmt: skip
def test_a_state_that_cannot_be_read_is_refused(tmp_path: Path, state: Any) -> None:
    write_ids(tmp_path, [3])
    reader = id_reader(tmp_path, 4)
    reader.read()
    with pytest.raises(DataError, match=r"reader.state"):
        reader.restore_from_reader_state_op(state)


def test_state_round_trips() -> None:
    state = ReaderState(2**63 - 1, 1, 2, 3, 4)
    assert ReaderState.from_json(state.to_json()) == state == ReaderState.from_vector(state.vector())


def test_too_many_epochs_of_too_many_files_are_refused(tmp_path: Path) -> None:
    write_ids(tmp_path, [1, 1])
    with pytest.raises(ConfigError, match=r"use fewer epochs or larger files"):
        id_reader(tmp_path, num_epochs=2**29).read()


def test_two_readers_in_two_modes_keep_their_own_position(tmp_path: Path) -> None:
    import efl

    write_ids(tmp_path, [4, 4])
    readers: dict[efl.MODE, tuple[DataIO, tf.Tensor]] = {}
    for mode in efl.MODE:
        with efl.task_scope(mode):
            reader = id_reader(tmp_path, 4)
            readers[mode] = reader, reader.read()["id"]
    assert {v.op.name for v in tf.global_variables()} == {
        "efl_reader/train/dataio/position",
        "efl_reader/eval/dataio/position",
    }
    with tf.Session() as sess:
        for reader, _ in readers.values():
            reader.initialize_iter(sess)
        sess.run(readers[efl.MODE.TRAIN][1])
        rows = [json.loads(reader.reader_state(sess))["row"] for reader, _ in readers.values()]
        assert rows == [4, 0]
        assert sess.run(readers[efl.MODE.EVAL][1]).ravel().tolist() == [0, 1, 2, 3]
