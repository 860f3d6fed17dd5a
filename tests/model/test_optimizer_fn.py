"""Which optimizer trains which variables. The reference is plain TensorFlow."""

import logging

import numpy as np
import pytest
import tf_keras

import efl

import tensorflow.compat.v1 as tf  # isort: skip
from efl.errors import ModelError

SGD = tf.train.GradientDescentOptimizer


def deep(x):
    with tf.variable_scope("wide", reuse=tf.AUTO_REUSE):
        w = tf.get_variable("w", initializer=np.full((3, 1), 0.1, np.float32))
        with tf.variable_scope("inner", reuse=tf.AUTO_REUSE):
            v = tf.get_variable("v", initializer=np.full((3, 1), 0.2, np.float32))
    with tf.variable_scope("widest", reuse=tf.AUTO_REUSE):  # begins like the scope "wide", and is not in it
        b = tf.get_variable("b", initializer=np.zeros(1, np.float32))
    return tf.matmul(x, w) + tf.matmul(tf.tanh(x), v) + b


def trained(toy, optimizer_fn, steps=4):
    model = toy.model()
    model.loss_fn(lambda m, s: tf.losses.mean_squared_error(s["label"], deep(s["x"]))).optimizer_fn(optimizer_fn)
    model.compile().fit(efl.procedure_fn.train(max_step=steps))
    return model


def reference(toy, make, steps=4):
    """make(loss) -> train op, in a graph and session without efl."""
    with tf.Graph().as_default(), tf.Session() as sess:
        data = tf.data.Dataset.from_tensor_slices((toy.x, toy.y)).repeat().batch(10)
        x, y = tf.data.make_one_shot_iterator(data).get_next()
        op = make(tf.losses.mean_squared_error(y, deep(x)))
        sess.run(tf.global_variables_initializer())
        for _ in range(steps):
            sess.run(op)
        return sess.run({v.op.name: v for v in tf.trainable_variables()})


def assert_same(model, expected):
    got = model.get_weights()
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_one_optimizer_for_everything(toy):
    model = trained(toy, efl.optimizer_fn.optimizer_setter(tf.train.AdamOptimizer(0.05)))
    assert_same(model, reference(toy, lambda loss: tf.train.AdamOptimizer(0.05).minimize(loss)))
    ((variables, scope),) = model.opt_to_vars().values()
    assert {v.op.name for v in variables} == {"wide/w", "wide/inner/v", "widest/b"}
    assert scope is None


def test_optimizers_by_scope_and_the_longest_scope_wins(toy):
    rates = {"wide": 0.1, "wide/inner": 0.02, "widest": 0.3}
    model = trained(toy, efl.optimizer_fn.scope_optimizer({scope: SGD(rate) for scope, rate in rates.items()}))

    def make(loss):
        held = {v.op.name: v for v in tf.trainable_variables()}
        pairs = {"wide/w": 0.1, "wide/inner/v": 0.02, "widest/b": 0.3}
        gradients = dict(zip(pairs, tf.gradients(loss, [held[name] for name in pairs])))
        with tf.control_dependencies(list(gradients.values())):
            return tf.group(*(tf.assign_sub(held[name], rate * gradients[name]) for name, rate in pairs.items()))

    assert_same(model, reference(toy, make))
    by_scope = {scope: [v.op.name for v in variables] for variables, scope in model.opt_to_vars().values()}
    assert by_scope == {"wide": ["wide/w"], "wide/inner": ["wide/inner/v"], "widest": ["widest/b"]}


def test_one_optimizer_may_serve_several_scopes(toy):
    shared = tf.train.MomentumOptimizer(0.1, 0.9)
    model = trained(toy, efl.optimizer_fn.scope_optimizer({"wide": shared, "widest/": shared}))
    assert_same(model, reference(toy, lambda loss: tf.train.MomentumOptimizer(0.1, 0.9).minimize(loss)))
    ((variables, scope),) = model.opt_to_vars().values()
    assert len(variables) == 3
    assert scope == "wide,widest/"


def test_variables_in_no_scope_stay_and_are_named(toy, caplog):
    with caplog.at_level(logging.WARNING, logger="efl"):
        model = trained(toy, efl.optimizer_fn.scope_optimizer({"wide": SGD(0.1)}))
    assert "scope_optimizer: in none of the scopes, so not trained: widest/b" in caplog.text
    assert model.get_weights()["widest/b"] == 0.0
    assert np.abs(model.get_weights()["wide/w"] - 0.1).max() > 0.01


def test_the_empty_scope_takes_the_rest(toy, caplog):
    model = trained(toy, efl.optimizer_fn.scope_optimizer({"wide": SGD(0.1), "": SGD(0.2)}))
    assert "not trained" not in caplog.text
    by_scope = {scope: [v.op.name for v in variables] for variables, scope in model.opt_to_vars().values()}
    assert by_scope[""] == ["widest/b"]


def test_a_scope_without_variables_is_refused(toy):
    with pytest.raises(
        ModelError, match="no trainable variable lies in scope narrow, wid; there are: wide/w, wide/inner/v, widest/b"
    ):
        trained(toy, efl.optimizer_fn.scope_optimizer({"wide": SGD(0.1), "narrow": SGD(0.1), "wid": SGD(0.1)}))


@pytest.mark.parametrize("opt", [tf_keras.optimizers.SGD(0.1), "sgd", None, SGD])
def test_what_is_no_optimizer(opt):
    with pytest.raises(ModelError, match="is no optimizer of tf.train"):
        efl.optimizer_fn.optimizer_setter(opt)
    with pytest.raises(ModelError, match="is no optimizer of tf.train"):
        efl.optimizer_fn.scope_optimizer({"a": opt})


@pytest.mark.parametrize("argument", [{}, None, [SGD(0.1)], SGD(0.1)])
def test_what_is_no_dict_of_scopes(argument):
    with pytest.raises(ModelError, match="scope_optimizer: expected a dict of variable scope -> optimizer"):
        efl.optimizer_fn.scope_optimizer(argument)


def test_a_key_that_is_no_scope():
    with pytest.raises(ModelError, match="scope_optimizer: 3 is not the name of a variable scope"):
        efl.optimizer_fn.scope_optimizer({3: SGD(0.1)})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"returned a NoneType: expected \{optimizer: \(variables, scope\)\}"),
        ({SGD(0.1): []}, r"is not a \(variables, scope\) pair"),
    ],
)
def test_an_optimizer_fn_of_the_users_own_is_checked(toy, returned, message):
    with pytest.raises(ModelError, match=message):
        trained(toy, lambda model, task: returned)


def test_an_optimizer_fn_of_the_users_own(toy):
    def optimizer_fn(model, task):
        assert task is None
        return {SGD(0.1): ([v for v in tf.trainable_variables() if "inner" in v.op.name], "mine")}

    model = trained(toy, optimizer_fn)
    assert model.get_weights()["widest/b"] == 0.0
    ((variables, scope),) = model.opt_to_vars().values()
    assert ([v.op.name for v in variables], scope) == (["wide/inner/v"], "mine")


@pytest.mark.parametrize("mode", ["noise", "unnoise"])
def test_a_backend_mode_that_no_optimizer_reads_is_told_once(toy, caplog, mode):
    model = toy.model(evaluate=toy.batch())
    model.input_fn(model.input_fns[None], "b").loss_fn(toy.loss, "b").optimizer_fn(
        efl.optimizer_fn.optimizer_setter(tf.train.AdamOptimizer(0.1)), "b"
    )
    model.compile(opt_config={"BACKEND_MODE": mode})
    (told,) = [record.getMessage() for record in caplog.records if record.name == "efl"]
    assert told.startswith(f"opt_config BACKEND_MODE={mode!r} has no effect: no optimizer")
    assert "(its optimizers: AdamOptimizer, GradientDescentOptimizer)" in told
    assert "no gradient is noised" in told


@pytest.mark.parametrize("config", [None, {}, {"REDUCE": "sum"}])
def test_a_backend_mode_that_was_not_chosen_is_not_told(toy, caplog, config):
    toy.model().compile(opt_config=config)
    assert "BACKEND_MODE" not in caplog.text


def test_a_backend_mode_that_an_optimizer_reads_is_not_told(toy, caplog):
    private = efl.DPGradientDescentGaussianOptimizer(l2_norm_clip=1.0, noise_multiplier=1.0, learning_rate=0.1)
    model = toy.model().optimizer_fn(efl.optimizer_fn.optimizer_setter(private))
    model.loss_fn(lambda m, sample: tf.reduce_sum(tf.square(sample["label"] - toy.net(sample)), 1))
    model.compile(opt_config={"BACKEND_MODE": "noise"})
    assert "BACKEND_MODE" not in caplog.text
