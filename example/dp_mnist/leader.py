"""The leader: has no columns that it uses; trains two dense layers on what the follower sends.

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
    mode = "train" if is_training else "test"
    labels = model.recv(f"labels_{mode}", dtype=tf.int32, require_grad=False)
    y = model.recv(f"y_{mode}", dtype=tf.float32, require_grad=is_training)
    return common.head(model, tf.reshape(y, [-1, 512]), tf.reshape(labels, [-1]), is_training)


def loss_fn(model, sample):
    with tf.variable_scope("head"):
        return model_fn(model, sample, True)


def eval_fn(model, sample):
    with tf.variable_scope("head", reuse=True):
        return model_fn(model, sample, False)


CNN = efl.FederalModel()
CNN.input_fn(DATA)
CNN.loss_fn(loss_fn)
CNN.eval_fn(eval_fn)
common.train(CNN, FLAGS, DATA, has_labels=False)
