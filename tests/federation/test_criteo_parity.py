"""The click model: embeddings at the follower, dense columns and the label at the leader, read from records.

The reference is one process of plain TensorFlow with ``tf.feature_column`` over the same rows.
"""

import numpy as np

import efl  # noqa: F401  (puts TensorFlow into graph mode)

import tensorflow.compat.v1 as tf  # isort: skip
from tests.federation.harness import assert_same_weights, run_both
from tests.federation.problem import dense, load, start_value

ROWS, BATCH, BUCKETS, WIDTH, NAMES = 70, 16, 11, 4, ("c0", "c1", "c2")

READ = """
from tests.federation.test_criteo_parity import *

def read(model, mode, folder):
    dataio = efl.data.FederalDataIO(folder, BATCH, model.communicator, model.federal_role, 0, 1,
                                    data_mode='local', num_epochs=2)
    dataio.fixedlen_feature('sample_id', 1, dtype=tf.int64)
    return dataio
def optimizer():
    return efl.optimizer_fn.optimizer_setter(tf.train.AdagradOptimizer(0.1))
"""
LEADER = (
    READ
    + """
def input_fn(model, mode):
    dataio = read(model, mode, 'leader')
    dataio.fixedlen_feature('dense', 5, dtype=tf.float32)
    dataio.fixedlen_feature('label', 1, dtype=tf.int64)
    features = dataio.read()
    model.add_hooks([dataio.get_hook()])
    columns = {'dense': [tf.feature_column.numeric_column('dense', 5)],
               'label': [tf.feature_column.numeric_column('label', 1)]}
    return efl.FederalSample(features, columns, model.federal_role, model.communicator, sample_id_name='sample_id',
                             name='train' if mode == efl.MODE.TRAIN else 'eval')
def net(model, sample, training):
    emb = tf.reshape(model.recv('emb', require_grad=training), [-1, len(NAMES) * WIDTH])
    return logits(sample['dense'], emb), sample['label']
def loss_fn(model, sample):
    return tf.losses.sigmoid_cross_entropy(*reversed(net(model, sample, True)))
def eval_fn(model, sample):
    y, label = net(model, sample, False)
    model.add_metric('auc', efl.metrics.auc(label, tf.nn.sigmoid(y)))
    model.add_metric('loss_', tf.metrics.mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=label, logits=y)))
model = efl.FederalModel()
model.input_fn(input_fn).loss_fn(loss_fn).eval_fn(eval_fn).optimizer_fn(optimizer()).compile()
model.fit(efl.procedure_fn.train_and_evaluate(train_step=4, max_iter=2), log_step=100)
"""
)
FOLLOWER = (
    READ
    + """
def input_fn(model, mode):
    dataio = read(model, mode, 'follower')
    for name in NAMES:
        dataio.fixedlen_feature(name, 1, dtype=tf.string)
    features = dataio.read()
    model.add_hooks([dataio.get_hook()])
    return efl.FederalSample(features, {'embedding': embedding_columns()}, model.federal_role, model.communicator,
                             sample_id_name='sample_id', name='train' if mode == efl.MODE.TRAIN else 'eval')
def loss_fn(model, sample):
    model.send('emb', sample['embedding'], require_grad=True)
    return sample['embedding']
def eval_fn(model, sample):
    model.send('emb', sample['embedding'])
model = efl.FederalModel()
model.input_fn(input_fn).loss_fn(loss_fn).eval_fn(eval_fn).optimizer_fn(optimizer()).compile()
model.set_weights({v.op.name: start_value(column_of(v.op.name), (BUCKETS, WIDTH)) for v in tf.trainable_variables()})
model.fit(efl.procedure_fn.train_and_evaluate(train_step=4, max_iter=2), log_step=100)
"""
)


def rows():
    rng = np.random.RandomState(3)
    numbers = rng.normal(size=(ROWS, 5)).astype(np.float32)
    words = rng.randint(0, 30, (ROWS, len(NAMES)))
    label = (numbers[:, 0] + (words[:, 0] % 2) > 0.5).astype(np.int64)
    return numbers, words, label


def embedding_columns():
    return [
        tf.feature_column.embedding_column(
            tf.feature_column.categorical_column_with_hash_bucket(name, BUCKETS), dimension=WIDTH, combiner="mean"
        )
        for name in NAMES
    ]


def column_of(variable):
    return next(name for name in NAMES if f"{name}_embedding" in variable)


def logits(numbers, embedded):
    hidden = dense(tf.concat([numbers, embedded], 1), 5 + len(NAMES) * WIDTH, 6, "hidden", tf.nn.relu)
    return dense(hidden, 6, 1, "out")


def write(folder, features_of):
    folder.mkdir()
    for block in range(3):
        with tf.io.TFRecordWriter(str(folder / f"part-{block}.tfrecord")) as writer:
            for row in range(block, ROWS, 3):
                features = {
                    "sample_id": tf.train.Feature(int64_list=tf.train.Int64List(value=[row])),
                    **features_of(row),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


def test_embeddings_from_records_train_and_evaluate_as_in_one_process(tmp_path):
    numbers, words, label = rows()
    write(
        tmp_path / "leader",
        lambda r: {
            "dense": tf.train.Feature(float_list=tf.train.FloatList(value=numbers[r])),
            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label[r]])),
        },
    )
    write(
        tmp_path / "follower",
        lambda r: {
            name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"w%d" % words[r, i]]))
            for i, name in enumerate(NAMES)
        },
    )
    run_both(tmp_path, LEADER, FOLLOWER)

    order = [row for block in range(3) for row in range(block, ROWS, 3)] * 2  # the files' rows, two epochs
    tf.reset_default_graph()
    index = tf.placeholder(tf.int32, [None])
    table = {name: tf.gather([f"w{w}" for w in words[:, i]], index) for i, name in enumerate(NAMES)}
    embedded = tf.feature_column.input_layer({n: t[:, None] for n, t in table.items()}, embedding_columns())
    y = logits(tf.gather(numbers, index), embedded)
    target = tf.cast(tf.gather(label, index), tf.float32)[:, None]
    loss = tf.losses.sigmoid_cross_entropy(target, y)
    train = tf.train.AdagradOptimizer(0.1).minimize(loss)
    evaluations = []
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        tables = {column_of(v.op.name): v for v in tf.trainable_variables() if "embedding" in v.op.name}
        for name, variable in tables.items():
            variable.load(start_value(name, (BUCKETS, WIDTH)), session)
        for step in range(8):
            session.run(train, {index: order[step * BATCH : (step + 1) * BATCH]})
            if step % 4 == 3:
                evaluations.append(session.run(loss, {index: range(ROWS)}))
        expected = session.run({v.op.name: v for v in tf.trainable_variables() if "embedding" not in v.op.name})
        expected_tables = session.run(tables)

    assert_same_weights(load(tmp_path / "leader.npz"), expected)
    got = {column_of(name): value for name, value in load(tmp_path / "follower.npz").items()}
    assert_same_weights(got, expected_tables)
    assert all(np.abs(expected_tables[n] - start_value(n, (BUCKETS, WIDTH))).max() > 0.01 for n in NAMES)

    import json

    history = json.loads((tmp_path / "leader.json").read_text())
    evaluated = [row["loss_"] for row in history if row["mode"] == "eval"]
    np.testing.assert_allclose(evaluated, evaluations, rtol=1e-4)  # evaluation uses the trained tables
    assert sum(row["mode"] == "eval" for row in history) == 2
