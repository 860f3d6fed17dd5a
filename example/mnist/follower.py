"""The follower: has every image's right half, sends its first layer to the leader, and learns by itself as
well.

    python leader.py --federal_role=leader          in one terminal
    python follower.py --federal_role=follower      in another

or ``efl run leader.py follower.py`` for both at once. The flags below go to both sides alike.
"""

import common
import tensorflow.compat.v1 as tf

import efl

FLAGS = common.flags(__doc__)


def input_fn(model, mode):
    part = "train" if mode == efl.MODE.TRAIN else "test"
    epochs = FLAGS.epochs if mode == efl.MODE.TRAIN else 1
    # A last batch of a few images would move the weights as far as a full one, so training leaves it out.
    dataio = efl.data.FederalDataIO(
        f"{FLAGS.data_dir}/follower_{part}", FLAGS.batch_size, model.communicator, model.federal_role, 0, 1,
        num_epochs=epochs, data_mode="local", drop_remainder=mode == efl.MODE.TRAIN,
    )  # fmt: skip
    dataio.fixedlen_feature("sample_id", 1, dtype=tf.int64)
    dataio.fixedlen_feature("feature", 14 * 28, dtype=tf.float32)
    dataio.fixedlen_feature("label", 1, dtype=tf.float32)
    features = dataio.read()
    model.add_hooks([dataio.get_hook()])
    columns = {
        "label": [tf.feature_column.numeric_column("label", 1)],
        "emb": [tf.feature_column.numeric_column("feature", 14 * 28)],
    }
    return efl.FederalSample(features, columns, model.federal_role, model.communicator, sample_id_name="sample_id")


def model_fn(model, sample, is_training):
    label = tf.reshape(tf.cast(sample["label"], tf.int32), [-1])

    fc1 = tf.layers.dense(sample["emb"], 128, kernel_initializer=tf.truncated_normal_initializer(stddev=0.001, seed=3))
    # With require_grad the leader's loss trains this layer too, through the gradient that comes back.
    model.send("fc1", fc1, require_grad=is_training)
    y = tf.layers.dense(fc1, 10, kernel_initializer=tf.truncated_normal_initializer(stddev=0.001, seed=4))

    accuracy = tf.metrics.accuracy(label, tf.argmax(y, axis=-1))
    model.add_metric("accuracy", accuracy)
    return tf.losses.softmax_cross_entropy(tf.one_hot(label, 10), y) if is_training else accuracy


def loss_fn(model, sample):
    with tf.variable_scope("net"):
        return model_fn(model, sample, True)


def eval_fn(model, sample):
    with tf.variable_scope("net", reuse=True):
        return model_fn(model, sample, False)


MNIST = efl.FederalModel()
MNIST.input_fn(input_fn)
MNIST.loss_fn(loss_fn)
MNIST.eval_fn(eval_fn)
# The pixels are raw, 0 to 255: with values of 0 to 1 the rate would be 0.1.
MNIST.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.001)))
MNIST.add_hooks(common.snapshots(FLAGS, "follower"), mode=efl.MODE.TRAIN)
MNIST.compile()
MNIST.fit(common.procedure(FLAGS), log_step=FLAGS.log_step, project_name="mnist")
common.save(MNIST, FLAGS.save, "follower")
