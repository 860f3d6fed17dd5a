"""The follower: has every image's right half, and the private key. Its embedding leaves this process encrypted only.

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
    with tf.variable_scope("follower", reuse=tf.AUTO_REUSE):
        own = common.embedding(sample["half"], FLAGS)
    keys = "public_key.json", "private_key.json"
    if FLAGS.layer == "dense":
        layer = efl.privacy.EncryptActiveDense(model.communicator, FLAGS.dim, *keys, FLAGS.units, FLAGS.learning_rate)
    else:
        layer = efl.privacy.EncryptActiveLayer(model.communicator, FLAGS.dim, *keys, FLAGS.learning_rate)
    return layer(own)  # the leader's gradient alone trains this half


def eval_fn(model, sample):
    model_fn(model, sample)


MODEL = efl.FederalModel()
MODEL.input_fn(common.Input(FLAGS, "follower")).loss_fn(model_fn).eval_fn(eval_fn)
common.run(MODEL, FLAGS)
