"""The follower: turns 21 categories of every impression into one dense vector and sends it to the leader.

It has no label and no loss of its own: the gradient that the leader returns trains its embedding tables.

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
    common.need(FLAGS.data_dir / f"follower_{part}")
id_nums = common.read_id_nums(FLAGS)


def input_fn(model, mode):
    training = mode == efl.MODE.TRAIN
    dataio = efl.data.FederalDataIO(
        str(FLAGS.data_dir / ("follower_train" if training else "follower_test")), FLAGS.batch_size,
        model.communicator, model.federal_role, 0, 1, data_mode="local", num_epochs=FLAGS.epochs if training else 1,
    )  # fmt: skip
    dataio.fixedlen_feature("sample_id", 1, dtype=tf.int64)
    for i in range(len(id_nums)):
        dataio.fixedlen_feature(f"feature{i}", 1, dtype=tf.string)
    features = dataio.read()
    model.add_hooks([dataio.get_hook()])
    columns = {
        "embedding": [
            tf.feature_column.embedding_column(
                tf.feature_column.categorical_column_with_hash_bucket(f"feature{i}", id_nums[i]),
                dimension=8,
                combiner="mean",
            )
            for i in range(len(id_nums))
        ]
    }
    return efl.FederalSample(
        features, columns, model.federal_role, model.communicator,
        sample_id_name="sample_id", name="train" if training else "eval",
    )  # fmt: skip


def loss_fn(model, sample):
    embedding = sample["embedding"]
    model.send("embedding", embedding, require_grad=True)
    return embedding  # what is sent: there is no loss here


def eval_fn(model, sample):
    model.send("embedding", sample["embedding"])


CTR = efl.FederalModel()
CTR.input_fn(input_fn)
CTR.loss_fn(loss_fn)
CTR.eval_fn(eval_fn)
CTR.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.AdagradOptimizer(FLAGS.learning_rate)))
CTR.compile()
CTR.fit(common.procedure(FLAGS), log_step=FLAGS.log_step, project_name="criteo")
