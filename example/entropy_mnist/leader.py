"""The leader: has every image's left half and the label. It never sees what the follower makes of the right half.

    python generate_paillier_keypair.py             first, in the follower's folder; the leader gets public_key.json
    python leader.py --federal_role=leader          in one terminal
    python follower.py --federal_role=follower      in another

or ``efl run leader.py follower.py`` for both at once. The flags below go to both sides alike.
"""

import common
import tensorflow.compat.v1 as tf

import efl

FLAGS = common.flags(__doc__)


def model_fn(model, sample):
    with tf.variable_scope("leader", reuse=tf.AUTO_REUSE):
        own = common.embedding(sample["half"], FLAGS)
        if FLAGS.layer == "dense":
            layer = efl.privacy.EncryptPassiveDense(
                model.communicator, FLAGS.dim, FLAGS.dim, "public_key.json", FLAGS.units, FLAGS.learning_rate
            )
        else:
            layer = efl.privacy.EncryptPassiveLayer(
                model.communicator, FLAGS.dim, FLAGS.dim, "public_key.json", FLAGS.learning_rate
            )
        logits = tf.layers.dense(tf.tanh(layer(own)), 10, name="top")
    label = tf.reshape(tf.cast(sample["label"], tf.int32), [-1])
    model.add_metric("accuracy", tf.metrics.accuracy(label, tf.argmax(logits, -1)))
    return tf.losses.sparse_softmax_cross_entropy(label, logits)


def eval_fn(model, sample):
    model_fn(model, sample)


MODEL = efl.FederalModel()
MODEL.input_fn(common.Input(FLAGS, "leader")).loss_fn(model_fn).eval_fn(eval_fn)
common.run(MODEL, FLAGS)
if MODEL.history:
    print(f"leader: accuracy {MODEL.history[-1]['accuracy']:.4f} on test images")
else:
    print("leader: no step was taken: the lines above say why")
