"""Encrypted layers, further cases: two in one model, shares of other runs, what is refused, what is warned of."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import efl  # noqa: F401  (puts TensorFlow into graph mode)

import tensorflow.compat.v1 as tf  # isort: skip
from tests.federation import problem
from tests.federation.harness import run_both
from tests.federation.problem import cross_entropy, dense, load, start_value
from tests.federation.test_encrypted import FOLLOWER, LAYERS, LEADER, SAVE, refused
from tests.paillier.keypairs import key

ONE_STEP = "train(max_step=1)"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with the files of one pair of keys."""
    key().save(tmp_path / "private_key.json")
    key().public.save(tmp_path / "public_key.json")
    return tmp_path


def scripts(procedure: str = ONE_STEP) -> tuple[str, str]:
    """Of the dense layer."""
    texts = [text.replace("train_and_evaluate(20, 2, max_iter=1)", procedure) for text in (LEADER, FOLLOWER)]
    leader, follower = (text.replace("LAYER(", f"{layer}(") for text, layer in zip(texts, LAYERS["dense"]))
    return leader, follower


# ---- two layers, of both kinds, one of float64; a last batch of half the rows; evaluation; the follower's own loss

TWO = """
START = lambda shape, dtype=tf.float32, partition_info=None: tf.constant(start_value('hetero', shape), dtype)
data = {mode: batches(40, 1) for mode in efl.MODE}  # 16, 16 and 8 rows
def wide(h):
    return tf.cast(h, tf.float64)
def net(m, s):
    h = dense(s['x'], 4, 5, ROLE, tf.tanh)
    args = m.communicator, 5
    if ROLE == "leader":
        z = efl.privacy.EncryptPassiveDense(*args, 5, "public_key.json", 4, 0.5, START, name="first")(h)
        c = efl.privacy.EncryptPassiveLayer(*args, 5, "public_key.json", 0.5, START, name="second")(wide(h))
        h = tf.tanh(tf.concat([z, tf.cast(c, tf.float32)], 1))
    else:
        files = "public_key.json", "private_key.json"
        h = efl.privacy.EncryptActiveDense(*args, *files, 4, 0.5, name="first")(h)
        h = tf.cast(efl.privacy.EncryptActiveLayer(*args, *files, 0.5, name="second")(wide(h)), tf.float32)
    return cross_entropy(s['label'], dense(h, h.shape[1], 3, ROLE + "_top"))
def evaluate(m, s):
    m.add_metric('there', tf.metrics.mean(net(m, s)))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, data[mode], ROLE)).loss_fn(net).eval_fn(evaluate).optimizer_fn(optimizer(0.5))
model.compile().fit(efl.procedure_fn.train_and_evaluate(max_iter=1))
"""


def both_kinds() -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The same in one process of plain TensorFlow: final weights, and the mean of the losses of evaluation."""
    tf.reset_default_graph()
    x, label = tf.placeholder(tf.float32, [None, 8]), tf.placeholder(tf.int64, [None])
    left, right = dense(x[:, :4], 4, 5, "leader", tf.tanh), dense(x[:, 4:], 4, 5, "follower", tf.tanh)
    w = {
        f"{layer}/{name}": tf.get_variable(f"{layer}/{name}", initializer=start_value("hetero", shape))
        for layer, shape in (("first", (5, 4)), ("second", (5,)))
        for name in ("w1", "w2")
    }
    z = left @ w["first/w1"] + right @ w["first/w2"]
    h = tf.tanh(tf.concat([z, left * w["second/w1"], right * w["second/w2"]], 1))
    losses = {
        "leader": cross_entropy(label, dense(h, 14, 3, "leader_top")),
        "follower": cross_entropy(label, dense(right, 5, 3, "follower_top")),
    }
    train = tf.train.GradientDescentOptimizer(0.5).minimize(tf.add_n(list(losses.values())))
    feeds = [{x: problem.X[rows], label: problem.LABEL[rows]} for rows in map(slice, (0, 16, 32), (16, 32, 40))]
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for feed in feeds:
            session.run(train, feed)
        told = [session.run(losses, feed) for feed in feeds]
        means = {role: float(np.mean([each[role] for each in told])) for role in losses}
        return session.run({v.op.name: v for v in tf.trainable_variables()}), means


def test_two_layers_of_one_model_train_and_are_evaluated(keys: Path) -> None:
    results = run_both(keys, TWO, TWO, end=SAVE)
    expected, losses = both_kinds()
    leader, follower = load(keys / "leader.npz"), load(keys / "follower.npz")
    shared = {
        f"{name}/w2": (leader[f"{name}/share"] + follower[f"{name}/share"]) * 2.0**-16 for name in ("first", "second")
    }
    got = {**leader, **follower, **shared}
    for name, value in expected.items():
        # Of the x that W's gradient is made of, 8 bits of fraction are kept: a deviation of 1.1e-3 of learning_rate·dY,
        # which is about 0.01 for each of 16 rows: 5e-5 in a step. Other errors are smaller.
        np.testing.assert_allclose(got[name], value, atol=1e-3, rtol=0, err_msg=name)
    for role, loss in losses.items():
        (told,) = re.findall(r" mode=eval .*\bthere=(\S+)", results[role].output)
        assert float(told) == pytest.approx(loss, abs=1e-3)  # the log has five digits
    tags = {(role["first/tag"].tobytes(), role["second/tag"].tobytes()) for role in (leader, follower)}
    ((first, second),) = tags
    assert first != second and any(first) and any(second)


# ---- shares that are not of one another

SAVED = f"{ONE_STEP}, checkpoint_dir='checkpoints'"


def test_a_checkpoint_of_another_run_is_refused(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for file in keys.glob("*.json"):
        shutil.copy(file, other)
    for folder in (keys, other):
        run_both(folder, *scripts(SAVED), end="")
    shutil.rmtree(keys / "checkpoints" / "follower")
    shutil.copytree(other / "checkpoints" / "follower", keys / "checkpoints" / "follower")
    refused(keys, *scripts(SAVED), "the parties hold no checkpoint of the same run and step")


def test_a_share_of_another_run_is_met_before_anything_is_computed_with_it(keys: Path) -> None:
    """As it would be, were a checkpoint's files put together so that nothing else tells."""
    leader, follower = scripts("train(max_step=3)")
    stranger = """
class Stranger(tf.train.SessionRunHook):
    def begin(self):
        (tag,) = (v for v in tf.global_variables() if v.op.name == "hetero/tag")
        self.change = tag.assign(tf.fill([32], tf.constant(7, tf.uint8)))
        self.steps = 0
    def after_run(self, context, values):
        self.steps += 1
        if self.steps == 2:
            context.session.run(self.change)
model.add_hooks([Stranger()], mode=efl.MODE.TRAIN)
model.compile()"""
    changed = follower.replace("model.compile()", stranger.lstrip("\n"))
    assert changed != follower
    refused(keys, leader, changed, "at step 3 of train", "the parties' shares of its weights are not of one another")


# ---- what is refused

PASSIVE, ACTIVE = LAYERS["dense"]
PRIVATE = "efl.optimizer_fn.optimizer_setter(efl.DPGradientDescentGaussianOptimizer(1.0, 1.0, learning_rate=0.5))"


@pytest.mark.parametrize(
    ("role", "there", "here", "text"),
    [
        ("leader", PASSIVE, ACTIVE, "EncryptActiveDense is the follower's end of an encrypted layer, and"),
        ("leader", "z = efl", "z = h[:, :4]  # ", "hetero: the follower has it, the leader has none of that name"),
        ("leader", "return cross", "return 0.0 / tf.constant(0.0) * cross", "NaN or infinite: is the loss?"),
        ("follower", "tf.tanh)", "tf.tanh) / tf.constant(0.0)", "its input: 80 of 80 values are NaN or infinite"),
        ("follower", "tf.tanh)", "tf.sign) * 30.0", "decrypted numbers are beyond 2^33 units"),
        ("leader", "start_value('hetero', shape)", "np.full(shape, np.nan, 'f')", "gives weights that are NaN"),
        ("follower", "m.communicator", "m", "expected the communicator of a FederalModel"),
        ("follower", "optimizer(0.5)", PRIVATE, "beside the encrypted layer 'hetero'"),
        ("follower", "    return", f"    {ACTIVE}(tf.zeros([16, 5]))\n    return", "'hetero' exists already in train"),
        ("follower", "4, 5, 'right'", "4, 6, 'right'", "shape (None, 6): expected [batch, 5] (its dim)"),
        ("follower", "efl.FederalModel()", f"efl.FederalModel(); m = model; {ACTIVE}(tf.zeros([16, 5]))",
         "is called outside of loss_fn and eval_fn"),
    ],
    ids=["active at the leader", "no passive", "NaN loss", "infinite", "beyond the output limit", "NaN weights",
         "no communicator", "private optimizer", "twice", "shape", "outside"],
)  # fmt: skip
def test_refused(keys: Path, role: str, there: str, here: str, text: str) -> None:
    texts = dict(zip(("leader", "follower"), scripts()))
    if "2^33" in text:
        texts = {role: each.replace("4, 0.5", "4, 0.5, output_limit=16.0") for role, each in texts.items()}
        texts["leader"] = texts["leader"].replace("0.5, output_limit=16.0, START", "0.5, START, output_limit=16.0")
    changed = texts[role].replace(there, here)
    assert changed != texts[role]
    refused(keys, *{**texts, role: changed}.values(), text)


ARGUMENTS = {
    "name='größe'": "name='größe': expected letters (A-Z, a-z), digits and underscores, a letter first",
    "name='_x'": "name='_x': expected letters",
    "momentum=1 - 2.0**-18": "expected 0, or a number below 1, of 16 bits",
    "momentum=1e-6": "expected 0, or a number below 1, of 16 bits",
    "momentum=1.0": "expected 0, or a number below 1, of 16 bits",
    "momentum=-0.5": "momentum=-0.5: expected a number of at least 0",
    "output_limit=np.ones(2)": "expected a power of two from 16 to 2**20",
    "output_limit='64'": "output_limit='64': expected a power of two",
    "clip='no'": "clip='no': expected True or False",
    "dim=np.float64(5)": "expected a number of columns, 1 to 65536",
    "private_file='private\\0key.json'": "expected the name of a key file",
    "dim=np.int64(5)": "",
}


def test_arguments_that_cannot_be_are_told_apart(keys: Path) -> None:
    def given(argument: str) -> str:
        name = argument.split("=")[0]
        usual = {
            "dim": "dim=5",
            "private_file": "private_file='private_key.json'",
            "name": f"name='layer{len(argument)}'",
        }
        return ", ".join({**usual, name: argument}.values())

    lines = ["m = efl.FederalModel().communicator", "told = []"]
    for argument in ARGUMENTS:
        made = f"efl.privacy.EncryptActiveLayer(m, public_file='public_key.json', {given(argument)})"
        lines.append(
            f"try: told.append({made} and '')\nexcept efl.errors.ConfigError as error: told.append(str(error))"
        )
    lines.append("import json; json.dump(told, open('told.json', 'w'))")
    run_both(keys, "", "\n".join(lines), end="")
    told = json.loads((keys / "told.json").read_text())
    assert len(told) == len(ARGUMENTS)
    for (argument, text), what in zip(ARGUMENTS.items(), told):
        assert text in what and bool(text) == bool(what), (argument, what)


# ---- weights that nobody gives

DEFAULT = """
rng = np.random.default_rng(0)
batch = batches()
def net(m, s):
    h = dense(s['x'], 4, 300, ROLE, tf.tanh)
    args = (m.communicator, 300, 300, "public_key.json") if ROLE == "leader" else (
        m.communicator, 300, "public_key.json", "private_key.json")
    kind = "Passive" if ROLE == "leader" else "Active"
    h = getattr(efl.privacy, f"Encrypt{kind}Layer")(*args, learning_rate=0.0, name="spread")(h)
    one = getattr(efl.privacy, f"Encrypt{kind}Dense")(*args, 1, learning_rate=0.0, name="one")
    return cross_entropy(s['label'], dense(one(h[:, :300]), 1 if ROLE == "leader" else 300, 3, ROLE + "_top"))
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(net).optimizer_fn(optimizer(0.5)).compile()
class First(tf.train.SessionRunHook):
    def before_run(self, context):
        raw = context.session
        names = [v for v in tf.global_variables() if v.op.name.endswith("/share")]
        held = {v.op.name.replace("/", "|"): v for v in names}
        np.savez(ROLE + ".npz", **raw.run(held))
model.add_hooks([First()], mode=efl.MODE.TRAIN)
model.fit(efl.procedure_fn.train(max_step=1))
"""


def test_first_weights_are_of_two_secret_parts_and_spread_around_one(keys: Path) -> None:
    results = run_both(keys, DEFAULT, DEFAULT, end="")
    assert "with one unit the follower can compute W₂ and the output's gradient" in results["leader"].output
    parts = [load(keys / f"{role}.npz") for role in ("leader", "follower")]
    spread, one = (
        [np.asarray(part[f"{name}/share"], np.float64) * 2.0**-16 for part in parts] for name in ("spread", "one")
    )
    for part in spread:  # each uniform from 0.25 to 0.75
        assert part.shape == (300,) and 0.25 <= part.min() < 0.3 and 0.7 < part.max() <= 0.75
        assert abs(part.mean() - 0.5) < 5 * 0.5 / math.sqrt(12 * 300)
    limit = math.sqrt(6 / 301) / math.sqrt(2)
    for part in one:
        assert part.shape == (300, 1) and np.abs(part).max() <= limit + 2.0**-16 and part.std() > limit / 2
    for first, second in (spread, one):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.3


# ---- what is warned of

TOLD = """
import warnings
model = efl.FederalModel()
FILES = ("public_key.json", "private_key.json")[: 2 if ROLE == "follower" else 1]
def warn(what, make):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make()
    told = [str(w.message) for w in seen if issubclass(w.category, efl.privacy.PrivacyWarning)]
    print("told of", what, told, flush=True)
def loss_fn(m, s):
    trained = dense(s["x"], 4, 4, "right")
    warn("columns", lambda: Dense(m.communicator, 4, *FILES, 2, name="own")(s["x"]))
    warn("trained", lambda: Dense(m.communicator, 4, *FILES, 2, name="trained")(trained))
    return trained
LAYERS
"""
WARNED = {
    "follower": {
        "nothing": ("Dense(model.communicator, 5, *FILES, 4, name='a')", []),
        "elementwise": ("Layer(model.communicator, 5, *FILES, name='b')", ["hidden by one unknown factor only"]),
        "as many": ("Dense(model.communicator, 5, *FILES, 5, name='c')", ["5 units of 5 columns"]),
        "noise": (
            "Layer(model.communicator, 5, *FILES, noise_initializer=tf.ones_initializer(), name='d')",
            ["hidden by one unknown factor only", "noise_initializer=<"],
        ),
        "update": (
            "Layer(model.communicator, 5, *FILES, update_noise=False, name='e')",
            ["hidden by one unknown factor only", "update_noise=False: changes nothing here"],
        ),
        "columns": ("", ["the input of encrypted layer 'own' depends on no trained variable"]),
        "trained": ("", []),
    },
    "leader": {
        "nothing": ("Dense(model.communicator, 5, 5, *FILES, 4, name='a')", []),
        "elementwise": ("Layer(model.communicator, 5, 5, *FILES, name='b')", ["hidden by one unknown factor only"]),
        "initializer": (
            "Dense(model.communicator, 5, 5, *FILES, 4, initializer=tf.ones_initializer(), name='c')",
            ["with an initializer the leader knows the weights of the first step"],
        ),
    },
}


def test_warnings(keys: Path) -> None:
    scripts = {}
    for role, kind in (("leader", "Passive"), ("follower", "Active")):
        lines = [f"Dense, Layer = efl.privacy.Encrypt{kind}Dense, efl.privacy.Encrypt{kind}Layer"]
        lines += [f"warn({what!r}, lambda: {make})" for what, (make, _) in WARNED[role].items() if make]
        if role == "follower":
            lines.append("model.input_fn(lambda m, mode: sample(m, batches(), ROLE)).loss_fn(loss_fn)")
            lines.append("model.optimizer_fn(optimizer(0.5)).compile()")
        scripts[role] = TOLD.replace("LAYERS", "\n".join(lines))
    results = run_both(keys, *scripts.values(), end="")
    for role, expected in WARNED.items():
        told = dict(re.findall(r"^told of (.*?) (\[.*\])$", results[role].output, re.MULTILINE))
        assert set(told) == set(expected), results[role].output
        for what, (_, texts) in expected.items():
            assert all(text in told[what] for text in texts), told[what]
            assert (told[what] == "[]") == (not texts), told[what]
