"""The leader: predicts clicks from its own 10 numbers and the vector that the follower made of 21 categories.

    python criteo_dp_leader_dense.py --federal_role=leader          in one terminal
    python criteo_dp_follower_dense.py --federal_role=follower      in another

or ``efl run criteo_dp_leader_dense.py criteo_dp_follower_dense.py`` for both. The flags below go to both
sides alike.
"""

import common
import tensorflow.compat.v1 as tf

import efl

FLAGS = common.flags(__doc__)

for part in ("train", "test"):
    common.need(FLAGS.data_dir / f"leader_{part}")


def input_fn(model, mode):
    training = mode == efl.MODE.TRAIN
    dataio = efl.data.FederalDataIO(
        str(FLAGS.data_dir / ("leader_train" if training else "leader_test")), FLAGS.batch_size,
        model.communicator, model.federal_role, 0, 1, data_mode="local", num_epochs=FLAGS.epochs if training else 1,
    )  # fmt: skip
    dataio.fixedlen_feature("sample_id", 1, dtype=tf.int64)
    dataio.fixedlen_feature("label", 1, dtype=tf.int64)
    dataio.fixedlen_feature("dense", 10, dtype=tf.float32)
    features = dataio.read()
    model.add_hooks([dataio.get_hook()])
    columns = {
        "dense": [tf.feature_column.numeric_column("dense", 10)],
        "label": [tf.feature_column.numeric_column("label", 1)],
    }
    return efl.FederalSample(
        features, columns, model.federal_role, model.communicator,
        sample_id_name="sample_id", name="train" if training else "eval",
    )  # fmt: skip


def model_fn(model, sample, is_training):
    embedding = model.recv("embedding", dtype=tf.float32, require_grad=is_training)
    embedding = tf.reshape(embedding, [-1, 21 * 8])  # what arrives has no static shape
    fc1 = tf.layers.dense(tf.concat([sample["dense"], embedding], axis=1), 128, activation="relu")
    fc2 = tf.layers.dense(fc1, 64, activation="relu")
    y = tf.layers.dense(fc2, 1)
    if is_training:
        return tf.losses.sigmoid_cross_entropy(sample["label"], y)
    auc = efl.metrics.auc(sample["label"], tf.nn.sigmoid(y))
    model.add_metric("auc", auc, efl.MODE.EVAL)
    return auc


def loss_fn(model, sample):
    with tf.variable_scope("ctr"):
        return model_fn(model, sample, True)


def eval_fn(model, sample):
    with tf.variable_scope("ctr", reuse=True):
        return model_fn(model, sample, False)


CTR = efl.FederalModel()
CTR.input_fn(input_fn)
CTR.loss_fn(loss_fn)
CTR.eval_fn(eval_fn)
CTR.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.AdagradOptimizer(FLAGS.learning_rate)))
CTR.compile()
CTR.fit(common.procedure(FLAGS), log_step=FLAGS.log_step, project_name="criteo")
