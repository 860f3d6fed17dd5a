"""Data that a graph holds as constants is told where it is large, and what is advised instead works."""

import numpy as np
import pytest

import efl

import tensorflow.compat.v1 as tf  # isort: skip
from efl._constants import warn_of_large

MIB = 1 << 20


def told(caplog):
    return [record.getMessage() for record in caplog.records if "MiB of constants" in record.getMessage()]


def test_large_constants_are_told_once_with_the_largest_and_what_to_do(toy, caplog):
    with tf.name_scope("small"):
        tf.data.Dataset.from_tensor_slices(np.zeros(30 * MIB, np.int8))
    with tf.name_scope("big"):
        tf.data.Dataset.from_tensor_slices(np.zeros([10, MIB], np.float32))
    toy.model(evaluate=toy.batch()).compile()
    (message,) = told(caplog)
    assert message.startswith("the graph holds 70 MiB of constants")
    assert "largest is big/normalize_element/component_0 (float32 [10, 1048576], 40 MiB; read by Tensor" in message
    for way in ("placeholders", "initializable iterator", "tf.data.TFRecordDataset", "efl.data.DataIO"):
        assert way in message


def test_many_strings_count_too(toy, caplog):
    tf.constant(np.full(3 * MIB, b"a"))
    toy.model().compile()
    assert "[3145728], 72 MiB; read by nothing)" in told(caplog)[0]


def test_constants_of_an_ordinary_size_are_not_told(toy, caplog):
    tf.data.Dataset.from_tensor_slices(np.zeros(63 * MIB, np.int8))
    toy.model().compile()
    assert not told(caplog)


def test_nothing_is_serialised_to_learn_a_size(caplog, monkeypatch):
    tf.constant(np.zeros(65 * MIB, np.int8), name="big")
    monkeypatch.setattr(tf.Operation, "get_attr", lambda op, name: pytest.fail(f"{op.name} is asked for its {name}"))
    monkeypatch.setattr(tf.Operation, "node_def", property(lambda op: pytest.fail(f"{op.name} is serialised")))
    monkeypatch.setattr(tf.Graph, "as_graph_def", lambda *a, **k: pytest.fail("the graph is serialised"))
    warn_of_large(tf.get_default_graph())
    assert "big (int8 [68157440], 65 MiB" in told(caplog)[0]


def test_what_is_advised_works(toy, caplog):
    x, y = tf.placeholder(tf.float32, [None, 3]), tf.placeholder(tf.float32, [None, 1])
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat(2).batch(10)
    iterator = tf.data.make_initializable_iterator(data)

    class Feed(tf.train.SessionRunHook):
        def after_create_session(self, session, coord):
            session.run(iterator.initializer, {x: toy.x, y: toy.y})

    model = toy.model(train=iterator.get_next())
    model.add_hooks([Feed()])
    model.compile().fit(efl.procedure_fn.train())
    assert model.steps_trained == 8
    np.testing.assert_allclose(model.get_weights()["net/w/kernel"], toy.expected(steps=8)[0], rtol=1e-5)
    assert not told(caplog)
