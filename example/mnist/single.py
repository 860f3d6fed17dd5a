"""The same network in one process: on whole images, and on each half alone.

``whole`` is what ``leader.py`` and ``follower.py`` compute together, with the same initial weights: both
heads, both losses (its log shows their sum as ``loss``, and each). ``left`` and ``right`` are what each party
could do without the other.
"""

import common
import tensorflow.compat.v1 as tf

import efl

# Which parties' columns each model sees.
MODELS = {"whole": ("leader", "follower"), "left": ("leader",), "right": ("follower",)}

FLAGS = common.flags(__doc__, columns={"nargs": "+", "choices": MODELS, "default": list(MODELS)})


def read(role, mode):
    part = "train" if mode == efl.MODE.TRAIN else "test"
    epochs = FLAGS.epochs if mode == efl.MODE.TRAIN else 1
    dataio = efl.data.DataIO(
        f"{FLAGS.data_dir}/{role}_{part}", FLAGS.batch_size, 0, 1,
        num_epochs=epochs, name=role, drop_remainder=mode == efl.MODE.TRAIN,
    )  # fmt: skip
    dataio.fixedlen_feature("feature", 14 * 28, dtype=tf.float32)
    dataio.fixedlen_feature("label", 1, dtype=tf.float32)
    return dataio, dataio.read()


def make_input_fn(roles):
    def input_fn(model, mode):
        features, columns = {}, {}
        for role in roles:
            dataio, part = read(role, mode)
            model.add_hooks([dataio.get_hook()])
            features |= {role: part["feature"], "label": part["label"]}
            columns[role] = [tf.feature_column.numeric_column(role, 14 * 28)]
        columns["label"] = [tf.feature_column.numeric_column("label", 1)]
        return efl.Sample(features, columns)

    return input_fn


def dense(inputs, units, seed):
    return tf.layers.dense(inputs, units, kernel_initializer=tf.truncated_normal_initializer(stddev=0.001, seed=seed))


def make_model_fn(roles):
    def model_fn(model, sample, is_training):
        label = tf.reshape(tf.cast(sample["label"], tf.int32), [-1])
        heads, hidden = [], []
        if "follower" in roles:
            with tf.variable_scope("follower/net"):
                hidden.append(dense(sample["follower"], 128, seed=3))
                heads.append(dense(hidden[0], 10, seed=4))
        if "leader" in roles:
            with tf.variable_scope("leader/net"):
                hidden.insert(0, dense(sample["leader"], 128, seed=1))
                heads.append(dense(tf.concat(hidden, axis=-1), 10, seed=2))
        accuracy = tf.metrics.accuracy(label, tf.argmax(heads[-1], axis=-1))
        model.add_metric("accuracy", accuracy)
        if not is_training:
            return accuracy
        losses = [tf.losses.softmax_cross_entropy(tf.one_hot(label, 10), y) for y in heads]
        if len(losses) == 2:  # what the log calls loss is their sum; the parties' own logs show one each
            model.add_metric("loss_follower", losses[0])
            model.add_metric("loss_leader", losses[1])
        return tf.add_n(losses)

    def loss_fn(model, sample):
        with tf.variable_scope("single"):
            return model_fn(model, sample, True)

    def eval_fn(model, sample):
        with tf.variable_scope("single", reuse=True):
            return model_fn(model, sample, False)

    return loss_fn, eval_fn


for name in FLAGS.columns:
    roles = MODELS[name]
    with tf.Graph().as_default():
        loss_fn, eval_fn = make_model_fn(roles)
        model = efl.Model()
        model.input_fn(make_input_fn(roles))
        model.loss_fn(loss_fn)
        model.eval_fn(eval_fn)
        model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.001)))
        model.add_hooks(common.snapshots(FLAGS, name), mode=efl.MODE.TRAIN)
        model.compile()
        model.fit(common.procedure(FLAGS), log_step=FLAGS.log_step, project_name=f"mnist_{name}")
        common.save(model, FLAGS.save, name)
