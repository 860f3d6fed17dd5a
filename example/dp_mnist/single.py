"""Digits, learned with differential privacy in one process.

    python single.py                       scikit-learn's digits; no network is needed
    python single.py --data DIR            MNIST, from its four IDX files

The log says after each epoch what has been spent, and the end to whom.
"""

import common
import tensorflow.compat.v1 as tf

import efl

FLAGS = common.flags(__doc__)
DATA = common.Input(FLAGS)


def model_fn(model, sample, is_training):
    labels = common.labels_of(sample, FLAGS, is_training)
    return common.head(model, common.convolutions(sample["img"]), labels, is_training)


def loss_fn(model, sample):
    with tf.variable_scope("cnn"):
        return model_fn(model, sample, True)


def eval_fn(model, sample):
    with tf.variable_scope("cnn", reuse=True):
        return model_fn(model, sample, False)


CNN = efl.Model()
CNN.input_fn(DATA)
CNN.loss_fn(loss_fn)
CNN.eval_fn(eval_fn)
common.train(CNN, FLAGS, DATA)
