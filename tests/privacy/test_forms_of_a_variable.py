"""Norms where ops read one variable as matrices of several sizes, and where a kernel is not what its attributes say."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from tests.privacy.graphs import Built, assert_equal, image, random
from tests.privacy.test_what_is_public import BATCH, ROWS, compiled, read

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Read = Callable[[tf.Tensor], tf.Tensor]


def _times(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.sin(tf.matmul(x[:, : w.shape[0]], w)), 1)


def _over_time(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.sin(tf.reshape(x, [-1, 12 // w.shape[0], w.shape[0]]) @ w), [1, 2])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("form", [[12, 1], [1, 12], [4, 3], [3, 4]])
@pytest.mark.parametrize(("one", "other"), [(tf.tanh, tf.identity), (tf.identity, tf.identity), (tf.tanh, tf.sin)])
@pytest.mark.parametrize("product", [_times, _over_time])
def test_a_variable_that_is_read_as_two_matrices(
    product: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], one: Read, other: Read, form: list[int], rows: int
) -> None:
    def build() -> Built:
        x, w = image("x", 12), tf.get_variable("w", [3, 4])
        return Built(_times(x, one(w)) + product(x, other(tf.reshape(w, form))), {"x": x})

    assert_equal(build, {"x": random(12)}, rows, names=["w"], above=1e-4)


def test_what_two_forms_of_a_variable_add_up_to_is_clipped() -> None:
    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        v = tf.get_variable("v", [3, 1], initializer=tf.zeros_initializer())
        gate = tf.matmul(s["x"], tf.tanh(v))[:, 0]
        scaled = tf.matmul(s["x"][:, :1], tf.reshape(v, [1, 3]))
        return 1e3 * (gate - tf.reduce_sum(scaled[:, 1:], 1))

    rows = np.tile(np.array([[1.0, 0.0, 0.0]], np.float32), (ROWS, 1))
    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, 0.0, learning_rate=1.0)
    made = compiled(lambda: read(tf.data.Dataset.from_tensor_slices(rows).repeat().batch(BATCH)), loss_fn, optimizer)
    made.fit(efl.procedure_fn.train(max_step=1))
    assert 0.99 < np.linalg.norm(made.get_weights()["v"]) < 1.001


def test_products_over_time_know_the_sizes_of_their_matrix(caplog: pytest.LogCaptureFixture) -> None:
    """tf.reshape by sizes of the running program forgets them: parts of one matrix are still put together."""

    def build() -> Built:
        x, w = image("x", 2, 3), tf.get_variable("w", [3, 4])
        unknown = tf.reshape(x, tf.stack([tf.shape(x)[0], -1, tf.constant(3) * 1]))
        h = tf.raw_ops.BatchMatMulV2(x=unknown, y=w)
        return Built(tf.reduce_sum(tf.sin(h), [1, 2]) + _times(x[:, 0], w), {"x": x})

    caplog.set_level(logging.WARNING, "efl")
    assert_equal(build, {"x": random(2, 3)}, names=["w"], above=1e-4)
    assert "no fast rule" not in caplog.text


@pytest.mark.parametrize("strides", [1, 2])
def test_a_depthwise_convolution_whose_kernel_takes_no_notice_of_dilations(strides: int) -> None:
    def build() -> Built:
        x, kernel = image("x", 6, 6, 2), tf.get_variable("kernel", [3, 3, 2, 2])
        h = tf.nn.depthwise_conv2d_native(x, kernel, [1, strides, strides, 1], "SAME", dilations=[1, 2, 2, 1])
        return Built(tf.reduce_sum(tf.sin(h), [1, 2, 3]), {"x": x})

    assert_equal(build, {"x": random(6, 6, 2)}, names=["kernel"])


def test_depthwise_convolutions_that_dilate_have_a_fast_rule(caplog: pytest.LogCaptureFixture) -> None:
    def build() -> Built:
        x, kernel = image("x", 8, 8, 2), tf.get_variable("kernel", [3, 3, 2, 2])
        h = tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME", rate=[2, 2])
        h = tf.keras.layers.DepthwiseConv2D(3, dilation_rate=2)(h)
        return Built(tf.reduce_sum(tf.sin(h), [1, 2, 3]), {"x": x})

    caplog.set_level(logging.WARNING, "efl")
    assert_equal(build, {"x": random(8, 8, 2)}, names=["kernel"])
    assert "no fast rule" not in caplog.text


def test_detour_of_a_convolution_in_groups() -> None:
    def build() -> Built:
        x, kernel = image("x", 5, 5, 4), tf.get_variable("kernel", [3, 3, 2, 4])
        return Built(tf.reduce_sum(tf.sin(tf.nn.conv2d(x, kernel, 1, "SAME")), [1, 2, 3]), {"x": x})

    assert_equal(build, {"x": random(5, 5, 4)}, names=["kernel"])
