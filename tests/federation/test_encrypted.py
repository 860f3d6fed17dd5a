"""Encrypted layers between two processes, with real keys: the model of one process, to fixed point; and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import efl  # noqa: F401  (puts TensorFlow into graph mode)

import tensorflow.compat.v1 as tf  # isort: skip
from efl.paillier import PrivateKey
from tests.federation import problem
from tests.federation.harness import run_both
from tests.federation.problem import cross_entropy, dense, load, start_value

STEPS, UNITS, RATE = 20, 4, 0.5
LAYERS = {
    "dense": (
        "efl.privacy.EncryptPassiveDense(m.communicator, 5, 5, 'public_key.json', 4, 0.5, START)",
        "efl.privacy.EncryptActiveDense(m.communicator, 5, 'public_key.json', 'private_key.json', 4, 0.5)",
    ),
    "concat": (
        "efl.privacy.EncryptPassiveLayer(m.communicator, 5, 5, 'public_key.json', 0.5, START)",
        "efl.privacy.EncryptActiveLayer(m.communicator, 5, 'public_key.json', 'private_key.json', 0.5)",
    ),
}
LEADER = """
START = lambda shape, dtype=tf.float32, partition_info=None: tf.constant(start_value('hetero', shape))
batch = batches()
def net(m, s):
    h = dense(s['x'], 4, 5, 'left', tf.tanh)
    z = LAYER(h)
    return dense(tf.tanh(z), z.shape[1], 3, 'top')
def loss_fn(m, s):
    return cross_entropy(s['label'], net(m, s))
def eval_fn(m, s):
    m.add_metric('loss_there', tf.metrics.mean(cross_entropy(s['label'], net(m, s))))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).eval_fn(eval_fn).optimizer_fn(optimizer(0.5))
model.compile().fit(efl.procedure_fn.train_and_evaluate(20, 2, max_iter=1))
"""
FOLLOWER = """
batch = batches()
def net(m, s):
    return LAYER(dense(s['x'], 4, 5, 'right', tf.tanh))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(net).eval_fn(net).optimizer_fn(optimizer(0.5))
model.compile().fit(efl.procedure_fn.train_and_evaluate(20, 2, max_iter=1))
"""
SAVE = """
raw = model.session.raw_session()
with raw.graph.as_default():
    held = raw.run({v.op.name: v for v in tf.global_variables() if "efl_" not in v.op.name})
np.savez(ROLE + ".npz", **{name.replace("/", "|"): value for name, value in held.items()})
"""


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of one pair of keys."""
    folder = tmp_path_factory.mktemp("keys")
    private = PrivateKey.generate(2048)
    private.save(folder / "private_key.json")
    private.public.save(folder / "public_key.json")
    return folder


@pytest.fixture
def folder(tmp_path: Path, pair: Path) -> Path:
    for file in pair.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def scripts(kind: str) -> tuple[str, str]:
    passive, active = LAYERS[kind]
    return LEADER.replace("LAYER(", f"{passive}("), FOLLOWER.replace("LAYER(", f"{active}(")


def joint(kind: str, momentum: float = 0.0) -> dict[str, np.ndarray]:
    """The same model in one process, of plain TensorFlow."""
    tf.reset_default_graph()
    x, label, _ = problem.batches()
    left, right = dense(x[:, :4], 4, 5, "left", tf.tanh), dense(x[:, 4:], 4, 5, "right", tf.tanh)
    shape = (5, UNITS) if kind == "dense" else (5,)
    w1, w2 = (tf.get_variable(f"hetero/{name}", initializer=start_value("hetero", shape)) for name in ("w1", "w2"))
    z = left @ w1 + right @ w2 if kind == "dense" else tf.concat([left * w1, right * w2], 1)
    loss = cross_entropy(label, dense(tf.tanh(z), z.shape[1], 3, "top"))
    others = [v for v in tf.trainable_variables() if v is not w2]
    train = tf.group(
        tf.train.GradientDescentOptimizer(RATE).minimize(loss, var_list=others),
        tf.train.MomentumOptimizer(RATE, momentum).minimize(loss, var_list=[w2]),
    )
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(STEPS):
            session.run(train)
        return session.run({v.op.name: v for v in tf.trainable_variables()})


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Of both parties; the shared ones put together, as neither can."""
    leader, follower = load(folder / "leader.npz"), load(folder / "follower.npz")
    shared = (leader.pop("hetero/share") + follower.pop("hetero/share")) * 2.0**-16
    return {**leader, **follower, "hetero/w2": shared}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_training_is_that_of_one_process(folder: Path, kind: str) -> None:
    results = run_both(folder, *scripts(kind), end=SAVE)
    expected = joint(kind)
    got = weights(folder)
    start = start_value("hetero", expected["hetero/w2"].shape)
    moved = np.abs(expected["hetero/w2"] - start).max()
    assert moved > 0.05
    for name, value in expected.items():
        # A step's noise, of a deviation of 2.4e-4 in Z and of 1.2e-4 of the largest dY in dX, moves a weight by a tenth
        # of that; the update of W is rounded to 1.5e-5. They are random, and add up as the root of 20 steps.
        np.testing.assert_allclose(got[name], value, atol=1e-3, rtol=0, err_msg=name)
    assert "PrivacyWarning" in results["leader"].output  # of the initializer
    assert "the first batch" in results["leader"].output or "of that batch" in results["leader"].output
    assert "the leader has given it weights that it knows" in results["follower"].output
    assert results["leader"].output.count("mode=eval") == 1
    assert "were clipped" not in results["leader"].output


def test_momentum_of_the_shared_weights_is_that_of_one_process(folder: Path) -> None:
    leader, follower = (text.replace("4, 0.5", "4, 0.5, momentum=0.5, ") for text in scripts("dense"))
    leader = leader.replace("momentum=0.5, , START", "START, momentum=0.5")
    run_both(folder, leader, follower.replace(", )", ")"), end=SAVE)
    got, expected = weights(folder), joint("dense", 0.5)
    assert np.abs(expected["hetero/w2"] - joint("dense")["hetero/w2"]).max() > 0.05
    for name in ("hetero/w2", "right/kernel"):
        np.testing.assert_allclose(got[name], expected[name], atol=2e-3, rtol=0, err_msg=name)


def test_another_learning_rate_is_another_run(folder: Path) -> None:
    """So that the comparison above can fail."""
    leader, follower = (text.replace("4, 0.5", "4, 0.4") for text in scripts("dense"))
    run_both(folder, leader, follower, end=SAVE)
    assert np.abs(weights(folder)["hetero/w2"] - joint("dense")["hetero/w2"]).max() > 1e-2


THREE = """
batch = batches()
def net(m, s):
    h = dense(s['x'], 4, 5, ROLE, tf.tanh)
    outs = []
    for name in ("one", "two", "three"):
        if ROLE == "leader":
            outs.append(efl.privacy.EncryptPassiveDense(m.communicator, 5, 5, "public_key.json", 2, name=name)(h))
        else:
            h = efl.privacy.EncryptActiveDense(
                m.communicator, 5, "public_key.json", "private_key.json", 2, name=name)(h)
    if ROLE == "follower":
        return h
    return cross_entropy(s['label'], dense(tf.concat(outs, 1), 6, 3, 'top'))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(net).optimizer_fn(optimizer(0.5))
config = tf.ConfigProto(inter_op_parallelism_threads=1, intra_op_parallelism_threads=1)
model.compile(session_config=config).fit(efl.procedure_fn.train(max_step=4))
print("weights: ", len(model.get_weights()))
"""


def test_three_layers_on_one_thread_in_a_script_without_a_guard(folder: Path) -> None:
    results = run_both(folder, THREE, THREE, end="print('the end of the script')\n")
    for role, weights_held in (("leader", 7), ("follower", 2)):
        output = results[role].output
        assert f"weights:  {weights_held}" in output
        assert output.count("the end of the script") == 1  # no worker has run it too


def refused(folder: Path, leader: str, follower: str, *texts: str) -> None:
    """Both parties end with an error, soon, and the texts are in what they say."""
    results = run_both(folder, leader, follower, expect=None, timeout=60)
    assert all(result.returncode == 1 for result in results.values())
    told = "".join(result.output for result in results.values())
    for text in texts:
        assert text in told, told
    for result in results.values():
        assert "efl.errors." in result.output, result.output


@pytest.mark.parametrize(
    ("there", "here", "texts"),
    [
        (" 5, '", " 6, '", ["encrypted/hetero/follower_dim"]),
        ("json', 4, 0.5", "json', 3, 0.5", ["encrypted/hetero/outputs"]),
        ("json', 4, 0.5", "json', 4, 0.25", ["encrypted/hetero/learning_rate"]),
        ("4, 0.5)", "4, 0.5, output_limit=128.0)", ["encrypted/hetero/output_limit"]),
        ("4, 0.5)", "4, 0.5, output_limit=100.0)", ["output_limit=100.0: expected a power of two"]),
        ("4, 0.5)", "4, 0.5, 'other')", ["hetero", "other"]),
        ("private_key", "public_key", ["this is a key of the public kind; expected the private key"]),
        ("'public_key", "'no_key", ["no_key.json", "cannot be read", "gives public_key.json to the other"]),
        ("EncryptActiveDense(m.communicator, 5, 'public_key.json', 'private_key.json', 4, 0.5)",
         "EncryptPassiveDense(m.communicator, 5, 5, 'public_key.json', 4, 0.5)",
         ["EncryptPassiveDense is the leader's end of an encrypted layer, and this party is 'follower'"]),
        ("return efl", "m.send('h', dense(s['x'], 4, 5, 'right'))\n    return efl", ["'train/h'"]),
        ("LAYER", "None", []),
    ],
    ids=["dim", "units", "rate", "limit", "bad limit", "name", "public for private", "no file", "role", "send", "none"],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused_by_both(
    folder: Path, there: str, here: str, texts: list[str]
) -> None:
    leader, follower = scripts("dense")
    if there == "LAYER":
        changed = follower.replace(LAYERS["dense"][1], "tf.identity")
        texts = ["hetero"]
    else:
        changed = follower.replace(there, here)
    assert changed != follower
    refused(folder, leader, changed, *texts)


def test_keys_of_two_pairs_are_refused(folder: Path) -> None:
    leader, follower = scripts("dense")
    PrivateKey.generate(2048).public.save(folder / "theirs.json")
    refused(folder, leader.replace("public_key", "theirs"), follower, "encrypted/hetero/key")
    refused(folder, leader, follower.replace("'public_key", "'theirs"), "give the two files of one pair")


def test_an_embedding_beyond_the_range_ends_both_and_what_is_saved_stays(folder: Path) -> None:
    leader, follower = scripts("dense")
    step = "tf.cast(tf.train.get_or_create_global_step(), tf.float32)"
    wild = follower.replace(
        "(dense(s['x'], 4, 5, 'right', tf.tanh))",
        f"(dense(s['x'], 4, 5, 'right', tf.tanh) * tf.maximum(1.0, 9 * ({step} - 3)))",
    )
    keep = "max_iter=1), checkpoint_dir='checkpoints', save_checkpoint_steps=2)"
    leader, wild = (text.replace("max_iter=1))", keep) for text in (leader, wild))
    assert wild != follower
    refused(folder, leader, wild, "encrypted layer 'hetero': its input: ", "values are larger than 32 in magnitude")
    for role in ("leader", "follower"):
        (store,) = (folder / "checkpoints").glob(f"**/{role}") or [None]
        assert sorted(path.name for path in store.rglob("step-*"))


def test_the_same_layer_twice_in_a_mode(folder: Path) -> None:
    leader, follower = scripts("dense")
    twice = leader.replace("    z = efl", "    z = 0 * tf.reduce_sum(h)\n    for i in range(2): z += efl")
    results = run_both(folder, twice, follower, expect=None, timeout=60)
    assert "exists already in train" in results["leader"].output
    assert results["leader"].returncode == results["follower"].returncode == 1


def test_a_private_optimizer_is_refused(folder: Path) -> None:
    leader, follower = scripts("dense")
    private = "efl.optimizer_fn.optimizer_setter(efl.DPGradientDescentGaussianOptimizer(1.0, 1.0, learning_rate=0.5))"
    refused(folder, leader.replace("optimizer(0.5)", private), follower, "beside the encrypted layer 'hetero'")


def test_warnings_name_what_is_not_protected(folder: Path) -> None:
    leader, follower = scripts("concat")
    follower = follower.replace("private_key.json', 0.5)", "private_key.json', 0.5, update_noise=False)")
    short = [text.replace("train_and_evaluate(20, 2, max_iter=1)", "train(max_step=1)") for text in (leader, follower)]
    results = run_both(folder, *short)
    for output in (results["leader"].output, results["follower"].output):
        assert "PrivacyWarning: an encrypted layer that multiplies each column by one weight" in output
        assert ".py:" in output.split("PrivacyWarning")[0].splitlines()[-1] and "efl/privacy" not in output
    assert "update_noise=False: changes nothing here" in results["follower"].output


SLOW = """
import time
from efl.paillier.engine import Engine
plain = Engine.matmul
def matmul(self, *arguments):
    end = time.monotonic() + 3.0
    while time.monotonic() < end:
        time.sleep(0.1)
        self.progress(0.5)
    return plain(self, *arguments)
Engine.matmul = matmul
"""


def test_a_long_step_says_so_and_nobodys_deadline_runs_out(folder: Path) -> None:
    model = "efl.FederalModel(default_timeout_milliseconds=1500, scanning_interval_milliseconds=200)"
    leader, follower = (text.replace("efl.FederalModel()", model) for text in scripts("dense"))
    leader, follower = (
        text.replace("train_and_evaluate(20, 2, max_iter=1)", "train(max_step=1)") for text in (leader, follower)
    )
    results = run_both(folder, SLOW + leader, follower)
    told = results["leader"].output
    assert "leader: layer 'hetero' has been computing for " in told and "in step 1 of train" in told
    # The same, if the leader did not say that it is busy: the deadline of the follower is what it was.
    silent = SLOW + "from efl._steps.exchange import Exchange\n"
    silent += "Exchange.busy = lambda self, scope, step: None\n"
    results = run_both(folder, silent + leader, follower, expect=None)
    assert "DeadlineError" in results["follower"].output or "DeadlineError" in results["leader"].output


TASKS = """
batch = batches()
def net(m, s):
    h = dense(s['x'], 4, 5, ROLE, tf.tanh)
    z = LAYER
    return z if ROLE == "follower" else cross_entropy(s['label'], dense(z, 4, 3, 'top'))
model = efl.FederalModel()
for task in ("one", "two"):
    model.input_fn(lambda m, mode: sample(m, batch, ROLE), task=task).loss_fn(net, task=task)
    model.optimizer_fn(optimizer(0.5), task=task)
model.compile().fit(efl.procedure_fn.cotrain(4, None, 2))
"""


def test_tasks_share_the_weights_of_a_layer(folder: Path) -> None:
    passive, active = (text.replace(", START", "") for text in LAYERS["dense"])
    run_both(folder, TASKS.replace("LAYER", f"{passive}(h)"), TASKS.replace("LAYER", f"{active}(h)"), end=SAVE)
    leader, follower = load(folder / "leader.npz"), load(folder / "follower.npz")
    assert leader["hetero/tag"].any() and np.array_equal(leader["hetero/tag"], follower["hetero/tag"])
    assert np.abs(leader["hetero/share"] + follower["hetero/share"]).max() < 2**18  # W, below 4
