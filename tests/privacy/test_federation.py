"""A private federated run equals, with the same noise, one process that clips each party's part for itself."""

from __future__ import annotations

import os

import numpy as np
import pytest

import efl  # noqa: F401  (puts TensorFlow into graph mode)

import tensorflow.compat.v1 as tf  # isort: skip
from tests.federation import problem
from tests.federation.harness import assert_same_weights, run_both
from tests.federation.problem import dense, load, one_hot
from tests.privacy.wave import wave

STEPS, CLIP, SIGMA, RATE = 6, 0.3, 0.2, 0.5

COMMON = f"""
from tests.privacy.wave import install
install()
batch = batches()
def trained_by(private):
    if private:
        optimizer_class = efl.DPGradientDescentGaussianOptimizer
        return efl.optimizer_fn.optimizer_setter(optimizer_class({CLIP}, {SIGMA}, learning_rate={RATE}))
    return optimizer({RATE})
def run(loss_fn, private, **config):
    global model
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(trained_by(private))
    model.compile(opt_config=config or None).fit(efl.procedure_fn.train(max_step={STEPS}))
"""
LEADER = (
    COMMON
    + """
def loss_fn(m, s):
    h = dense(s['x'], 4, 5, 'left', tf.tanh)
    f = tf.reshape(m.recv('f', require_grad=True), [-1, 5])
    logits = dense(tf.concat([h, f], 1), 10, 3, 'top')
    return tf.nn.softmax_cross_entropy_with_logits_v2(labels=one_hot(s['label']), logits=logits)
run(loss_fn, PRIVATE, **CONFIG)
"""
)
FOLLOWER = (
    COMMON
    + """
def loss_fn(m, s):
    h = dense(s['x'], 4, 5, 'right', tf.tanh)
    m.send('f', h, require_grad=True)
    return h
run(loss_fn, PRIVATE, **CONFIG)
"""
)


def party(text: str, private: bool, **config: object) -> str:
    return text.replace("PRIVATE", str(private)).replace("**CONFIG", f"**{config!r}")


def _clipped(rows: list[np.ndarray]) -> list[np.ndarray]:
    return [row * min(1.0, CLIP / max(float(np.linalg.norm(row)), 1e-12)) for row in rows]


def twin(leader: bool, follower: bool, returned: bool, reduce: str = "mean") -> dict[str, np.ndarray]:
    """Both parties in one process, one example at a time, by plain TensorFlow and numpy.

    Args:
      leader: Whether the leader's optimizer is private.
      follower: Whether the follower's is.
      returned: Whether returned gradients are clipped and noised.
      reduce: The leader's REDUCE.
    """
    tf.reset_default_graph()
    x, label = tf.placeholder(tf.float32, [1, 8]), tf.placeholder(tf.int64, [1])
    f = dense(x[:, 4:], 4, 5, "right", tf.tanh)
    logits = dense(tf.concat([dense(x[:, :4], 4, 5, "left", tf.tanh), f], 1), 10, 3, "top")
    loss = tf.nn.softmax_cross_entropy_with_logits_v2(labels=one_hot(label), logits=logits)
    held = {v.op.name: v for v in tf.trainable_variables()}
    own = [held[name] for name in ("left/kernel", "left/bias", "top/kernel", "top/bias")]
    theirs = [held[name] for name in ("right/kernel", "right/bias")]
    back = tf.placeholder(tf.float32, [1, 5])
    of_loss, of_f = tf.gradients(loss, [*own, f]), tf.gradients(f, theirs, grad_ys=back)
    new = {v: tf.placeholder(tf.float32, v.shape) for v in [*own, *theirs]}
    assign = [v.assign(p) for v, p in new.items()]
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for step in range(STEPS):
            rows = np.arange(step * problem.BATCH, (step + 1) * problem.BATCH) % problem.ROWS
            feeds = [{x: problem.X[i : i + 1], label: problem.LABEL[i : i + 1]} for i in rows]
            each = [sess.run(of_loss, feed) for feed in feeds]
            flat = [np.concatenate([g.ravel() for g in grads[:-1]]) for grads in each]
            gradient = np.stack([grads[-1][0] for grads in each])
            if returned:
                gradient = np.stack(_clipped(list(gradient)))
                added = CLIP * SIGMA * wave(gradient.size, step, "train/f/grad")
                gradient = gradient + added.reshape(gradient.shape)
            right = [
                np.concatenate([g.ravel() for g in sess.run(of_f, {**feed, back: row[np.newaxis]})])
                for feed, row in zip(feeds, gradient)
            ]
            updates = []
            for private, parts in ((leader, flat), (follower, right)):
                total = np.sum(_clipped(parts) if private else parts, 0)
                if private:
                    total = total + CLIP * SIGMA * wave(total.size, step, "train")
                updates.append(total / (problem.BATCH if private or reduce == "mean" else 1))
            values = sess.run([*own, *theirs])
            moved = np.concatenate([v.ravel() for v in values]) - RATE * np.concatenate(updates)
            places = np.split(moved, np.cumsum([v.size for v in values])[:-1])
            sess.run(assign, {new[v]: p.reshape(v.shape.as_list()) for v, p in zip(new, places)})
        return sess.run(held)


def both_weights(tmp_path):
    return {**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}


@pytest.mark.parametrize(
    ("leader", "follower", "mode"),
    [
        (False, True, None),
        (True, False, "unnoise"),
        (True, True, "unnoise"),
        (True, True, "noise"),
        (True, False, "noise"),
    ],
)
def test_each_party_clips_and_noises_its_own_part(tmp_path, leader, follower, mode):
    config = {} if mode is None else {"BACKEND_MODE": mode}
    run_both(tmp_path, party(LEADER, leader, **config), party(FOLLOWER, follower))
    expected = twin(leader, follower, returned=mode == "noise")
    assert_same_weights(both_weights(tmp_path), expected, rtol=2e-5)
    plain = twin(False, False, returned=False)
    assert max(np.abs(plain[name] - value).max() for name, value in expected.items()) > 0.01  # it makes a difference


def test_a_sum_is_not_divided_for_anybody(tmp_path):
    run_both(tmp_path, party(LEADER, False, REDUCE="sum"), party(FOLLOWER, True))
    assert_same_weights(both_weights(tmp_path), twin(False, True, returned=False, reduce="sum"), rtol=2e-5)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (
            ("logits=logits)\n", "logits=logits)[0]\n"),
            "its loss_fn returns a scalar; it must return the loss of each row",
        ),
        (
            ("'top')\n    return", "'top')\n    logits -= tf.reduce_mean(logits, 0)\n    return"),
            "depends on other rows",
        ),
    ],
)
def test_a_leader_that_cannot_return_gradients_row_by_row_is_told(tmp_path, spoil, why):
    leader = party(LEADER, False).replace(*spoil)
    assert leader != party(LEADER, False)
    told = run_both(tmp_path, leader, party(FOLLOWER, True), expect=(1, 1))
    for result in told.values():
        assert (
            "gradients of train: follower trains with differential privacy and clips the gradient of each row, which "
            "leader cannot return: "
        ) in result.output
        assert why in result.output
    plain = run_both(tmp_path, leader, party(FOLLOWER, False))  # nothing is wrong with it otherwise
    assert plain["leader"].returncode == 0


def test_seed_and_ledger_lie_in_each_partys_own_folder(tmp_path):
    keep = {
        "max_step=6)": "max_step=6), checkpoint_dir='checkpoints', save_checkpoint_steps=2",
        "batch = batches()": "data = tf.data.Dataset.from_tensor_slices((X, LABEL, IDS)).repeat().batch(BATCH)\n"
        "batch = tf.data.make_initializable_iterator(data).get_next()",
    }
    texts = [party(text, True).replace("install()\n", "") for text in (LEADER, FOLLOWER)]
    for old, new in keep.items():
        texts = [text.replace(old, new) for text in texts]
    run_both(tmp_path, *texts)
    folders = [tmp_path / "checkpoints" / role / "0" / "privacy" for role in ("leader", "follower")]
    seeds = [(folder / "noise_seed").read_bytes() for folder in folders]
    assert seeds[0] != seeds[1]
    for folder, seed in zip(folders, seeds):
        assert (folder / "noise_seed").stat().st_mode & 0o777 == 0o600
        for path in (tmp_path / "checkpoints").rglob("*"):
            if path.is_file() and path != folder / "noise_seed":
                assert seed not in path.read_bytes() and seed.hex().encode() not in path.read_bytes()
    from efl.privacy.noise import Ledger

    releases = {p.terms["group"]: p.releases for p in Ledger(folders[0]).phases()}
    assert releases == {"train": 6, "train/f/grad": 6}
    assert sum(p.releases for p in Ledger(folders[1]).phases()) == 6
    before = load(tmp_path / "leader.npz")
    os.remove(folders[1] / "noise_seed")
    for role in ("leader", "follower"):  # a rollback: steps 5 and 6 are taken again
        for name in os.listdir(tmp_path / "checkpoints" / role / "0"):
            if name.startswith(("step-0000000006", "step-0000000005")):
                os.rename(tmp_path / "checkpoints" / role / "0" / name, tmp_path / f"{role}-{name}")
    told = run_both(tmp_path, *texts)
    assert "the noise seed of checkpoints/follower/0 is gone; a new one was made" in told["follower"].output
    assert "is gone" not in told["leader"].output
    # The leader repeats step 5 identically, which counts once; then the follower's other noise makes step 6 differ.
    assert sum(p.releases for p in Ledger(folders[0]).phases()) == 12 + 2
    assert sum(p.releases for p in Ledger(folders[1]).phases()) == 6 + 2
    assert any(not np.array_equal(before[name], value) for name, value in load(tmp_path / "leader.npz").items())
