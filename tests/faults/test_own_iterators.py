"""Deaths in runs whose input is an iterator of the user's own."""

import pytest

from tests.faults.runs import PROLOGUE, Death, Federation, weights, write_data
from tests.federation.harness import run_both
from tests.federation.test_ends import both

STEPS = 20

# Files of both parties, shuffled over epochs with one seed, so that the rows of a step belong together.
NET = """
def input_fn(m, mode):
    spec = {"sample_id": tf.io.FixedLenFeature([1], tf.int64), "x": tf.io.FixedLenFeature([4], tf.float32)}
    columns = {"x": [tf.feature_column.numeric_column("x", 4)]}
    if ROLE == "leader":
        spec["label"] = tf.io.FixedLenFeature([1], tf.int64)
        columns["label"] = [tf.feature_column.numeric_column("label", 1)]
    data = tf.data.TFRecordDataset([f"{ROLE}_data/part-{part}.tfrecord" for part in range(3)])
    data = data.shuffle(70, seed=9).repeat().batch(10).map(lambda r: tf.io.parse_example(r, spec)).prefetch(2)
    features = KIND[ROLE](data).get_next()
    return efl.FederalSample(features, columns, m.federal_role, m.communicator, sample_id_name="sample_id")

def loss_fn(m, s):
    if ROLE == "follower":
        own = dense(s["x"], 4, 5, "own", tf.nn.relu)
        m.send("own", own, require_grad=True)
        return own
    other = within(tf.reshape(m.recv("own", require_grad=True), [-1, 5]), "train")
    h = tf.concat([dense(s["x"], 4, 5, "own", tf.nn.relu), other], axis=1)
    return cross_entropy(s["label"], dense(h, 10, 3, "top"))

initializable, one_shot = tf.data.make_initializable_iterator, tf.data.make_one_shot_iterator
KIND = {"leader": LEADER, "follower": FOLLOWER}
model = efl.FederalModel(peer_timeout=60.0, seed=3)
model.input_fn(input_fn).loss_fn(loss_fn)
model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.AdamOptimizer(0.01)))
model.add_hooks([Mortal("train")], mode=efl.MODE.TRAIN)
model.compile()
model.fit(efl.procedure_fn.train(max_step=STEPS), log_step=5, checkpoint_dir="checkpoints", save_checkpoint_steps=3)
np.savez(f"{ROLE}.npz", **model.get_weights())
""".replace("STEPS", str(STEPS))


def script(leader="initializable", follower="initializable"):
    return PROLOGUE + NET.replace("LEADER", leader).replace("FOLLOWER", follower)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    write_data(folder)
    federation = Federation(folder, script())
    federation.run({})
    assert "will not survive a restart" not in federation.told()
    return weights(folder)


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(["leader"], marks=pytest.mark.full),
        pytest.param(["follower"], marks=pytest.mark.full),
        ["leader", "follower"],
    ],
    ids="-".join,
)
def test_weights_are_those_of_the_undisturbed_run(tmp_path, alone, tally, victims):
    # Steps of the first and of the second epoch; one right after a checkpoint, one while it is written.
    deaths = [Death("after", "train", 5), Death("saving", "train", 9), Death("after", "train", 16)]
    write_data(tmp_path)
    federation = Federation(tmp_path, script())
    federation.run(dict.fromkeys(victims, deaths))
    assert sum(federation.starts.values()) == 2 + len(deaths) * len(victims), federation.told()
    tally.compare("kill -9, iterators of the user's own", len(deaths) * len(victims), weights(tmp_path), alone)


@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_who_survives_a_party_that_nothing_can_bring_back_ends_when_it_returns(tmp_path, victim):
    write_data(tmp_path)
    federation = Federation(tmp_path, script(follower="one_shot"))
    with pytest.raises(AssertionError):
        federation.run({victim: [Death("after", "train", 5)]}, timeout=60)
    reason = "the input of follower in train cannot go on after a restart, and the other party's can"
    for role in ("leader", "follower"):
        first = [*federation.outputs[role], federation.parties[role].output][0]
        assert f"{role}: This run cannot be recovered: {reason}" in first  # said when it began
        assert federation.parties[role].returncode not in (0, -9), federation.told()
    survivor = "follower" if victim == "leader" else "leader"
    last = {role: party.output.splitlines()[-1] for role, party in federation.parties.items()}
    lost = "was started again. This run cannot be recovered: " + reason
    assert last[survivor].startswith("efl.errors.PeerLost: ") and lost in last[survivor], federation.told()
    assert last[victim].startswith(f"efl.errors.HandshakeError: the {survivor} could not go on: PeerLost: ")
    assert lost in last[victim], federation.told()


@pytest.mark.parametrize("lacking", ["leader", "follower"])
def test_parties_of_which_one_input_cannot_go_on_are_refused(tmp_path, lacking):
    write_data(tmp_path)
    federation = Federation(tmp_path, script(**{lacking: "one_shot"}))
    with pytest.raises(AssertionError):
        federation.run({role: [Death("after", "train", 5)] for role in ("leader", "follower")})
    for role in ("leader", "follower"):
        told = federation.parties[role].output
        assert federation.parties[role].returncode not in (0, -9), federation.told()
        # At step 3, or after a restart, where one of them was still alive when the other came back.
        assert f"the input of {lacking} in train cannot go on " in told
        assert "and the other party's can: the rows would not belong together. Use efl.data.FederalDataIO" in told
    # The second to die may never have come to step 5: the first was started again, and both were refused.
    warned = [*federation.outputs[lacking], federation.parties[lacking].output][0]
    assert (
        f"{lacking}: the position of this input will not survive a restart, which begins it anew: train: One" in warned
    )


def test_one_shot_iterators_on_both_sides_begin_anew_after_a_restart_which_both_were_told(tmp_path):
    fit = "checkpoint_dir='ckpt', log_step=1"
    results = run_both(tmp_path, *[both("train(max_step=2)", fit=fit)] * 2)
    for role in ("leader", "follower"):
        (told,) = [line for line in results[role].output.splitlines() if "will not survive a restart" in line]
        assert f"{role}: the position of this input" in told
        assert "train: OneShotIterator (a one-shot iterator" in told
        assert "eval: OneShotIterator_1 (a one-shot iterator" in told
    results = run_both(tmp_path, *[both("train(max_step=4)", fit=fit)] * 2)
    assert "from the checkpoint of step 2" in results["leader"].output


INITIALIZABLE = """
def batches(rows=ROWS, epochs=None):
    data = tf.data.Dataset.from_tensor_slices((X[:rows], LABEL[:rows], IDS[:rows])).repeat(epochs).batch(BATCH)
    return tf.data.make_initializable_iterator(data).get_next()
"""


def test_both_train_on_other_data_only_with_another_checkpoint_dir_but_may_evaluate(tmp_path):
    fit = "checkpoint_dir='ckpt', log_step=1"
    run_both(tmp_path, *[INITIALIZABLE + both("train(max_step=2)", fit=fit)] * 2)
    other = {"leader_data": {"epochs": 5}, "follower_data": {"epochs": 5}, "fit": fit}
    results = run_both(tmp_path, *[INITIALIZABLE + both("train(max_step=4)", **other)] * 2, expect=(1, 1))
    # One of them comes to it first, and the other hears of it.
    told = results["leader"].output + results["follower"].output
    assert "train: IteratorV2: its position in the checkpoint does not fit its data set (" in told
    results = run_both(tmp_path, *[INITIALIZABLE + both("eval()", **other)] * 2)
    for role in ("leader", "follower"):
        assert "does not fit its data set" in results[role].output
        assert "; it begins anew" in results[role].output
