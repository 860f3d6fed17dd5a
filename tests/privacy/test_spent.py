"""What a trained model has spent: from the ledger, across restarts, for each adversary."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ModelError
from efl.privacy.accounting import Mechanism, compute_epsilon
from tests.data.records import example, write
from tests.federation.harness import run_both
from tests.privacy import test_federation as federation

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS, BATCH = 40, 8
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)


def model(multiplier: float = 2.0, private: bool = True, **config: object) -> efl.Model:
    tf.reset_default_graph()
    data = tf.data.Dataset.from_tensor_slices(X).repeat().batch(BATCH, drop_remainder="static" in config)
    batch = tf.data.make_initializable_iterator(data).get_next()
    config.pop("static", None)
    made = efl.Model(seed=1)
    made.input_fn(lambda m, mode: efl.Sample({"x": batch}, {"x": [tf.feature_column.numeric_column("x", 3)]}))
    made.loss_fn(lambda m, sample: tf.reduce_sum(tf.square(tf.layers.dense(sample["x"], 2, name="d")), 1))
    plain, noisy = tf.train.GradientDescentOptimizer(0.1), efl.DPGradientDescentGaussianOptimizer
    optimizer = noisy(1.0, multiplier, learning_rate=0.1) if private else plain
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer))
    return made.compile(opt_config=config or None)


def test_epsilon_is_that_of_the_steps_taken_also_after_a_restart(tmp_path):
    folder = str(tmp_path)
    for steps in (10, 13):  # two epochs, then two and a part of a third
        trained = model(BATCH_SIZE=BATCH, NUM_EXAMPLES=ROWS)
        trained.fit(efl.procedure_fn.train(max_step=steps), checkpoint_dir=folder, save_checkpoint_steps=5)
        (row,) = trained.privacy_spent(1e-3).rows
        total = {10: 10, 13: 23}[steps]  # another procedure goes on with the weights
        expected = compute_epsilon([Mechanism(2.0, total, -(-total // 5))], 1e-3, sampling="none").epsilon
        assert row.epsilon == pytest.approx(expected, rel=1e-6)
        assert row.adversary == "outsider who sees the model" and not row.amplified
        assert row.reported is not None and row.reported < row.epsilon  # the Poisson figure, which is no guarantee
    assert "as commonly reported, not a guarantee here" in str(trained.privacy_spent(1e-3))


def test_a_role_that_a_model_of_one_party_is_given_makes_no_federation_of_it(monkeypatch):
    monkeypatch.setenv("EFL_FEDERAL_ROLE", "leader")  # as a shell may have it, after a federation was run in it
    trained = model(BATCH_SIZE=BATCH, NUM_EXAMPLES=ROWS)
    assert trained.settings.federal_role == "leader"
    trained.fit(efl.procedure_fn.train(max_step=2))
    (row,) = trained.privacy_spent(1e-3).rows
    assert row.adversary == "outsider who sees the model" and row.epsilon is not None


@pytest.mark.parametrize(
    ("config", "missing"),
    [({}, "NUM_EXAMPLES and BATCH_SIZE"), ({"static": True}, "NUM_EXAMPLES"), ({"NUM_EXAMPLES": ROWS}, "BATCH_SIZE")],
)
def test_without_sizes_it_trains_and_says_what_is_missing(config, missing):
    trained = model(**config)
    trained.fit(efl.procedure_fn.train(max_step=2))
    with pytest.raises(ModelError, match=rf"how often a row takes part is not known: .* without {missing}, and"):
        trained.privacy_spent(1e-3)


def test_a_model_that_released_nothing_has_nothing_to_say():
    trained = model(private=False)
    trained.fit(efl.procedure_fn.train(max_step=2))
    with pytest.raises(ModelError, match="nothing was released with noise yet"):
        trained.privacy_spent(1e-3)


def test_clipping_alone_is_no_guarantee():
    trained = model(multiplier=0.0, BATCH_SIZE=BATCH, NUM_EXAMPLES=ROWS)
    trained.fit(efl.procedure_fn.train(max_step=2))
    (row,) = trained.privacy_spent(1e-3).rows
    assert row.epsilon is None and row.reason.startswith("none (weights updated without noise)")


def test_what_moves_beside_the_optimizer_is_named_if_it_depends_on_the_data():
    def trained(add):
        tf.reset_default_graph()
        batch = tf.data.make_initializable_iterator(tf.data.Dataset.from_tensor_slices(X).repeat().batch(BATCH))
        made = over(
            lambda m, mode: efl.Sample({"x": batch.get_next()}, {"x": [tf.feature_column.numeric_column("x", 3)]})
        )
        loss = made.loss_fns[None]

        def with_more(m, sample):
            value = loss(m, sample)
            add(m, sample)
            return value

        made.loss_fn(with_more)
        made.optimizer_fn(
            efl.optimizer_fn.optimizer_setter(efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1))
        )
        made.compile(opt_config={"BATCH_SIZE": BATCH, "NUM_EXAMPLES": ROWS})
        made.fit(efl.procedure_fn.train(max_step=2))
        (row,) = made.privacy_spent(1e-3).rows
        return row

    def mean(name):
        return tf.get_variable(name, [3], trainable=False)

    def as_update(m, sample):
        moved = tf.assign(mean("mean"), 0.9 * mean_of(sample))
        tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, moved)

    def mean_of(sample):
        return tf.reduce_mean(sample["x"], 0)

    def as_train_op(m, sample):
        m.add_train_op(tf.scatter_add(mean("seen"), [0], mean_of(sample)[:1]))

    def average_of_weights(m, sample):
        average = tf.train.ExponentialMovingAverage(0.9)
        m.add_train_op(average.apply(tf.trainable_variables()))
        m.add_train_op(tf.assign_add(mean("noise"), tf.random.normal([3])))

    for add, name in ((as_update, "mean"), (as_train_op, "seen")):
        row = trained(add)
        assert row.epsilon is None
        assert row.reason == f"none (weights updated without noise): model: {name}"
    assert trained(average_of_weights).epsilon is not None
    assert trained(lambda m, sample: None).epsilon is not None


def over(batch):
    """A model that is trained on batches of ``X``."""
    made = efl.Model().input_fn(batch)
    made.loss_fn(lambda m, sample: tf.reduce_sum(tf.square(tf.layers.dense(sample["x"], 2, name="d")), 1))
    return made


def read_by_dataio(folder, optimizer=None, batch=BATCH, rows=ROWS, **kwargs):
    """The model over records, with a reader that knows how many there are."""
    if not folder.exists():
        write(folder / "part", (example({"x": X[i % ROWS]}) for i in range(rows)))
    tf.reset_default_graph()

    def input_fn(m, mode):
        reader = efl.data.DataIO(str(folder), batch, 0, 1, **kwargs)
        reader.fixedlen_feature("x", 3)
        return efl.Sample(reader.read(), {"x": [tf.feature_column.numeric_column("x", 3)]})

    noisy = optimizer or efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
    return over(input_fn).optimizer_fn(efl.optimizer_fn.optimizer_setter(noisy)).compile()


def test_a_reader_says_how_often_a_row_takes_part(tmp_path):
    trained = read_by_dataio(tmp_path / "data", num_epochs=3)
    trained.fit(efl.procedure_fn.train())
    assert trained.steps_trained == 15
    (row,) = trained.privacy_spent(1e-3).rows
    assert row.epsilon == pytest.approx(compute_epsilon([Mechanism(2.0, 15, 3)], 1e-3, sampling="none").epsilon)


def test_batches_of_more_rows_than_there_are_give_no_figure(tmp_path):
    trained = read_by_dataio(tmp_path / "data", batch=ROWS + 1, num_epochs=3)
    trained.fit(efl.procedure_fn.train(max_step=2))
    with pytest.raises(ModelError, match=f"batches of {ROWS + 1} of {ROWS} rows hold some more than once"):
        trained.privacy_spent(1e-3)


def test_batches_that_run_across_epochs_count_by_rows():
    # 36 rows: 5 batches of 8 in an epoch. Ten such are 80 rows, in which a row can take part three times.
    tf.reset_default_graph()
    data = tf.data.Dataset.from_tensor_slices(X[:36]).repeat().batch(BATCH)
    batch = tf.data.make_initializable_iterator(data).get_next()
    noisy = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
    made = over(lambda m, mode: efl.Sample({"x": batch}, {"x": [tf.feature_column.numeric_column("x", 3)]}))
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(noisy))
    made.compile(opt_config={"NUM_EXAMPLES": 36, "BATCH_SIZE": BATCH}).fit(efl.procedure_fn.train(max_step=10))
    (row,) = made.privacy_spent(1e-3).rows
    assert row.epsilon == pytest.approx(compute_epsilon([Mechanism(2.0, 10, 3)], 1e-3, sampling="none").epsilon)


def test_poisson_samples_are_amplified_if_they_are_hidden(tmp_path):
    sizes = {"batch": 20, "rows": 200, "num_epochs": 3, "sampling": "poisson"}
    trained = read_by_dataio(tmp_path / "data", **sizes)
    trained.fit(efl.procedure_fn.train(), checkpoint_dir=str(tmp_path / "saved"))
    assert trained.steps_trained == 30
    (row,) = trained.privacy_spent(1e-3).rows
    # What is added to δ because no sample is empty is nothing beside it.
    expected = compute_epsilon([Mechanism(2.0, 30, None, 0.1, poisson=True)], 1e-3).epsilon
    assert row.amplified and expected < row.epsilon == pytest.approx(expected, rel=1e-3)
    assert row.epsilon < 0.8 * compute_epsilon([Mechanism(2.0, 30, 3)], 1e-3, sampling="none").epsilon


def test_samples_so_small_that_they_are_often_empty_are_not_amplified(tmp_path):
    trained = read_by_dataio(tmp_path / "data", batch=2, num_epochs=2, sampling="poisson")
    trained.fit(efl.procedure_fn.train())
    (row,) = trained.privacy_spent(1e-3).rows
    assert not row.amplified and row.epsilon > 0


def test_micro_batches_of_samples_are_refused(tmp_path):
    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, num_microbatches=4, learning_rate=0.1)
    with pytest.raises(efl.errors.ConfigError, match="num_microbatches=4 with Poisson samples, whose size differs"):
        read_by_dataio(tmp_path / "data", optimizer, sampling="poisson")


def party(text, private, **config):
    return federation.party(text, private, **config).replace("install()\n", "")  # real noise, and a real ledger


SIZES = {"BATCH_SIZE": 16, "NUM_EXAMPLES": 96}


def tables(folder, change=lambda text: text):
    """The rows that each party prints, by adversary; ``change`` is applied to the follower's program."""
    say = "\nprint('TABLE', [(r.adversary, r.epsilon, r.reason) for r in model.privacy_spent(1e-3).rows])\n"
    follower = party(federation.FOLLOWER, True, **SIZES)
    changed = change(follower)
    told = run_both(folder, party(federation.LEADER, True, **SIZES) + say, changed + say)
    found = {role: re.search(r"TABLE (.*)", result.output)[1] for role, result in told.items()}
    return {role: {name: rest for name, *rest in eval(table)} for role, table in found.items()}


def without_amplification(*multipliers, relation="add_remove"):
    mechanisms = [Mechanism(each, 6, 1) for each in multipliers]  # six steps are one epoch: one participation
    return compute_epsilon(mechanisms, 1e-3, relation=relation, sampling="none").epsilon


def test_a_federation_says_who_learns_what(tmp_path):
    rows = tables(tmp_path)
    for role in rows:
        for seen in ("the leader's model", "the follower's model", "both models"):
            # One party's model is as good as both.
            expected = [pytest.approx(without_amplification(0.2, 0.2), rel=1e-6), ""]
            assert rows[role][f"outsider who sees {seen}"] == expected
        about_follower = rows[role]["the leader, with all that it received, about the follower's rows"]
        assert about_follower == [None, "none: f was sent raw"]
        about_leader = rows[role]["the follower, with all that it received, about the leader's rows"]
        # Its returned gradients are clipped and noised: they compose with its updates.
        twice = without_amplification(0.2, 0.2, relation="replace_one")
        assert about_leader == [pytest.approx(twice, rel=1e-6), ""]


OPTIMIZER = "optimizer_class(0.3, 0.2, learning_rate=0.5)"
TWO_GROUPS = """
        def of_two(m, task):
            first, *others = tf.trainable_variables()
            made = [optimizer_class(0.3, 0.2, learning_rate=0.5) for _ in range(2)]
            return {made[0]: ([first], None), made[1]: (others, None)}
        return of_two
"""


def test_the_peer_knows_of_micro_batches(tmp_path):
    def change(text):
        assert OPTIMIZER in text
        return text.replace(OPTIMIZER, OPTIMIZER.replace("0.2,", "0.2, 4,"))

    one, whole = Mechanism(0.2, 6, 1), Mechanism(0.2, 6, 1, microbatched=True)
    expected = compute_epsilon([one, whole], 1e-3, sampling="none").epsilon
    for rows in tables(tmp_path, change).values():
        assert rows["outsider who sees both models"] == [pytest.approx(expected, rel=1e-6), ""]


def test_the_peer_knows_of_several_clipping_groups(tmp_path):
    def change(text):
        begin = text.index("    if private:\n") + len("    if private:")
        return (
            text[:begin]
            + "\n        optimizer_class = efl.DPGradientDescentGaussianOptimizer"
            + TWO_GROUPS
            + (text[text.index("    return optimizer(") :])
        )

    expected = without_amplification(0.2, 0.2, 0.2)
    for rows in tables(tmp_path, change).values():
        assert rows["outsider who sees both models"] == [pytest.approx(expected, rel=1e-6), ""]


def test_a_peer_without_noise_leaves_outsiders_without_a_guarantee(tmp_path):
    say = "\nprint('TABLE', model.privacy_spent(1e-3))\n"
    leader = party(federation.LEADER, True, BATCH_SIZE=16, NUM_EXAMPLES=96, BACKEND_MODE="unnoise") + say
    told = run_both(tmp_path, leader, party(federation.FOLLOWER, False))["leader"].output
    assert "none (weights updated without noise): follower: its weights" in told
    assert re.search(r"the follower, .*about the leader's rows .*none: gradient of f was sent raw", told)
