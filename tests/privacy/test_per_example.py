"""Norms and clipped sums by factors equal the gradients of one example at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from tests.privacy.graphs import Built, assert_equal, image, numbers, random

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _no_detour(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> None:
    """A layer that has a rule must not quietly take the slow way."""
    caplog.set_level(logging.WARNING, "efl")
    yield
    slow = [r.getMessage() for r in caplog.get_records("call") if "no fast rule" in r.getMessage()]
    assert bool(slow) == ("detour" in request.node.name), slow


def _values(loss: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.tanh(loss), list(range(1, loss.shape.rank)))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), ((1, 2), 1), (1, 2)])
def test_convolution_pooling_dense(padding: str, strides: object, dilation: int, rows: int) -> None:
    def build() -> Built:
        x, y = image("x", 12, 12, 3), tf.placeholder(tf.int64, [None], "y")
        h = tf.layers.conv2d(x, 4, 3, strides=strides, padding=padding, dilation_rate=dilation, activation="relu")
        h = tf.layers.max_pooling2d(h, 2, 1)
        h = tf.layers.conv2d(h, 9, 2, activation="relu")  # nine channels: its patches are gathered
        h = tf.layers.conv2d(h, 9, 2, activation="relu")
        h = tf.layers.dense(tf.layers.flatten(h), 8, activation="tanh")
        logits = tf.layers.dense(h, 5)
        return Built(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits), {"x": x, "y": y})

    assert_equal(build, {"x": random(12, 12, 3), "y": numbers(5)}, rows)


def test_convolution_of_a_kernel_too_large_for_products() -> None:
    def build() -> Built:
        x = image("x", 5, 5, 16)
        return Built(_values(tf.layers.conv2d(x, 256, 3, padding="same")), {"x": x})  # 9 * 16 * 256 numbers an example

    assert_equal(build, {"x": random(5, 5, 16)}, above=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_any_shapes(seed: int) -> None:
    """Sizes of the batch, of what is clipped as one, and of all layers are drawn."""
    rng = np.random.default_rng(seed)

    def size(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    rows, groups = size(1, 3), size(1, 5)
    high, wide, deep, times, width, many = (size(*r) for r in ((3, 9), (3, 9), (1, 5), (1, 7), (1, 12), (1, 4)))
    filters, kernel, strides, units, rows_of_table = size(1, 9), size(1, 3), size(1, 2), size(1, 40), size(2, 9)
    padding = str(rng.choice(["same", "valid"]))

    def build() -> Built:
        x, seq = image("x", high, wide, deep), image("seq", times, width)
        ids = tf.placeholder(tf.int64, [None, many], "ids")
        h = tf.layers.conv2d(x, filters, kernel, strides=strides, padding=padding, activation="tanh")
        h = tf.layers.dense(tf.layers.dense(tf.layers.flatten(h), units, activation="tanh"), 3)
        s = tf.layers.dense(seq, units, activation="tanh")
        s = tf.tensordot(s, tf.get_variable("mixed", [units, units]), 1) * tf.get_variable("scale", [units])
        table = tf.get_variable("table", [rows_of_table, width])
        scores = tf.einsum("btk,vk->btv", seq, table)  # the table is read twice, once transposed
        looked = tf.reduce_sum(tf.nn.embedding_lookup(table, ids), 1)
        return Built(_values(h) + _values(s) + _values(scores) + _values(looked), {"x": x, "seq": seq, "ids": ids})

    batch = rows * groups
    feeds = {
        "x": random(high, wide, deep, seed=seed, batch=batch),
        "seq": random(times, width, seed=seed, batch=batch),
        "ids": numbers(rows_of_table, many, seed=seed, batch=batch),
    }
    assert_equal(build, feeds, rows, names=["table", "mixed", "scale"])


def test_convolutions_of_other_kinds() -> None:
    def build() -> Built:
        x = image("x", 12, 12, 3)
        kernel = tf.get_variable("depthwise", [3, 3, 3, 2])
        h = tf.nn.depthwise_conv2d(x, kernel, [1, 2, 2, 1], "SAME")
        h = tf.layers.separable_conv2d(h, 5, 3)
        h = tf.layers.conv2d_transpose(h, 4, 3, strides=2, padding="same")
        h = tf.nn.conv2d(h, tf.get_variable("explicit", [3, 2, 4, 3]), 1, [[0, 0], [1, 0], [2, 1], [0, 0]])
        return Built(_values(h), {"x": x})

    assert_equal(build, {"x": random(12, 12, 3)}, names=["depthwise", "explicit"])


@pytest.mark.parametrize("rows", [1, 3])
def test_one_and_three_dimensions(rows: int) -> None:
    def build() -> Built:
        x, v = image("x", 12, 3), image("v", 4, 5, 6, 2)
        h = tf.layers.conv1d(tf.layers.conv1d(x, 4, 3, padding="same", dilation_rate=2), 4, 2, activation="tanh")
        w = tf.layers.conv3d(tf.tanh(tf.layers.conv3d(v, 4, 2, padding="same", strides=(1, 2, 1))), 3, 2)
        return Built(_values(h) + _values(w), {"x": x, "v": v})

    assert_equal(build, {"x": random(12, 3), "v": random(4, 5, 6, 2)}, rows)


@pytest.mark.parametrize("rows", [1, 3])
def test_sequences_normalisation_attention(rows: int) -> None:
    def build() -> Built:
        x = image("x", 5, 7)
        shared = tf.get_variable("shared", [7, 7])
        h = tf.keras.layers.LayerNormalization()(tf.layers.dense(x, 7, activation="relu"))
        h = tf.einsum("btk,nk->btn", tf.tensordot(h, shared, 1), shared)  # read twice, once transposed
        h = h + tf.get_variable("scale", [7]) * h
        query = tf.keras.layers.Dense(4)(h)
        h = tf.matmul(tf.nn.softmax(tf.matmul(query, query, transpose_b=True)), h)
        h *= tf.get_variable("temperature", [])
        return Built(tf.reduce_mean(tf.square(h), [1, 2]), {"x": x})

    assert_equal(build, {"x": random(5, 7)}, rows, names=["shared", "scale", "temperature"])


@pytest.mark.parametrize("cell", [tf.nn.rnn_cell.LSTMCell, tf.nn.rnn_cell.GRUCell, tf.nn.rnn_cell.BasicRNNCell])
def test_unrolled_recurrence(cell: Callable[[int], object]) -> None:
    def build() -> Built:
        x = image("x", 5, 7)
        steps = tf.unstack(tf.transpose(x, [1, 0, 2]), 5)  # time first
        outputs, _ = tf.nn.static_rnn(cell(6), steps, dtype=tf.float32)
        return Built(_values(outputs[-1]), {"x": x})

    assert_equal(build, {"x": random(5, 7)})


def test_time_first_in_one_product() -> None:
    def build() -> Built:
        x = image("x", 5, 7)
        flat = tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, 7])
        h = tf.reshape(tf.layers.dense(flat, 3), [5, -1, 3])
        return Built(tf.reduce_sum(tf.tanh(h), [0, 2]), {"x": x})

    assert_equal(build, {"x": random(5, 7)})


def test_two_views_through_one_network() -> None:
    def build() -> Built:
        x, z = image("x", 7), image("z", 7)
        h = tf.layers.dense(tf.concat([x, z], 0), 3, activation="tanh")
        left, right = tf.reshape(h, [2, -1, 3])[0], tf.reshape(h, [2, -1, 3])[1]
        return Built(tf.reduce_sum(left * right, 1), {"x": x, "z": z})

    assert_equal(build, {"x": random(7), "z": random(7, seed=5)})


@pytest.mark.parametrize("rows", [1, 2])
def test_a_variable_used_several_times_in_several_ways(rows: int) -> None:
    """Outer products, a gradient as a whole, a penalty of the weights, rows: all cross terms."""

    def build() -> Built:
        x, ids = image("x", 5, 4), tf.placeholder(tf.int64, [None, 3], "ids")
        table = tf.get_variable("table", [9, 4])
        looked = tf.nn.embedding_lookup(table, ids)  # rows; the same id several times in an example
        scores = tf.einsum("btk,vk->btv", tf.tanh(x), table)  # tied output
        added = tf.reduce_sum(tf.square(table + tf.reduce_sum(x, 1)[:, tf.newaxis, :]), [1, 2])  # as a whole
        loss = tf.reduce_sum(tf.tanh(looked), [1, 2]) + tf.reduce_sum(tf.tanh(scores), [1, 2]) + added
        return Built(loss + 0.3 * tf.nn.l2_loss(table), {"x": x, "ids": ids})

    assert_equal(build, {"x": random(5, 4), "ids": numbers(9, 3)}, rows)


@pytest.mark.parametrize("rows", [1, 3])
def test_lookups(rows: int) -> None:
    def build() -> Built:
        one, many = (tf.placeholder(tf.int64, shape, name) for name, shape in (("one", [None]), ("many", [None, 4])))
        a = tf.nn.embedding_lookup(tf.get_variable("a", [11, 3]), one)
        b = tf.nn.embedding_lookup(tf.get_variable("b", [5, 3]), many)
        return Built(tf.reduce_sum(tf.tanh(a), 1) + tf.reduce_sum(tf.tanh(b), [1, 2]), {"one": one, "many": many})

    assert_equal(build, {"one": numbers(11), "many": numbers(5, 4)}, rows)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_feature_columns(combiner: str, rows: int) -> None:
    """Sparse ids with empty rows and repeated ids, one-hot columns, weights; a table that two columns share."""

    def build() -> Built:
        ids, tags = tf.placeholder(tf.int64, [None, 3], "ids"), tf.placeholder(tf.string, [None, 2], "tags")
        column = tf.feature_column
        by_id = column.categorical_column_with_identity("ids", 7)
        by_tag = column.categorical_column_with_hash_bucket("tags", 5)
        columns = [
            column.embedding_column(by_id, 4, combiner=combiner),
            column.embedding_column(by_tag, 2, combiner=combiner),
            column.indicator_column(by_id),
            column.bucketized_column(column.numeric_column("value"), [-0.5, 0.5]),
        ]
        value = image("value", 1)
        features = {"ids": ids, "tags": tags, "value": value}
        h = tf.layers.dense(tf.feature_column.input_layer(features, columns), 3, activation="tanh")
        linear = tf.feature_column.linear_model(features, [by_id, by_tag])
        return Built(tf.reduce_sum(h, 1) + linear[:, 0] * h[:, 1], dict(features))

    ids = numbers(7, 3)
    ids[1, 1:] = -1  # absent
    ids[2] = -1  # an example without any
    ids[3] = 4  # one id three times
    tags = np.array([[b"a", b"b"], [b"a", b"a"], [b"c", b""], [b"", b""], [b"b", b""], [b"e", b"f"]], object)
    assert_equal(build, {"ids": ids, "tags": tags, "value": random(1)}, rows)


@pytest.mark.parametrize("rows", [1, 2])
def test_functions_of_each_number_of_a_variable(rows: int) -> None:
    """Factorisation machines, inference normalisation, PReLU, positive weights."""

    def build() -> Built:
        x, ids, seq = image("x", 6), tf.placeholder(tf.int64, [None, 2], "ids"), image("seq", 3, 6)
        v = tf.get_variable("factors", [6, 4])
        crossed = tf.square(tf.matmul(x, v)) - tf.matmul(tf.square(x), tf.square(v))
        h = tf.layers.batch_normalization(tf.layers.dense(x, 4), training=False)
        h = tf.keras.layers.PReLU()(h)
        positive = tf.nn.softplus(tf.get_variable("positive", [6, 4])) * 0.5
        over_time = tf.reduce_sum(tf.tanh(tf.einsum("btk,kn->btn", seq, positive)), 1)
        looked = tf.reduce_sum(tf.gather(tf.exp(tf.get_variable("table", [5, 4])), ids), 1)
        frozen = tf.matmul(x, tf.stop_gradient(v))  # read, and not trained by
        return Built(_values(crossed + h + over_time + looked + frozen), {"x": x, "ids": ids, "seq": seq})

    feeds = {"x": random(6), "ids": numbers(5, 2), "seq": random(3, 6, seed=3)}
    assert_equal(build, feeds, rows, names=["factors", "positive", "table"])


def test_norms_are_no_smaller_than_what_is_added_up_also_by_detour() -> None:
    """Where terms cancel, where squares vanish, where an op reads a variable twice: nothing passes the clip."""
    from efl.privacy import per_example

    def passed(build: Callable[[tf.Tensor], tf.Tensor], width: int, row: list[float]) -> float:
        tf.reset_default_graph()
        x = tf.placeholder(tf.float32, [None, width])
        gradients = per_example.differentiate(per_example.Objective(build(x)), tf.trainable_variables())
        (v,) = gradients.variables
        weights = tf.minimum(1.0, tf.math.rsqrt(tf.maximum(gradients.squared_norm(v), 1e-24)))
        total = tf.convert_to_tensor(gradients.weighted_sum(v, weights))
        with tf.Session() as sess:
            sess.run(tf.global_variables_initializer())
            return float(np.linalg.norm(sess.run(total, {x: np.asarray([row], np.float32)}).astype(np.float64)))

    def cancelling(x: tf.Tensor) -> tf.Tensor:
        w = tf.get_variable("w", [300, 200])
        h = tf.constant(np.random.default_rng(0).normal(size=(2, 300)), tf.float32)
        y = tf.einsum("btk,kn->btn", h[tf.newaxis] * tf.reshape(x[:, :1], [-1, 1, 1]) + 0 * x[:, :1, tf.newaxis], w)
        return tf.reduce_sum(y[:, 0] - y[:, 1], 1) + 0 * x[:, 0]

    def vanishing(x: tf.Tensor) -> tf.Tensor:
        w = tf.get_variable("w", [784, 1], initializer=tf.zeros_initializer())
        return tf.square(tf.matmul(x[:, :784], w)[:, 0] - x[:, 784])

    def twice(x: tf.Tensor) -> tf.Tensor:
        s = tf.get_variable("s", [], initializer=tf.ones_initializer())
        return tf.where(x[:, 0] > 0, s * tf.ones_like(x[:, 0]), x[:, 0]) + tf.reduce_sum(x * 0, 1) * s

    def vanishing_twice(x: tf.Tensor) -> tf.Tensor:
        w = tf.get_variable("w", [784, 1], initializer=tf.zeros_initializer())
        one, other = (tf.matmul(x[:, :784], read(w))[:, 0] for read in (tf.tanh, tf.sin))
        return tf.square(one - x[:, 784]) + tf.square(other - x[:, 784])

    def vanishing_with_a_direction(x: tf.Tensor) -> tf.Tensor:
        w = tf.get_variable("w", [784, 1], initializer=tf.zeros_initializer())
        return x[:, 784] * (tf.matmul(x[:, :784], w)[:, 0] + tf.reduce_sum(w * 1e-19))

    assert passed(cancelling, 1, [1e4]) < 1.001
    for build in (vanishing, vanishing_twice, vanishing_with_a_direction):
        assert passed(build, 785, [1e-19] * 784 + [5e18]) < 1.001
    assert passed(twice, 1, [3.0]) < 1.001
    assert passed(lambda x: tf.where(x[:, 0] > 0, *_both(x)), 1, [3.0]) < 1.001


def _both(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    s = tf.broadcast_to(tf.get_variable("s", [1], initializer=tf.ones_initializer()), [1])
    return s, -s


def test_float64() -> None:
    from efl.privacy import per_example

    tf.reset_default_graph()
    x = tf.placeholder(tf.float64, [None, 4])
    h = tf.layers.dense(tf.layers.dense(tf.reshape(x, [-1, 2, 2]), 3, activation="tanh"), 2)
    gradients = per_example.differentiate(per_example.Objective(tf.reduce_sum(h, [1, 2])), tf.trainable_variables())
    sums = [gradients.weighted_sum(v, tf.ones([5])) for v in gradients.variables]
    exact = tf.gradients(tf.reduce_sum(h), gradients.variables)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for one, other in sess.run(list(zip(sums, exact)), {x: np.random.default_rng(0).normal(size=(5, 4))}):
            np.testing.assert_allclose(one, other, rtol=1e-9)


def test_inference_normalisation_and_stopped_gradients() -> None:
    def build() -> Built:
        x = image("x", 6, 6, 3)
        h = tf.layers.batch_normalization(tf.layers.conv2d(x, 4, 3), training=False)
        frozen = tf.stop_gradient(tf.layers.dense(tf.layers.flatten(h), 4, name="frozen"))
        return Built(tf.reduce_sum(tf.layers.dense(tf.tanh(frozen), 2), 1) + _values(h), {"x": x})

    assert_equal(build, {"x": random(6, 6, 3)})


def test_a_variable_behind_a_stopped_gradient_is_not_trained() -> None:
    from efl.privacy import per_example

    tf.reset_default_graph()
    x = image("x", 4)
    h = tf.layers.dense(tf.stop_gradient(tf.layers.dense(x, 3, name="frozen")), 2, name="trained")
    found = per_example.differentiate(per_example.Objective(tf.reduce_sum(h, 1)), tf.trainable_variables())
    assert {v.op.name for v in found.variables} == {"trained/kernel", "trained/bias"}


@pytest.mark.parametrize("taken", [True, False])
def test_branches_by_a_flag(taken: bool) -> None:
    """What dropout is made of where a flag turns it off; another branch lies in the branch."""

    def build() -> Built:
        x, flag = image("x", 6), tf.placeholder_with_default(taken, [])
        h = tf.layers.dense(x, 4, activation="tanh")
        h = tf.cond(flag, lambda: tf.exp(h) * x[:, :4], lambda: tf.nn.softmax(h))
        h = tf.cond(flag, lambda: tf.cond(flag, lambda: h + 1.0, lambda: h), lambda: tf.concat([h[:, :2], x[:, 4:]], 1))
        h = tf.layers.dropout(h, 0.5, training=tf.logical_and(flag, False))
        return Built(_values(tf.layers.dense(h, 3)), {"x": x})

    assert_equal(build, {"x": random(6)})


def test_dropout_that_a_flag_turns_on() -> None:
    from efl.privacy import per_example

    tf.reset_default_graph()
    x, flag = image("x", 6), tf.placeholder(tf.bool, [])
    h = tf.layers.dropout(tf.layers.dense(x, 50, name="a"), 0.5, training=flag)
    loss = tf.reduce_sum(h, 1)
    gradients = per_example.differentiate(per_example.Objective(loss), tf.trainable_variables())
    bias = next(v for v in gradients.variables if v.op.name == "a/bias")
    kept = (
        tf.gradients(tf.reduce_sum(h), bias)[0],
        gradients.weighted_sum(bias, tf.ones([6])),
        gradients.squared_norm(bias),
    )
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for on in (True, False):
            whole, total, norms = sess.run(kept, {x: random(6), flag: on})
            np.testing.assert_allclose(total, whole, rtol=1e-5)  # the same numbers were dropped
            assert (norms.min() > 60) if on else np.allclose(norms, 50)
            assert not on or len(set(norms.tolist())) > 1


@pytest.mark.parametrize("rows", [1, 3])
def test_detour_is_exact(rows: int) -> None:
    """What has no rule: a normalised kernel, a learned token beside the input, a weight in a quotient of powers."""

    def build() -> Built:
        x = image("x", 6)
        kernel = tf.nn.l2_normalize(tf.get_variable("kernel", [6, 4]), 0)
        token = tf.tile(tf.get_variable("token", [1, 4]), [tf.shape(x)[0], 1])
        h = tf.concat([tf.matmul(x, kernel), token], 1)
        slope = tf.get_variable("slope", [8])
        h = tf.maximum(h, slope * h) ** 2 / (1 + slope**2)
        return Built(tf.reduce_sum(h, 1, keepdims=True), {"x": x})

    assert_equal(build, {"x": random(6)}, rows, names=["kernel", "token", "slope"])


def test_detour_where_a_variable_is_read_in_a_roundabout_way() -> None:
    """Through complex numbers and lists of tensors, and out of an op that hands rows on beside it."""

    def build() -> Built:
        x = image("x", 6)
        wave, listed, beside = (tf.get_variable(name, [6, 4]) for name in ("wave", "listed", "beside"))
        h = tf.matmul(x, wave) + tf.matmul(x, tf.abs(tf.signal.fft(tf.complex(wave, 0.1 * tf.ones_like(wave)))))
        items = tf.raw_ops.TensorListFromTensor(tensor=listed, element_shape=[4])
        rows = [tf.raw_ops.TensorListGetItem(
            input_handle=items, index=i, element_shape=[4], element_dtype=tf.float32) for i in range(6)]  # fmt: skip
        h += tf.matmul(x, listed) * tf.matmul(x, tf.stack(rows))
        _, aside = tf.identity_n([h, beside])
        return Built(_values(h + tf.matmul(x, aside) + tf.matmul(tf.square(x), beside)), {"x": x})

    assert_equal(build, {"x": random(6)}, names=["wave", "listed", "beside"])


def test_a_variable_that_comes_out_of_an_op_together_with_rows_is_refused() -> None:
    from efl.errors import ModelError
    from efl.privacy import per_example

    tf.reset_default_graph()
    x = image("x", 6)
    held, rows = tf.identity_n([tf.get_variable("held", [6, 4]), x])
    loss = _values(tf.matmul(rows, held))
    with pytest.raises(
        ModelError, match="hands on numbers of held together with rows of the batch, and 'MatMul' reads"
    ):
        per_example.differentiate(per_example.Objective(loss), tf.trainable_variables(), 1)


@pytest.mark.parametrize("complex_variable", [False, True])
def test_a_variable_that_meets_rows_as_complex_numbers_is_refused(complex_variable: bool) -> None:
    from efl.errors import ModelError
    from efl.privacy import per_example

    tf.reset_default_graph()
    x = image("x", 4)
    w = tf.get_variable("w", [4, 3], tf.complex64 if complex_variable else tf.float32, tf.ones_initializer())
    if complex_variable:
        h = tf.matmul(x, tf.math.real(w))
    else:
        h = tf.cast(tf.matmul(tf.cast(x, tf.complex64), tf.complex(w, tf.zeros_like(w))), tf.float32)
        h += tf.matmul(x, w)
    with pytest.raises(ModelError, match=r"w: 'MatMul.*' \(MatMul\) makes complex numbers of it and of rows"):
        per_example.differentiate(per_example.Objective(_values(h)), tf.trainable_variables())


@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_that_pass_by_an_op_are_no_others(rows: int) -> None:
    """What rounds passes gradients on as they come; TensorFlow writes functions of its own with other gradients."""

    def build() -> Built:
        x = image("x", 6)
        h = tf.nn.swish(tf.layers.dense(x, 5))
        with tf.get_default_graph().gradient_override_map({"Round": "Identity"}):
            h = tf.round(3 * h)
        return Built(_values(tf.layers.dense(h / 3, 4)), {"x": x})

    assert_equal(build, {"x": random(6)}, rows)


def test_detour_of_rounded_weights() -> None:
    def build() -> Built:
        x, kernel = image("x", 6), tf.get_variable("kernel", [6, 4])
        with tf.get_default_graph().gradient_override_map({"Sign": "Identity"}):
            h = tf.matmul(x, tf.sign(kernel))
        return Built(_values(h + tf.matmul(x, kernel + tf.stop_gradient(tf.round(kernel) - kernel))), {"x": x})

    assert_equal(build, {"x": random(6)}, names=["kernel"])


def test_elements_of_all_kinds() -> None:
    def build() -> Built:
        x = image("x", 3, 4)
        shapes = [[4], [3, 1], [1, 3, 4], [3, 4], [4], [4]]
        v = [tf.get_variable(f"v{i}", shape) for i, shape in enumerate(shapes)]
        h = tf.maximum(x, v[0]) - v[1]
        h = tf.squared_difference(h, v[2]) / (3.0 + x * v[3])
        h = tf.where(x > 0, h * v[4], h) + tf.minimum(x, v[5])
        return Built(_values(h), {"x": x})

    assert_equal(build, {"x": random(3, 4)}, names=[f"v{i}" for i in range(6)])
