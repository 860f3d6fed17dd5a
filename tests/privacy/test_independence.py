"""Whatever lets one row's loss depend on another row is refused, or found by the experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from efl.errors import ModelError
from efl.privacy import per_example
from efl.privacy.per_example.layouts import walk
from efl.privacy.per_example.layouts.layout import EXAMPLES, Rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Make = Callable[[tf.Tensor], tf.Tensor]


@pytest.fixture(autouse=True)
def _fresh_graph() -> None:
    tf.reset_default_graph()


def _rows(h: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.tanh(h), list(range(1, h.shape.rank)))


def _dense(x: tf.Tensor) -> tf.Tensor:
    return tf.layers.dense(x, 4)


def _loop(x: tf.Tensor) -> tf.Tensor:
    def body(i: tf.Tensor, h: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return i + 1, tf.tanh(h) + tf.reduce_mean(h, 0)

    return tf.while_loop(lambda i, h: i < 2, body, [0, _dense(x)])[1]


def _branch(x: tf.Tensor) -> tf.Tensor:
    return tf.cond(tf.reduce_sum(x) > 0, lambda: _dense(x), lambda: -x)


def _source() -> tf.Tensor:
    return tf.data.make_one_shot_iterator(tf.data.Dataset.from_tensors(np.ones(3, np.float32)).repeat()).get_next()


MIXING: dict[str, tuple[Make, str]] = {
    "centred": (lambda x: _dense(x) - tf.reduce_mean(x, 0), "Mean.*over the examples"),
    "centred, stopped": (lambda x: _dense(x) - tf.stop_gradient(tf.reduce_mean(x, 0)), "Mean.*over the examples"),
    "batch norm": (lambda x: tf.layers.batch_normalization(_dense(x), training=True), "over the examples"),
    "fused batch norm": (
        lambda x: tf.layers.batch_normalization(tf.layers.conv2d(tf.reshape(x, [-1, 2, 2, 1]), 4, 1), training=True),
        "batch normalisation in training mode",
    ),
    "similarity": (lambda x: tf.matmul(_dense(x), x, transpose_b=True), "examples with one another"),
    "similarity by einsum": (lambda x: tf.einsum("ik,jk->ij", _dense(x), x), "examples with one another"),
    "softmax over the batch": (lambda x: tf.nn.softmax(_dense(x), axis=0), "axis|examples"),
    "normalised over the batch": (lambda x: tf.nn.l2_normalize(_dense(x), 0), "over the examples"),
    "reversed": (lambda x: _dense(x) * tf.reverse(x, [0]), "rows"),
    "rolled": (lambda x: _dense(x) * tf.roll(x, 1, 0), "rows"),
    "sorted": (lambda x: tf.sort(_dense(x), axis=0), "examples|TopK"),
    "shuffled": (lambda x: tf.gather(_dense(x), tf.random.shuffle(tf.range(tf.shape(x)[0]))), "rows of other examples"),
    "neighbours": (lambda x: _dense(x)[1:] * x[:-1], "rows"),
    "cumulative": (lambda x: tf.cumsum(_dense(x), 0), "axis of the examples"),
    "largest of the batch": (lambda x: _dense(x) / tf.reduce_max(x), "over the examples"),
    "number of positive ones": (
        lambda x: _dense(x) / tf.cast(tf.shape(tf.where(x > 0))[0], tf.float32),
        "entries all examples have",
    ),
    "reshaped across rows": (lambda x: tf.reshape(tf.reshape(_dense(x), [-1, 3]), [-1, 4]), "parts of several"),
    "a loop": (_loop, "nothing is known of what .*While"),
    "a branch on the batch": (_branch, "over the examples|nothing is known"),
    "python": (
        lambda x: tf.numpy_function(lambda a: a[::-1], [_dense(x)], tf.float32),
        "nothing is known of what PyFunc",
    ),
    "how many were kept": (
        lambda x: _dense(x) / tf.cast(1 + tf.shape(tf.boolean_mask(x[:, 0], x[:, 0] > 0))[0], tf.float32),
        "takes rows of other examples",
    ),
    "numbers of distinct ids": (
        lambda x: _dense(x) * tf.cast(tf.unique(tf.cast(x[:, 0], tf.int64))[1], tf.float32)[:, tf.newaxis],
        "do not belong to examples any more",
    ),
    "a gradient of one's own": (
        lambda x: tf.custom_gradient(lambda h: (tf.identity(h), lambda d: d * tf.reduce_mean(x)))(_dense(x)),
        "a gradient of the user's own",
    ),
    "data in a function": (
        lambda x: _dense(x) * tf.cond(tf.constant(True), lambda: tf.reduce_mean(_source()), lambda: 1.0),
        "nothing is known of a branch that reads data of its own",
    ),
    "contrast of a batch of rows": (
        lambda x: tf.image.adjust_contrast(tf.reshape(_dense(x), [-1, 2, 2]), 2.0),
        "no batch of images",
    ),
    "another order of axes": (lambda x: tf.transpose(_dense(x)), "first axis|examples"),
    "a column beside a vector": (lambda x: tf.reduce_sum(_dense(x), 1) + x[:, :1], "different axes"),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixed_rows_are_refused(name: str) -> None:
    make, why = MIXING[name]
    x = tf.placeholder(tf.float32, [None, 4], "x")
    h = make(x)
    if h.shape.rank is None:
        h = tf.ensure_shape(h, [None, 4])
    with pytest.raises(ModelError, match=f"(?s){why}"):
        per_example.differentiate(per_example.Objective(_rows(h)), tf.trainable_variables())


@tf.RegisterGradient("EflTestsLarger")
def _larger(op: tf.Operation, *deltas: tf.Tensor) -> list[tf.Tensor]:
    """Of each input a gradient of its size, which is not that of the op."""
    return [1e3 * tf.ones_like(t) * tf.reduce_mean(deltas[0]) if t.dtype.is_floating else None for t in op.inputs]


def _overridden(make: Make, **instead: str) -> Make:
    def within(x: tf.Tensor) -> tf.Tensor:
        with tf.get_default_graph().gradient_override_map(instead):
            return make(x)

    return within


def _weights() -> tf.Tensor:
    return tf.get_variable("w", [4, 4])


OWN_GRADIENTS: dict[str, Make] = {
    "of a product": _overridden(lambda x: tf.matmul(x, _weights()), MatMul="EflTestsLarger"),
    "of a sum": _overridden(lambda x: x + _weights()[0], AddV2="EflTestsLarger"),
    "of a reduction": _overridden(
        lambda x: tf.reduce_mean(_dense(x), 1, keepdims=True) * _dense(x), Mean="EflTestsLarger"
    ),
    "of a reshape": lambda x: tf.reshape(
        _overridden(lambda h: tf.reshape(h, [-1, 2, 2]), Reshape="EflTestsLarger")(_dense(x)), [-1, 4]
    ),
    "of another op of TensorFlow": _overridden(lambda x: tf.tanh(_dense(x)), Tanh="Square"),
    "of a variable's copy": lambda x: tf.matmul(x, _overridden(tf.identity, Identity="EflTestsLarger")(_weights())),
    "of a variable's square": lambda x: tf.matmul(x, _overridden(tf.square, Square="EflTestsLarger")(_weights())),
    "of reading a variable": _overridden(lambda x: x * tf.get_variable("s", []), ReadVariableOp="EflTestsLarger"),
    "of a function of a variable": lambda x: tf.matmul(
        x, tf.custom_gradient(lambda w: (tf.identity(w), lambda d: 1e3 * tf.sign(d)))(_weights())
    ),
    "in a branch": lambda x: (
        tf.cond(
            tf.placeholder(tf.bool, []), lambda: _overridden(lambda h: tf.exp(h), Exp="EflTestsLarger")(x), lambda: x
        )
        + _dense(x)
    ),
    "of what a branch does with a variable": lambda x: _in_a_branch(x, tf.identity(_weights())),
}


def _in_a_branch(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    def product() -> tf.Tensor:
        return tf.matmul(x, _overridden(tf.square, Square="EflTestsLarger")(weights))

    return tf.cond(tf.placeholder(tf.bool, []), product, lambda: x)


@pytest.mark.parametrize("name", OWN_GRADIENTS)
def test_a_gradient_of_the_users_own_is_refused_wherever_it_is(name: str) -> None:
    h = OWN_GRADIENTS[name](tf.placeholder(tf.float32, [None, 4], "x"))
    with pytest.raises(ModelError, match=r"'.*' \(\w+\) has a gradient of the user's own"):
        per_example.differentiate(per_example.Objective(_rows(h)), tf.trainable_variables())


def test_a_padded_batch_is_refused() -> None:
    x = tf.placeholder(tf.float32, [None, None], "padded")
    with pytest.raises(ModelError, match=r"the length of an axis is that of the longest row.*padded_shapes"):
        per_example.differentiate(
            per_example.Objective(tf.reduce_mean(tf.square(_dense(x[..., tf.newaxis])), [1, 2])),
            tf.trainable_variables(),
        )


BATCH = 3


@st.composite
def gathers(draw: st.DrawFn) -> tuple[Any, ...]:
    """Rank of the params, the axis that holds the rows, axis, batch_dims, rank of the indices, who has the rows."""
    rank, more = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    batch_dims = draw(st.integers(0, min(rank - 1, more)))
    axis = draw(st.integers(batch_dims, rank - 1))
    holder = draw(st.sampled_from(["params", "indices", "both"]))
    rows = draw(st.integers(0, (more if holder == "indices" else rank) - 1)) if holder != "indices" or more else 0
    return rank, rows, axis, batch_dims, more, holder


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(gathers(), st.booleans())
@example((4, 2, 1, 1, 2, "params"), True)
@example((3, 2, 1, 1, 2, "params"), False)
@example((3, 2, 2, 2, 2, "indices"), True)
def test_a_gather_has_its_rows_where_it_is_said_to(made: tuple[Any, ...], is_static: bool) -> None:
    """Against the truth: which places of the output change with one row of the batch."""
    rank, rows, axis, batch_dims, more, holder = made
    if holder == "indices" and not more:
        return
    tf.reset_default_graph()
    x = tf.placeholder(tf.float32, [BATCH if is_static else None, 2], "x")
    # Each axis has two places, that of the rows BATCH, and so have those that go together with it.
    sizes, wanted = [2] * rank, [2] * more
    of_params, of_indices = holder != "indices", holder != "params"
    if of_params:
        sizes[rows] = BATCH
    if of_indices and rows < more:
        wanted[rows] = BATCH
    for place in range(batch_dims):
        sizes[place] = wanted[place] = max(sizes[place], wanted[place])
    rng = np.random.default_rng(rank * 7 + more)
    params, indices = tf.constant(rng.normal(size=sizes), tf.float32), tf.constant(rng.integers(0, 2, wanted), tf.int32)
    if of_params:
        params *= tf.reshape(x[:, 0], [-1 if i == rows else 1 for i in range(rank)])
    if of_indices and rows < more:
        indices = (indices + tf.cast(tf.reshape(x[:, 1], [-1 if i == rows else 1 for i in range(more)]), tf.int32)) % 2
    taken = tf.gather(params, indices, axis=axis, batch_dims=batch_dims)
    found = walk.Walk([x, taken]).layout(taken)
    if not isinstance(found, Rows):
        return
    value = np.random.default_rng(0).uniform(1, 2, (BATCH, 2)).astype(np.float32)
    with tf.Session() as sess:
        before = sess.run(taken, {x: value})
        length = before.shape[found.axis]
        owner = np.arange(length) // (length // (BATCH * found.before)) % BATCH
        assert length % (BATCH * found.before) == 0
        for row in range(BATCH):
            other = value.copy()
            other[row] += 1
            changed = sess.run(taken, {x: other}) != before
            elsewhere = tuple(a for a in range(before.ndim) if a != found.axis)
            assert set(owner[changed.any(elsewhere)]) <= {row}


def test_a_mean_of_the_batch_behind_a_gather_of_batches_is_refused() -> None:
    x = tf.placeholder(tf.float32, [None, 4], "x")
    values = tf.transpose(x[:, :1])[tf.newaxis, :, :, tf.newaxis]  # [1, 1, B, 1]
    taken = tf.gather(values, tf.constant([[0, 0]]), axis=1, batch_dims=1)  # [1, 2, B, 1]
    mean = tf.transpose(tf.stop_gradient(tf.reduce_mean(taken, 2)), [2, 0, 1])[:, 0, 0]
    with pytest.raises(ModelError, match="Mean.*over the examples"):
        per_example.differentiate(per_example.Objective(_dense(x)[:, 0] * mean), tf.trainable_variables())


@pytest.mark.parametrize("way", ["handle", "chain", "trained"])
def test_ways_around_into_a_variable(way: str) -> None:
    x = tf.placeholder(tf.float32, [None, 4], "x")
    carrier = tf.get_variable("carrier", [4], trainable=way == "trained")
    mean = tf.reduce_mean(x, 0)
    if way == "handle":
        tf.raw_ops.AssignVariableOp(resource=tf.identity(carrier.handle), value=mean)
    elif way == "chain":
        between = tf.get_variable("between", [4], trainable=False)
        between.assign(mean)
        carrier.assign(between)
    else:
        carrier.assign(mean)
    with pytest.raises(ModelError, match="writes what it computes of rows into a variable"):
        per_example.differentiate(per_example.Objective(_rows(_dense(x - carrier))), tf.trainable_variables())


def test_a_variable_that_carries_rows_from_step_to_step_is_refused() -> None:
    x = tf.placeholder(tf.float32, [None, 4], "x")
    mean = tf.get_variable("mean", [4], trainable=False)
    tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, mean.assign(0.9 * mean + 0.1 * tf.reduce_mean(x, 0)))
    steps = tf.get_variable("steps", [], trainable=False)
    tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, steps.assign_add(1.0))  # of no row
    per_example.differentiate(per_example.Objective(_rows(_dense(x) * steps)), tf.trainable_variables())
    with pytest.raises(ModelError, match="writes what it computes of rows into a variable that the loss reads"):
        per_example.differentiate(per_example.Objective(_rows(_dense(x - mean))), tf.trainable_variables())


def test_an_op_that_is_ignored_would_give_a_wrong_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rule that wrongly says of ReverseV2 that rows stay, norms are wrong, and the experiment shows it."""
    monkeypatch.setitem(walk.RULES, "ReverseV2", lambda op, ins, walk: EXAMPLES)
    x = tf.placeholder(tf.float32, [None, 4], "x")
    h = tf.layers.dense(x, 4, use_bias=False, name="layer")
    loss = tf.reduce_sum(h * tf.reverse(tf.tanh(h), [0]), 1)
    gradients = per_example.differentiate(per_example.Objective(loss), tf.trainable_variables())
    norms = gradients.squared_norm(gradients.variables[0])
    off = gradients.experiment(tf.constant(True))
    value = np.random.default_rng(0).normal(size=(5, 4))
    alone = [tf.reduce_sum(tf.square(tf.gradients(loss[i], gradients.variables[0])[0])) for i in range(5)]
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        found, deviation, right = sess.run([norms, off, alone], {x: value})
    assert not np.allclose(found, right, rtol=0.05)
    assert deviation > 0.05


def test_the_experiment_costs_nothing_where_it_is_not_wanted() -> None:
    x, wanted = tf.placeholder(tf.float32, [None, 4]), tf.placeholder(tf.bool, [])
    h = tf.layers.dense(tf.layers.dense(x, 4, activation="tanh"), 3)
    gradients = per_example.differentiate(per_example.Objective(_rows(h)), tf.trainable_variables())
    before = {op.name for op in tf.get_default_graph().get_operations()}
    off = gradients.experiment(wanted)
    products = {
        op.name for op in tf.get_default_graph().get_operations() if op.type == "MatMul" and op.name not in before
    }
    assert products
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for want in (False, True, False):
            took = tf.RunMetadata()
            options = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
            feeds = {x: np.random.default_rng(0).normal(size=(3, 4)), wanted: want}
            assert sess.run(off, feeds, options=options, run_metadata=took) < 1e-5
            ran = {node.node_name for device in took.step_stats.dev_stats for node in device.node_stats}
            assert bool(products & ran) == want


def test_a_loss_of_the_wrong_length() -> None:
    x, y = tf.placeholder(tf.float32, [None, 4]), tf.placeholder(tf.float32, [None])
    gradients = per_example.differentiate(per_example.Objective(_rows(_dense(x)) * y), tf.trainable_variables())
    expectations = gradients.groups.walk.expectations
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        holds = [e.holds for e in expectations]
        assert all(sess.run(holds, {x: np.ones([3, 4]), y: np.ones(3)}))
        assert not all(sess.run(holds, {x: np.ones([3, 4]), y: np.ones(1)}))  # one label for all rows


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), "needs a vector with one value for each row"),
        (
            (None, 3),
            r"reduce other axes with tf.reduce_mean\(loss, axis=\[1, …\]\)\. A party without a loss of its own returns",
        ),
    ],
)
def test_a_loss_of_another_shape(shape: tuple[int | None, ...], message: str) -> None:
    h = _dense(tf.placeholder(tf.float32, [None, 4]))
    loss = tf.reduce_mean(h) if shape == () else h[:, :3]
    with pytest.raises(ModelError, match=message):
        per_example.differentiate(per_example.Objective(loss), tf.trainable_variables())


def test_static_sizes_are_compared_when_the_graph_is_built() -> None:
    x, y = tf.placeholder(tf.float32, [8, 4], "rows"), tf.placeholder(tf.float32, [4, 1], "labels")
    loss = tf.reduce_sum(tf.reshape(_dense(x), [4, 8]), 1) + y[:, 0]
    with pytest.raises(ModelError, match=r"(?s)the input 'rows' has another number of rows than .*: 8, 4"):
        per_example.differentiate(per_example.Objective(loss), tf.trainable_variables())


def test_a_loss_that_sees_no_input() -> None:
    weights = tf.get_variable("w", [5])
    with pytest.raises(ModelError, match="depends on no row of the batch"):
        per_example.differentiate(per_example.Objective(weights**2), [weights])


def test_a_microbatch_that_does_not_divide_the_batch() -> None:
    x = tf.placeholder(tf.float32, [8, 4])
    with pytest.raises(ModelError, match="no multiple of a micro-batch's 3 rows"):
        per_example.differentiate(per_example.Objective(_rows(_dense(x))), tf.trainable_variables(), rows=3)


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (lambda x, flag: tf.cond(flag, lambda: x - tf.reduce_mean(x, 0), lambda: x), r"in a branch 'Mean' \(Mean\): "),
        (lambda x, flag: tf.cond(flag, lambda: x, lambda: tf.reverse(x, [0])), "in a branch "),
        (
            lambda x, flag: tf.cond(flag, lambda: x, lambda: tf.zeros([5, 4])),
            "its branches give tensors of different kinds",
        ),
        (
            lambda x, flag: tf.cond(tf.reduce_max(x) > 0, lambda: x, lambda: 2 * x),
            "Max.*over the examples|a condition on the data",
        ),
        (
            lambda x, flag: tf.cond(flag, lambda: _dense(x)[:, :4], lambda: x),
            "a branch that uses a variable; apply the layer, or read the variable, outside of tf.cond",
        ),
    ],
    ids=["mean", "reverse", "constant", "data", "variable"],
)
def test_branches_that_are_refused(branch, message):
    tf.reset_default_graph()
    x, flag = tf.placeholder(tf.float32, [None, 4]), tf.placeholder(tf.bool, [])
    with pytest.raises(ModelError, match=message):
        per_example.differentiate(per_example.Objective(_rows(_dense(branch(x, flag)))), tf.trainable_variables())


@pytest.mark.parametrize("unroll", [True, False])
def test_a_loop_over_time_is_refused_with_the_remedy_and_unrolled_it_is_none(unroll: bool) -> None:
    x = tf.placeholder(tf.float32, [None, 3, 4])
    loss = tf.reduce_sum(tf.square(tf.keras.layers.LSTM(2, unroll=unroll)(x)), 1)
    variables = tf.trainable_variables()
    if unroll:
        per_example.differentiate(per_example.Objective(loss), variables)
        return
    with pytest.raises(ModelError, match=r"of a loop over time\? Unroll it: unroll=True of a Keras layer"):
        per_example.differentiate(per_example.Objective(loss), variables)
