"""The follower: has images and labels, trains the convolutions, sends their output and the labels.

    python leader.py --federal_role=leader          in one terminal
    python follower.py --federal_role=follower      in another

or ``efl run leader.py follower.py`` for both at once.
"""

import common
import tensorflow.compat.v1 as tf

import efl

FLAGS = common.flags(__doc__)
DATA = common.Input(FLAGS)


def model_fn(model, sample, is_training):
    labels = common.labels_of(sample, FLAGS, is_training)
    y = common.convolutions(sample["img"])
    if is_training:  # the leader's loss trains the convolutions, through the gradient that comes back
        model.send("y_train", y, require_grad=True)
        model.send("labels_train", labels, require_grad=False)
    else:
        model.send("y_test", y, mode=efl.MODE.EVAL, require_grad=False)
        model.send("labels_test", labels, mode=efl.MODE.EVAL, require_grad=False)
    return y


def loss_fn(model, sample):
    with tf.variable_scope("cnn"):
        return model_fn(model, sample, True)


def eval_fn(model, sample):
    with tf.variable_scope("cnn", reuse=True):
        return model_fn(model, sample, False)


CNN = efl.FederalModel()
CNN.input_fn(DATA)
CNN.loss_fn(loss_fn)
CNN.eval_fn(eval_fn)
common.train(CNN, FLAGS, DATA)
