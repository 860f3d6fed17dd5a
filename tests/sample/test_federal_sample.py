"""FederalSample: what it refuses, and what it has the communicator compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.data import DataIO
from efl.errors import ConfigError, DataError, ModelError
from tests.data.records import write_ids

COLUMNS = {"x": [tf.feature_column.numeric_column("x")]}


def features(**more: Any) -> dict[str, Any]:
    return {"x": tf.zeros([2, 1]), "id": tf.constant([[1], [2]], tf.int64), **more}


def communicator(role: str = "leader") -> efl.Communicator:
    return efl.Communicator(role, peer_addr="localhost:1", local_addr="localhost:1")


def sample(given: Any = None, role: str = "leader", **options: Any) -> efl.FederalSample:
    options.setdefault("communicator", communicator())
    return efl.FederalSample(features() if given is None else given, COLUMNS, role, **options)


def test_it_is_a_sample_with_ids() -> None:
    made = sample(sample_id_name="id", name="train")
    assert isinstance(made, efl.Sample)
    assert list(made) == ["x"]
    assert made.sample_ids is made.features["id"]
    copy = made.create({"x": made["x"] + 1.0})  # does not have the ids compared a second time
    assert type(copy) is efl.FederalSample
    assert copy.sample_ids is made.sample_ids


@pytest.mark.parametrize(
    "ids",
    [
        lambda: tf.constant([1, 2]), lambda: tf.constant([[1], [2]], tf.uint8), lambda: tf.constant(["a", "b"]),
        lambda: tf.placeholder(tf.string, None), lambda: tf.placeholder(tf.int64, [None, None]),
    ],
)  # fmt: skip
def test_ids_are_integers_or_strings_of_rank_one_or_two(ids: Any) -> None:
    with efl.task_scope(efl.MODE.TRAIN):
        made = sample(features(id=ids()), sample_id_name="id")
        # The communicator has them: it takes ids once per task and mode.
        with pytest.raises(ModelError, match=r"train: sample ids are verified already"):
            sample(features(), sample_id_name="id", communicator=made.communicator)


def test_running_the_op_takes_the_batch_whose_ids_are_compared(tmp_path: Path) -> None:
    write_ids(tmp_path, [5])
    reader = DataIO(str(tmp_path), 2, 0, 1)
    reader.fixedlen_feature("id", 1, tf.int64)
    read = reader.read()
    read["x"] = tf.zeros([2, 1])
    made = sample(read, sample_id_name="id")
    (op,) = made.before_step_ops()
    assert isinstance(op, tf.Operation)
    assert isinstance(made.verify_sample_id(), tf.Operation)
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        sess.run(op)
        assert sess.run(made.sample_ids).tolist() == [[2], [3]]


def test_without_verification_nothing_is_compared_and_no_communicator_is_needed() -> None:
    made = sample(communicator=None, verify_id=False)
    assert made.before_step_ops() == []
    assert made.sample_ids is None
    with pytest.raises(ModelError, match=r"made with verify_id=False"):
        made.verify_sample_id()
    channel = communicator()
    named = sample(communicator=channel, verify_id=False, sample_id_name="id")
    assert named.sample_ids is named.features["id"]
    sample(communicator=channel, sample_id_name="id")  # the scope's ids are still free


def test_verification_without_a_name_or_communicator_is_refused() -> None:
    with pytest.raises(ModelError, match=r"pass sample_id_name=..., or verify_id=False"):
        sample()
    with pytest.raises(ConfigError, match=r"verify_id=True needs a communicator; pass model.communicator"):
        sample(communicator=None, sample_id_name="id")


def test_roles_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"federal_role='follower', but the communicator is the leader's"):
        sample(role="follower", sample_id_name="id")
    with pytest.raises(ConfigError, match=r"federal_role='boss': expected 'leader' or 'follower'"):
        sample(role="boss", sample_id_name="id")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (lambda: tf.zeros([2, 1]), "is float32; ids are integers or strings"),
        (lambda: tf.zeros([2, 1], tf.bool), "is bool; ids"),
        (lambda: tf.zeros([2, 3], tf.int64), r"has shape \(2, 3\); expected \[batch\] or \[batch, 1\]"),
        (lambda: tf.constant(1), r"has shape \(\)"),
        (lambda: tf.SparseTensor([[0, 0]], [1], [2, 1]), r"is sparse; .*use fixedlen_feature\('id', 1\)"),
    ],
)
def test_what_cannot_be_an_id_is_refused(ids: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"sample: sample_id_name='id' " + message):
        sample(features(id=ids()), sample_id_name="id")


def test_an_id_that_is_no_feature_is_refused() -> None:
    with pytest.raises(DataError, match=r"sample_id_name='uid' names no feature; the features are: 'x', 'id'"):
        sample(sample_id_name="uid")


def test_ids_that_do_not_exist_are_refused_with_verify_id_off_too() -> None:
    with pytest.raises(DataError, match=r"names no feature"):
        sample(sample_id_name="uid", verify_id=False)
