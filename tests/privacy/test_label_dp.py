"""Labels randomised once, in real sessions with real files: epochs, restarts, what is refused, what is promised."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ConfigError, DataError, EflError, ModelError
from efl.privacy import LabelDP, RRWithPrior
from efl.privacy.noise import Labels, Seed
from tests.federation.harness import run_both
from tests.parties import run_parties

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS, BATCH, CLASSES = 96, 16, 5
EPOCH = ROWS // BATCH
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 3)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, ROWS)
IDS = RNG.permutation(10**12 + np.arange(ROWS))
PRIORS = RNG.dirichlet(np.full(CLASSES, 0.5), ROWS)


class Trained:
    """A model that trained on randomised labels, and what it trained on.

    Args:
      use: (label_dp's call, sample) -> labels; makes the randomised labels.
      steps: Training steps.
      folder: ``checkpoint_dir``.
      data: Replaces columns of the data.
      extra: Called in the loss function, with model and sample.
      optimizer: Trains.
      evaluates: Calls an eval_fn with (model, sample).
      loss: (logits, randomised labels) -> loss of each row.
    """

    def __init__(
        self,
        use: Callable[[Any], tf.Tensor],
        steps: int = EPOCH,
        folder: Path | None = None,
        data: dict[str, np.ndarray] | None = None,
        extra: Callable[[Any, Any], Any] = lambda model, sample: None,
        optimizer: Any = None,
        evaluates: Callable[[Any, Any], Any] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        tf.reset_default_graph()
        held = {"x": X, "y": LABELS, "id": IDS, "prior": PRIORS, **(data or {})}
        batch = tf.data.make_initializable_iterator(tf.data.Dataset.from_tensor_slices(held).repeat().batch(BATCH))
        read = batch.get_next()
        columns = {key: [tf.feature_column.numeric_column(key, n)] for key, n in (("x", 3), ("y", 1))}
        self.ids: list[np.ndarray] = []
        self.told: list[np.ndarray] = []
        self.model = efl.Model(seed=1)

        def keep(ids: np.ndarray, told: np.ndarray) -> None:
            self.ids.append(ids.ravel())
            self.told.append(told)

        def loss_fn(model: efl.Model, sample: efl.Sample) -> tf.Tensor:
            told = use(sample)
            extra(model, sample)
            model.add_train_op(tf.numpy_function(keep, [sample.features["id"], told], []))
            logits = tf.layers.dense(sample["x"], CLASSES, name="d")
            return (loss or LabelDP(1.0, CLASSES).loss)(logits, told)

        self.model.input_fn(lambda model, mode: efl.Sample(read, columns)).loss_fn(loss_fn)
        if evaluates is not None:
            self.model.eval_fn(evaluates)
        chosen = optimizer or tf.train.GradientDescentOptimizer(0.1)
        self.model.optimizer_fn(efl.optimizer_fn.optimizer_setter(chosen))
        self.model.compile(opt_config={"NUM_EXAMPLES": ROWS, "BATCH_SIZE": BATCH})
        self.model.fit(efl.procedure_fn.train(max_step=steps), checkpoint_dir=None if folder is None else str(folder))

    def by_id(self) -> dict[Any, int]:
        """Id -> the label that was told, in every step the same."""
        pairs = set(zip(np.concatenate(self.ids).tolist(), np.concatenate(self.told).tolist()))
        found = dict(pairs)
        assert len(found) == len(pairs), "some label was told in two ways"
        return found


def plain(epsilon: float = 1.0, name: str = "label") -> Callable[[Any], tf.Tensor]:
    return lambda sample: LabelDP(epsilon, CLASSES, name)(sample.features["id"], sample["y"])


def with_the_secret_of(folder: Path, other: Path) -> Path:
    """A new ``checkpoint_dir`` that begins with secret, ledger and register of another, and nothing else of it."""
    inner = Path("local", "0", "privacy")
    shutil.copytree(folder / inner, other / inner)
    return other


def label_row(model: efl.Model) -> Any:
    pytest.importorskip("dp_accounting")
    (row,) = [row for row in model.privacy_spent(1e-5).rows if row.relation == "replace_label"]
    return row


def test_labels_are_the_same_in_every_epoch_and_after_a_restart(tmp_path):
    first = Trained(plain(), steps=3 * EPOCH + 2, folder=tmp_path / "a")
    told = first.by_id()
    assert len(told) == ROWS and len(first.told) == 3 * EPOCH + 2
    kept = np.mean([told[i] == label for i, label in zip(IDS.tolist(), LABELS)])
    assert 0.2 < kept < 0.65  # 0.40 of 96 expected
    order = np.random.default_rng(5).permutation(ROWS)
    shuffled = {"x": X[order], "y": LABELS[order], "id": IDS[order]}
    assert Trained(plain(), steps=5 * EPOCH, folder=tmp_path / "a").by_id() == told
    again = Trained(plain(), folder=with_the_secret_of(tmp_path / "a", tmp_path / "b"), data=shuffled)
    assert again.by_id() == told and not np.array_equal(again.ids[0], first.ids[0])
    assert label_row(first.model).epsilon == label_row(again.model).epsilon == 1.0
    assert Trained(plain(), folder=tmp_path / "c").by_id() != told
    assert Trained(plain()).by_id() != told  # without a folder the secret ends with the process


PROGRAM = """
import sys
import efl, numpy as np
from pathlib import Path
from tests.privacy.test_label_dp import EPOCH, Trained, label_row, plain
trained = Trained(plain(), steps=int(sys.argv[1]), folder=Path("checkpoints"))
told = trained.by_id()
np.save(sys.argv[2], np.array([told[i] for i in sorted(told)]))
print("EPSILON", label_row(trained.model).epsilon)
"""


def test_a_new_process_with_the_same_folder_tells_the_same_and_one_that_lost_its_seed_is_counted(tmp_path):
    def run(steps: int) -> tuple[list[int], str]:
        env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        result = run_parties({"": PROGRAM}, args=[str(steps), "told.npy"], cwd=tmp_path, env=env)["script"]
        assert result.returncode == 0, result.output
        return np.load(tmp_path / "told.npy").tolist(), result.output

    folder = tmp_path / "checkpoints" / "local" / "0" / "privacy"
    told, output = run(EPOCH)
    assert "EPSILON 1.0" in output and "randomised anew" not in output
    seed = (folder / "noise_seed").read_bytes()
    assert len(seed) == 32 and (folder / "labels").stat().st_mode & 0o777 == 0o600
    again, output = run(2 * EPOCH)
    assert again == told and "EPSILON 1.0" in output
    for path in (tmp_path / "checkpoints").rglob("*"):
        assert not path.is_file() or path.name == "noise_seed" or seed not in path.read_bytes()
    os.remove(folder / "noise_seed")
    again, output = run(3 * EPOCH)
    assert again != told and "EPSILON 2.0" in output
    assert re.search(r"randomised before, with a secret seed that is gone .* 1 for each of 2, 2 in all", output)


def test_a_fit_without_a_folder_counts_in_the_one_that_follows(tmp_path):
    trained = Trained(plain())
    trained.model.fit(efl.procedure_fn.train(max_step=EPOCH), checkpoint_dir=str(tmp_path))
    assert label_row(trained.model).epsilon == 2.0


# ---- what it promises


def test_randomised_labels_stand_in_the_table_beside_what_the_optimizer_spends(tmp_path):
    trained = Trained(plain(), folder=tmp_path)
    row = label_row(trained.model)
    assert (row.adversary, row.epsilon) == ("anyone, about the model's labels alone", 1.0)
    table = str(trained.model.privacy_spent(1e-5))
    assert "replace one label" in table and "if the labels were used for nothing else" in table
    assert "none (weights updated without noise): model: d/kernel" in table

    def also(model: efl.Model, sample: Any) -> None:
        model.add_train_op(plain(0.5, "other")(sample))

    noisy = efl.DPGradientDescentGaussianOptimizer
    private = Trained(plain(), extra=also, optimizer=noisy(1.0, 2.0, learning_rate=0.1))
    assert label_row(private.model).epsilon == 1.5
    alone = Trained(
        lambda sample: tf.cast(sample.features["y"], tf.int64), optimizer=noisy(1.0, 2.0, learning_rate=0.1)
    )
    rows = [model.privacy_spent(1e-5, further_steps=7).rows[0] for model in (private.model, alone.model)]
    assert rows[0].epsilon == rows[1].epsilon  # the noise is counted as ever


def empirical_epsilon(folder: Path | None, epsilon: float, epochs: int) -> float:
    """A lower bound of ε, with 95 % confidence, by who sees all epochs and guesses the commonest answer."""
    stats = pytest.importorskip("scipy.stats")
    rows, ids = 4000, np.arange(4000)
    labels = np.random.default_rng(6).integers(0, 2, rows)
    tf.reset_default_graph()
    data = tf.data.Dataset.from_tensor_slices({"y": labels, "id": ids}).repeat().batch(1000)
    read = tf.data.make_initializable_iterator(data).get_next()
    seen: list[np.ndarray] = []
    model = efl.Model()

    def loss_fn(model: efl.Model, sample: efl.Sample) -> tf.Tensor:
        told = LabelDP(epsilon, 2)(sample.features["id"], sample.features["y"])
        model.add_train_op(tf.numpy_function(lambda told: seen.append(told), [told], []))
        return tf.cast(told, tf.float32) * tf.get_variable("w", [])

    model.input_fn(lambda model, mode: efl.Sample(read, {})).loss_fn(loss_fn)
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.0))).compile()
    model.fit(efl.procedure_fn.train(max_step=4 * epochs), checkpoint_dir=None if folder is None else str(folder))
    guess = np.concatenate(seen).reshape(epochs, rows).mean(0) > 0.5
    hits, alarms = int(guess[labels == 1].sum()), int(guess[labels == 0].sum())
    ones, zeros = int((labels == 1).sum()), int((labels == 0).sum())
    lower = stats.beta.ppf(0.025, hits, ones - hits + 1)
    upper = stats.beta.ppf(0.975, alarms + 1, zeros - alarms)
    return math.log(lower / upper)


def test_an_audit_over_all_epochs_and_the_audit_can_fail(tmp_path, monkeypatch):
    folder = tmp_path / "local" / "0" / "privacy"
    folder.mkdir(parents=True)
    (folder / "noise_seed").write_bytes(bytes(range(32)))  # the same numbers in every run of this test
    (folder / "noise_seed").chmod(0o600)
    epsilon = 1.0
    assert 0.6 * epsilon < empirical_epsilon(tmp_path, epsilon, epochs=9) < epsilon
    randomised = Labels.randomised

    def anew(self: Labels, *args: Any) -> np.ndarray:
        return randomised(Labels(Seed.fresh(), self._ledger, None), *args)

    monkeypatch.setattr(Labels, "randomised", anew)
    assert empirical_epsilon(None, epsilon, epochs=9) > 2 * epsilon


# ---- the unbiased loss


def transition(epsilon: float, classes: int) -> np.ndarray:
    power = math.exp(epsilon)
    return np.where(np.eye(classes) == 1, power, 1.0) / (power + classes - 1)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("epsilon", [0.3, 1.0, 3.0])
def test_the_expectation_of_the_loss_and_of_its_gradient_is_that_of_clean_labels(classes, epsilon):
    metrics = pytest.importorskip("sklearn.metrics")
    tf.reset_default_graph()
    label_dp = LabelDP(epsilon, classes)
    logits = tf.placeholder(tf.float64, [None, classes])
    labels = tf.placeholder(tf.int64, [None])
    loss, weights = label_dp.loss(logits, labels), label_dp.weights(labels, tf.float64)
    gradient = tf.gradients(loss, logits)[0]
    values = np.random.default_rng(7).normal(size=(1, classes)) * 3
    share = np.exp(values[0]) / np.exp(values[0]).sum()
    with tf.Session() as sess:
        every = {logits: np.repeat(values, classes, 0), labels: np.arange(classes)}  # each answer that there can be
        losses, gradients, estimates = sess.run([loss, gradient, weights], every)
    for label, probabilities in enumerate(transition(epsilon, classes)):
        one_hot = np.eye(classes)[label]
        clean = metrics.log_loss([label], [share], labels=list(range(classes)))
        assert probabilities @ losses == pytest.approx(clean, rel=1e-10)
        np.testing.assert_allclose(probabilities @ gradients, share - one_hot, atol=1e-10)
        np.testing.assert_allclose(probabilities @ estimates, one_hot, atol=1e-10)


def test_two_classes_may_have_one_logit():
    tf.reset_default_graph()
    label_dp, prior = LabelDP(1.0, 2), RRWithPrior(1.0, 2)
    odds = tf.constant([[0.3], [-2.0], [5.0], [0.0]])
    both = tf.concat([tf.zeros_like(odds), odds], 1)
    labels = tf.constant([[1], [0], [0], [1]])
    with tf.Session() as sess:
        for made in (label_dp, prior):
            one, flat, two = sess.run(
                [made.loss(odds, labels), made.loss(odds[:, 0], labels[:, 0]), made.loss(both, labels)]
            )
            np.testing.assert_allclose(one, two, rtol=1e-5)
            np.testing.assert_allclose(flat, two, rtol=1e-5)
    with pytest.raises(ModelError, match=r"'label': logits have shape \(4, 3\): expected \[batch, 2\], \[batch, 1\]"):
        label_dp.loss(tf.zeros([4, 3]), labels)
    with pytest.raises(ModelError, match=r"logits have shape \(4,\): expected \[batch, 3\]$"):
        LabelDP(1.0, 3).loss(tf.zeros([4]), labels)
    with pytest.raises(ModelError, match="labels of float32: expected floating point, and the integers"):
        label_dp.loss(odds, tf.ones([4]))


def test_it_goes_with_a_private_optimizer_row_by_row():
    for sigma, rate in ((0.0, 0.0), (1.0, 0.1)):
        optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, sigma, learning_rate=rate)
        for ids in (IDS, IDS[:, np.newaxis], IDS.astype("S").astype(object)):
            assert len(Trained(plain(), optimizer=optimizer, data={"id": ids}).by_id()) == ROWS


# ---- with a prior


def test_a_prior_of_each_row_and_one_for_all():
    def per_row(sample: Any) -> tf.Tensor:
        return RRWithPrior(1.0, CLASSES)(sample.features["id"], sample["y"], sample.features["prior"])

    told = Trained(per_row, steps=2 * EPOCH).by_id()
    from efl.privacy.noise.response import best_answers

    allowed = best_answers(PRIORS, 1.0)
    assert {int(n) for n in allowed.sum(1)} > {1}
    assert all(allowed[row, told[i]] for row, i in enumerate(IDS.tolist()))
    shared = [0.5, 0.4, 0.05, 0.03, 0.02]
    both = Trained(lambda s: RRWithPrior(1.0, CLASSES)(s.features["id"], s["y"], shared), steps=2 * EPOCH).by_id()
    assert set(both.values()) == {0, 1}


def test_stages_over_other_rows_are_one_release_and_a_changed_prior_is_refused(tmp_path):
    half = {key: value[: ROWS // 2] for key, value in (("x", X), ("y", LABELS), ("id", IDS), ("prior", PRIORS))}
    first = Trained(plain(), folder=tmp_path / "a", data=half)
    priors = PRIORS.copy()
    priors[: ROWS // 2] = 1 / CLASSES  # these were told already

    def second(sample: Any) -> tf.Tensor:
        return RRWithPrior(1.0, CLASSES)(sample.features["id"], sample["y"], sample.features["prior"])

    folder = with_the_secret_of(tmp_path / "a", tmp_path / "b")
    trained = Trained(second, steps=2 * EPOCH, folder=folder, data={"prior": priors})
    told = trained.by_id()
    assert {i: told[i] for i in first.by_id()} == first.by_id()
    assert label_row(trained.model).epsilon == 1.0
    with pytest.raises(DataError, match="came before with another label, or with a prior that allows other answers"):
        Trained(second, folder=with_the_secret_of(folder, tmp_path / "c"), data={"prior": priors[::-1].copy()})

    def another(sample: Any) -> tf.Tensor:
        return RRWithPrior(1.0, CLASSES, "again")(sample.features["id"], sample["y"], sample.features["prior"])

    named = Trained(another, folder=with_the_secret_of(folder, tmp_path / "d"))
    assert label_row(named.model).epsilon == 2.0


def test_a_prior_of_the_model_in_training_is_refused_when_a_row_comes_again():
    def moving(sample: Any) -> tf.Tensor:
        logits = tf.matmul(sample["x"], tf.get_variable("v", [3, CLASSES]))
        tf.losses.add_loss(tf.reduce_sum(logits[:, 0]))
        return RRWithPrior(1.0, CLASSES)(sample.features["id"], sample["y"], tf.nn.softmax(logits))

    with pytest.raises(DataError, match="Are priors computed once and kept with the data"):
        Trained(moving, steps=9 * EPOCH, loss=lambda logits, told: tf.reduce_sum(logits, 1) + tf.losses.get_losses()[0])


# ---- what is refused


@pytest.mark.parametrize("made", [LabelDP, RRWithPrior])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0}, "epsilon=0: expected a number of at least 1e-06"),
        ({"epsilon": -1.0}, "epsilon=-1.0: expected"),
        ({"epsilon": math.nan}, "epsilon=nan: expected"),
        ({"epsilon": math.inf}, "epsilon=inf: expected"),
        ({"epsilon": "much"}, "epsilon='much': expected"),
        ({"epsilon": "3"}, "epsilon='3': expected"),
        ({"num_classes": 1}, "num_classes=1: expected a number from 2 to 1048576"),
        ({"num_classes": 2**21}, "num_classes=2097152: expected a number from 2"),
        ({"num_classes": 2.5}, "num_classes=2.5: expected a whole number"),
        ({"num_classes": True}, "num_classes=True: expected a whole number"),
        ({"name": ""}, "name='': expected a string"),
    ],
)
def test_arguments_that_cannot_be(made, arguments, message):
    with pytest.raises(ConfigError, match=re.escape(f"{made.__name__}: {message}")):
        made(**{"epsilon": 1.0, "num_classes": 3, **arguments})


def test_what_is_refused_when_the_graph_is_built():
    tf.reset_default_graph()
    label_dp, ids, labels = LabelDP(1.0, 3), tf.range(4), tf.zeros([4, 1])
    refused: list[tuple[Any, Any, str]] = [
        (None, labels, "'label': there is no sample id. A label is randomised once, .* Pass sample.sample_ids of an"),
        (tf.zeros([4]), labels, r"sample ids are float32: expected integers or strings \(sample\['id'\] of a numeric"),
        (ids, tf.one_hot(ids, 3), r"labels have shape \(4, 3\): expected .*; of one-hot labels pass tf.argmax"),
        (ids, tf.zeros([4, 2]), r"labels have shape \(4, 2\): expected \[batch\] or \[batch, 1\]$"),
        (ids, tf.zeros([]), r"labels have shape \(\): expected"),
        (ids, tf.constant(["a"] * 4), "labels are string: expected numbers from 0 to K - 1"),
        (tf.range(5), labels, "5 sample ids for 4 labels: expected one for each"),
        (tf.zeros([4, 2], tf.int64), labels, r"sample ids have shape \(4, 2\): expected"),
    ]
    for given, theirs, message in refused:
        with pytest.raises(ModelError, match=message):
            label_dp(given, theirs)
    with efl.task_scope(efl.MODE.EVAL), pytest.raises(ModelError, match="in evaluation: .* leave this out in eval_fn"):
        label_dp(ids, labels)
    with_prior: list[tuple[Any, str]] = [
        (None, "prior=None: expected probabilities; LabelDP needs none"),
        ([1, 0, 0], "prior is int32: expected probabilities"),
        (tf.zeros([4, 2]), r"prior has shape \(4, 2\): expected \[3\] or \[batch, 3\]"),
    ]
    for prior, message in with_prior:
        with pytest.raises(ModelError, match=message):
            RRWithPrior(1.0, 3)(ids, labels, prior)
    with tf.Session() as sess, pytest.raises(tf.errors.OpError, match="used outside of a model"):
        sess.run(label_dp(ids, labels))


def unknown(value: tf.Tensor) -> tf.Tensor:
    """Without a static shape."""
    return tf.placeholder_with_default(value, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda s: (s.features["id"], s["y"] + 4), "labels have to be whole numbers from 0 to 4, and some are not"),
        (lambda s: (s.features["id"], -s["y"]), "from 0 to 4"),
        (lambda s: (s.features["id"], s["y"] + 0.5), "whole numbers"),
        (lambda s: (s.features["id"], s["y"] / 0.0), "whole numbers"),
        (lambda s: (unknown(s.features["id"])[:-1], s["y"]), "15 sample ids for 16 labels"),
        (lambda s: (s.features["id"], unknown(tf.one_hot(s.features["y"], 5))), r"labels of shape \[16, 5\]: expected"),
        (lambda s: (tf.range(tf.shape(s["y"])[0]), s["y"]), "Is the id that of a row, and not of a user or of a place"),
    ],
)
def test_what_is_refused_in_a_step(given, message, caplog):
    with caplog.at_level(logging.ERROR, "efl"), pytest.raises(EflError, match=message):
        Trained(lambda sample: LabelDP(1.0, CLASSES)(*given(sample)))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (lambda s: tf.zeros([CLASSES]), "has to be probabilities that sum to 1 .*; of logits pass tf.nn.softmax"),
        (lambda s: tf.constant([1.5, -0.5, 0, 0, 0]), "has to be probabilities"),
        (lambda s: tf.constant([math.nan] * CLASSES), "has to be probabilities"),
        (lambda s: unknown(s.features["prior"][:3]), r"prior of shape \[3, 5\] for 16 rows"),
    ],
)
def test_priors_that_are_none(prior, message):
    with pytest.raises(DataError, match=message):
        Trained(lambda s: RRWithPrior(1.0, CLASSES)(s.features["id"], s["y"], prior(s)))


def test_other_questions_of_one_name_are_refused(tmp_path):
    Trained(plain(1.0), folder=tmp_path)
    with pytest.raises(ConfigError, match="randomised before with epsilon=1.0, num_classes=5, .* now with epsilon=2.0"):
        Trained(plain(2.0), steps=2 * EPOCH, folder=tmp_path)


# ---- the label is used nowhere else


def _largest(sample: Any) -> tf.Tensor:
    return tf.cast(tf.reduce_max(sample["y"]), tf.int32) + 1


def _parts(sample: Any, count: int) -> list[tf.Tensor]:
    return tf.dynamic_partition(sample["x"], tf.cast(sample["y"][:, 0] > 2, tf.int32), count)


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (lambda m, s: m.add_metric("share", tf.reduce_mean(s["y"])), "metric 'share'"),
        (lambda m, s: m.add_metric("auc", efl.metrics.auc(tf.minimum(s["y"], 1), s["x"][:, :1] * 0)), "the operation"),
        (lambda m, s: m.add_train_op(tf.get_variable("v", []).assign(tf.reduce_sum(s["y"]))), "AssignVariableOp"),
        (lambda m, s: m.add_train_op(tf.numpy_function(lambda y: None, [s.features["y"]], [])), "PyFunc"),
        (lambda m, s: tf.losses.add_loss(tf.reduce_sum(s["y"])), ""),  # which nobody reads
        (lambda m, s: m.add_metric("n", tf.size(tf.boolean_mask(s["y"], s["y"] > 2))), "metric 'n'"),
        (lambda m, s: m.add_metric("n", tf.shape(tf.boolean_mask(s["x"], s["y"][:, 0] > 2))[0]), "metric 'n'"),
        (lambda m, s: m.add_metric("n", tf.shape(tf.where(tf.equal(s["y"], 0)))[0]), "metric 'n'"),
        (lambda m, s: m.add_metric("n", tf.size(tf.unique(s.features["y"])[0])), "metric 'n'"),
        (lambda m, s: m.add_metric("n", tf.size(_parts(s, 2)[1])), "metric 'n'"),
        (lambda m, s: m.add_metric("n", tf.size(tf.range(tf.reduce_sum(s.features["y"])))), "metric 'n'"),
        (lambda m, s: m.add_metric("n", tf.reduce_sum(tf.ones_like(tf.square(_parts(s, 2)[0])))), "metric 'n'"),
        (lambda m, s: m.add_metric("n", tf.size(tf.zeros(tf.stack([_largest(s), 2])))), "metric 'n'"),
        (lambda m, s: m.add_metric("n", tf.shape(tf.one_hot(s.features["y"], tf.cast(_largest(s), tf.int32)))[1]), "n"),
        (lambda m, s: m.add_metric("rows", tf.shape(s["y"])[0]), ""),
        (lambda m, s: m.add_metric("rows", tf.size(tf.one_hot(tf.cast(s["y"][:, 0] * 2, tf.int32), 5))), ""),
        (lambda m, s: m.add_metric("rows", tf.reduce_sum(tf.ones_like(tf.concat([s["y"], -s["y"]], 0)))), ""),
        (lambda m, s: m.add_metric("rows", tf.shape(tf.reshape(s["y"], [-1, 2]) > 1)[0]), ""),
        (lambda m, s: m.add_metric("rank", tf.rank(tf.boolean_mask(s["y"], s["y"] > 2))), ""),
        (lambda m, s: m.add_metric("rows", tf.shape(tf.gather(tf.eye(5), s.features["y"]))[0]), ""),
        (lambda m, s: m.add_metric("x", tf.reduce_mean(s["x"])), ""),
    ],
)
def test_labels_that_leave_a_training_step_by_another_way_are_refused(extra, what):
    if not what:
        Trained(plain(), extra=extra)
        return
    with pytest.raises(ModelError, match=rf"the label itself \(.*\) is used in train for .*{what}.*, not only"):
        Trained(plain(), extra=extra)


@pytest.mark.parametrize(
    "made",
    [
        lambda y: tf.maximum(y, y * 1),
        lambda y: tf.boolean_mask(y, y >= 0),
        lambda y: tf.where(y > 2, y, tf.identity(y)),
        lambda y: tf.argmax(tf.stack([tf.cast(tf.equal(y, k), tf.float32) for k in range(CLASSES)], 1), 1),
    ],
)
def test_a_label_that_is_made_of_itself_in_several_ways_is_followed_from_where_it_comes(made):
    def use(sample: Any) -> tf.Tensor:
        return LabelDP(1.0, CLASSES)(sample.features["id"], made(sample.features["y"]))

    Trained(use)
    with pytest.raises(ModelError, match="is used in train for metric 'y', not only"):
        Trained(use, extra=lambda m, s: m.add_metric("y", tf.reduce_mean(s.features["y"])))


def test_a_weight_that_counts_labels_is_refused():
    def weighed(logits: tf.Tensor, told: tf.Tensor) -> tf.Tensor:
        (count,) = tf.get_collection("count")
        return LabelDP(1.0, CLASSES).loss(logits, told) / tf.cast(count + 1, tf.float32)

    def counts(model: Any, sample: Any) -> None:
        tf.add_to_collection("count", tf.size(tf.boolean_mask(sample["y"], sample["y"] > 2)))

    with pytest.raises(ModelError, match="is used in train for the loss, not only"):
        Trained(plain(), extra=counts, loss=weighed)


def test_a_loss_of_the_label_itself_is_refused_and_a_prior_of_it():
    def beside(sample: Any) -> tf.Tensor:
        plain()(sample)
        return tf.cast(tf.reshape(sample["y"], [-1]), tf.int64)

    with pytest.raises(ModelError, match="is used in train for the loss, not only"):
        Trained(beside, extra=lambda m, s: None)

    def asks_the_label(sample: Any) -> tf.Tensor:
        prior = tf.one_hot(tf.reshape(tf.cast(sample["y"], tf.int32), [-1]), CLASSES)
        return RRWithPrior(1.0, CLASSES)(sample.features["id"], sample["y"], prior)

    with pytest.raises(ModelError, match="sample ids or prior of RRWithPrior 'label' are made from the label itself"):
        Trained(asks_the_label)


def test_a_label_beside_columns_in_one_tensor_is_followed_from_where_it_is_cut_out():
    whole = {"y": np.concatenate([X, LABELS[:, np.newaxis]], 1).astype(np.float32)}

    def use(sample: Any, leaks: bool) -> tf.Tensor:
        y = sample.features["y"][:, 3]
        sample.create({"x": sample.features["y"][:, :3]})
        if leaks:
            tf.get_default_graph().add_to_collection("leak", tf.reduce_mean(y))
        return LabelDP(1.0, CLASSES)(sample.features["id"], tf.cast(y, tf.int32))

    def fit(leaks: bool) -> None:
        def extra(model: Any, sample: Any) -> None:
            model.add_metric("x", tf.reduce_mean(sample.features["y"][:, :3]))
            for leak in tf.get_collection("leak"):
                model.add_metric("y", leak)

        columns = tf.feature_column.numeric_column
        tf.feature_column.numeric_column = lambda key, n: columns(key, 4 if key == "y" else n)
        try:
            Trained(lambda sample: use(sample, leaks), data=whole, extra=extra)
        finally:
            tf.feature_column.numeric_column = columns

    fit(False)
    with pytest.raises(ModelError, match="is used in train for metric 'y'"):
        fit(True)


def test_an_evaluation_on_training_rows_is_told(caplog):
    def evaluates(model: Any, sample: Any) -> Any:
        return tf.metrics.mean(sample["y"])

    with caplog.at_level(logging.WARNING, "efl"):
        Trained(plain(), evaluates=evaluates)
    assert re.search("the label itself .* is used in eval for .*: whatever of this is published", caplog.text)


# ---- two parties

PARTY = """
rng = np.random.RandomState(3)
rows = rng.normal(size=(4000, 8)).astype(np.float32)
answers = (rows @ rng.normal(size=(8, 3))).argmax(1).astype(np.int64)
def read(first, last):
    held = (rows[first:last], answers[first:last], np.arange(first, last))
    data = tf.data.Dataset.from_tensor_slices(held).repeat().batch(100)
    return tf.data.make_initializable_iterator(data).get_next()
batch = {efl.MODE.TRAIN: read(0, 3000), efl.MODE.EVAL: read(3000, 4000)}
def run(loss_fn, eval_fn):
    global model
    model = efl.FederalModel()
    model.input_fn(lambda m, mode: sample(m, batch[mode], ROLE)).loss_fn(loss_fn).eval_fn(eval_fn)
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.AdamOptimizer(0.02))).compile()
    model.fit(efl.procedure_fn.train_and_evaluate(train_step=150, eval_step=10, max_iter=2), checkpoint_dir="kept")
"""
LEADER = (
    PARTY
    + """
def logits(m, s, name, train):
    right = tf.reshape(m.recv(name, require_grad=train), [-1, 5])
    return dense(tf.concat([dense(s['x'], 4, 5, 'left', tf.tanh), right], 1), 10, 3, 'top')
label_dp = efl.privacy.LabelDP(epsilon=3.0, num_classes=3)
def loss_fn(m, s):
    z = logits(m, s, 'f', True)
    if PRIVATE:
        return label_dp.loss(z, label_dp(s.sample_ids, s['label']))
    return tf.nn.softmax_cross_entropy_with_logits_v2(labels=one_hot(s['label']), logits=z)
def eval_fn(m, s):
    accuracy = tf.metrics.accuracy(tf.reshape(s['label'], [-1]), tf.argmax(logits(m, s, 'g', False), 1))
    m.add_metric('accuracy', accuracy)
    return accuracy
run(loss_fn, eval_fn)
print('ACCURACY', [line['accuracy'] for line in model.history if line['mode'] == 'eval'][-1])
if PRIVATE:
    print('TABLE', [(r.adversary, r.relation, r.epsilon) for r in model.privacy_spent(1e-5).rows])
"""
)
FOLLOWER = (
    PARTY
    + """
def loss_fn(m, s):
    h = dense(s['x'], 4, 5, 'right', tf.tanh)
    m.send('f', h, require_grad=True)
    return h
def eval_fn(m, s):
    m.send('g', dense(s['x'], 4, 5, 'right', tf.tanh))
run(loss_fn, eval_fn)
"""
)


def test_two_parties_learn_nearly_what_they_learn_of_clean_labels(tmp_path):
    pytest.importorskip("dp_accounting")
    accuracies = {}
    for private in (False, True):
        (tmp_path / str(private)).mkdir()
        told = run_both(tmp_path / str(private), LEADER.replace("PRIVATE", str(private)), FOLLOWER)
        accuracies[private] = float(re.search(r"ACCURACY (\S+)", told["leader"].output)[1])
    assert accuracies[False] > 0.93 and accuracies[True] > accuracies[False] - 0.04, accuracies
    rows = {name: rest for name, *rest in eval(re.search(r"TABLE (.*)", told["leader"].output)[1])}
    assert rows["anyone, about the leader's labels alone"] == ["replace_label", 3.0]
    from efl.privacy.noise import LABEL, Ledger

    ledger = Ledger(tmp_path / "True" / "kept" / "leader" / "0" / "privacy")
    (terms,) = [phase.terms for phase in ledger.phases()]
    assert (terms["kind"], terms["group"], terms["epsilon"], terms["num_classes"]) == (LABEL, "labels/label", 3.0, 3)
    ledger.close()


def test_a_label_that_is_also_sent_is_refused_on_both_sides(tmp_path):
    leader = LEADER.replace("PRIVATE", "True").replace("    z = logits", "    m.send('y', s['label'])\n    z = logits")
    follower = FOLLOWER.replace("    h = dense", "    m.recv('y')\n    h = dense")
    told = run_both(tmp_path, leader, follower, expect=(1, 1))
    for result in told.values():
        assert re.search("is used in train for the operation 'efl_send/train/y'.*, not only the rand", result.output)


@pytest.mark.parametrize("name", ["LabelDP", "RRWithPrior"])
def test_the_names_are_public(name):
    assert name in efl.privacy.__all__ and getattr(efl.privacy, name).__doc__
    assert list(itertools.islice(efl.privacy.__all__, 1))  # sorted with the others
