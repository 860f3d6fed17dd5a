"""A run of two is reproducible if each party is given a seed: initial weights, dropout, shuffling, the drawn tasks."""

import json

import numpy as np

from tests.data.records import example, write
from tests.federation import problem
from tests.federation.harness import run_both
from tests.federation.problem import load

RUN = """
def input_fn(m, mode):
    reader = efl.data.FederalDataIO(ROLE + '_rows', BATCH, m.communicator, ROLE, 0, 1, num_epochs=9, shuffle=True)
    reader.fixedlen_feature('id', 1, dtype=tf.int64)
    reader.fixedlen_feature('x', 4)
    reader.fixedlen_feature('label', 1, dtype=tf.int64)
    features = reader.read()
    m.add_hooks([reader.get_hook()])
    columns = {'x': [tf.feature_column.numeric_column('x', 4)], 'label': [tf.feature_column.numeric_column('label', 1)]}
    return efl.FederalSample(features, columns, ROLE, m.communicator, sample_id_name='id')
def loss_fn(m, s):
    h = tf.layers.dropout(tf.layers.dense(s['x'], 5, tf.tanh), 0.5, training=m.training_flag)
    if ROLE == 'follower':
        m.send('f', h, require_grad=True)
        return h
    f = m.recv('f', require_grad=True, shape=[None, 5])
    return cross_entropy(s['label'], tf.layers.dense(tf.concat([h, f], 1), 3))
model = efl.FederalModel(seed=SEEDS[ROLE])
for task in 'ab':
    model.input_fn(input_fn, task).loss_fn(loss_fn, task).optimizer_fn(optimizer(), task)
model.compile().fit(efl.procedure_fn.cotrain(train_step=2, max_iter=4), log_step=1)
"""


def run(folder, leader, follower):
    """Both parties' weights and the tasks that were drawn."""
    folder.mkdir()
    for role in ("leader", "follower"):
        x = problem.X[:, problem.COLUMNS[role]]
        rows = [{"id": i, "x": v, "label": y} for i, v, y in zip(problem.IDS, x, problem.LABEL, strict=True)]
        write(folder / f"{role}_rows" / "part-0", map(example, rows))
    seeds = {"leader": leader, "follower": follower}
    code = f"SEEDS = {seeds}\n" + RUN
    run_both(folder, code, code)
    drawn = [row["task"] for row in json.loads((folder / "leader.json").read_text())]
    return load(folder / "leader.npz"), load(folder / "follower.npz"), drawn


def same(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_the_seeds_of_both_make_a_run(tmp_path):
    leader, follower, drawn = run(tmp_path / "first", 5, 6)
    again = run(tmp_path / "again", 5, 6)
    assert same(leader, again[0])
    assert same(follower, again[1])
    assert drawn == again[2]
    # Each one's weights follow from the other's: another seed of either, or none, is another run for both.
    for seeds in ((7, 6), (5, None)):
        other = run(tmp_path / f"{seeds}", *seeds)
        assert not same(leader, other[0]), seeds
        assert not same(follower, other[1]), seeds
