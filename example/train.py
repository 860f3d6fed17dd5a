"""Training on one machine, without a peer: the smallest complete program.

A logistic regression on scikit-learn's breast cancer data, read with ``tf.data``.

    python train.py
"""

import numpy as np
import tensorflow.compat.v1 as tf
from sklearn import datasets

import efl

# TensorFlow calls its own version 1 API deprecated, once for every function that is used.
tf.logging.set_verbosity(tf.logging.ERROR)

cancer = datasets.load_breast_cancer()
scaled = (cancer.data - cancer.data.mean(0)) / cancer.data.std(0)
dataset = tf.data.Dataset.from_tensor_slices(
    {"dense": scaled.astype(np.float32), "label": cancer.target[:, None].astype(np.float32)}
)
batches = tf.data.make_one_shot_iterator(dataset.shuffle(1000, seed=1).repeat().batch(64))


def input_fn(model, mode):
    columns = {
        "deep": [tf.feature_column.numeric_column("dense", 30)],
        "label": [tf.feature_column.numeric_column("label", 1)],
    }
    return efl.Sample(batches.get_next(), columns)


def loss_fn(model, sample):
    y = tf.layers.dense(sample["deep"], 1)
    model.add_metric("auc", efl.metrics.auc(sample["label"], tf.nn.sigmoid(y)))
    return tf.losses.sigmoid_cross_entropy(sample["label"], y)


LR = efl.Model()
LR.input_fn(input_fn)
LR.loss_fn(loss_fn)
LR.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1)))
LR.compile()
LR.fit(efl.procedure_fn.train(max_step=500), log_step=100, project_name="train")
