"""What a model says where a user has asked for something else than was probably meant."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import CheckpointError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def model(optimizers: object = None) -> efl.Model:
    tf.reset_default_graph()
    x = tf.data.make_one_shot_iterator(tf.data.Dataset.range(40).repeat().batch(4)).get_next()
    made = efl.Model()
    column = [tf.feature_column.numeric_column("x", 1)]
    made.input_fn(lambda m, mode: efl.Sample({"x": tf.cast(x, tf.float32)[:, None]}, {"x": column}))
    made.loss_fn(lambda m, s: tf.reduce_mean(tf.square(tf.layers.dense(s["x"], 1, name="d"))))
    plain = efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(1e-4))
    return made.optimizer_fn(optimizers or plain)


def test_a_variable_of_two_optimizers_is_refused() -> None:
    def two(m: efl.Model, task: str | None) -> dict:
        held = tf.trainable_variables()
        return {
            tf.train.GradientDescentOptimizer(0.1): (held, None),
            tf.train.AdamOptimizer(0.1): (held[:1], "d"),
        }

    with pytest.raises(ModelError, match=r"gives d/kernel to more than one optimizer, or twice"):
        model(two).compile()


def test_several_workers_do_not_exist_yet() -> None:
    plain = tf.train.GradientDescentOptimizer(0.1)
    setter = efl.optimizer_fn.optimizer_setter(tf.train.SyncReplicasOptimizer(plain, 2))
    with pytest.raises(ModelError, match="SyncReplicasOptimizer needs several workers, which efl has not"):
        model(setter).compile()


def test_equal_numbers_make_equal_procedures() -> None:
    made = efl.procedure_fn
    assert made.train(max_step=np.int64(5)).describe() == made.train(max_step=5).describe() == "train(max_step=5)"
    timed = [made.train_and_evaluate(train_interval=t, eval_step=1).describe() for t in (1, 1.0, np.float32(1))]
    assert len(set(timed)) == 1
    assert "train_interval=1.5" in made.train_and_evaluate(train_interval=np.float64(1.5), eval_step=1).describe()
    held = model().compile()
    held.fit(made.train(max_step=np.int64(3)))
    assert held.steps_trained == 3


def test_a_model_bank_names_the_folders_below_and_targets_that_the_graph_has_not(tmp_path, caplog) -> None:
    folder = str(tmp_path / "ck")
    model().compile().fit(efl.procedure_fn.train(max_step=2), checkpoint_dir=folder)

    def load(path: str, names: object) -> None:
        made = model().compile()
        made.fit(lambda m: m.run_stage("bank", efl.stage.ModelBank(True, [{"load": names, "path": path}])))

    with pytest.raises(CheckpointError, match=r"no checkpoint there .*; there are checkpoints in \S*ck/local/0: give"):
        load(folder, ["*"])
    load(f"{folder}/local/0", {"d/kernel": "d/kernel", "d/bias": "d/biass"})
    assert "the graph has no d/biass: passed over" in caplog.text


def test_a_folder_that_is_deleted_meanwhile_is_claimed_again(tmp_path, caplog) -> None:
    folder = tmp_path / "ck"
    second: list[str] = []

    class Deletes(tf.train.SessionRunHook):
        steps = 0

        def after_run(self, context: object, values: object) -> None:
            self.steps += 1
            if self.steps == 3:
                shutil.rmtree(folder)
            if self.steps == 6:  # a checkpoint was written since
                from efl._checkpoint import CheckpointStore

                with pytest.raises(CheckpointError, match="is in use by another process"):
                    CheckpointStore(folder / "local" / "0").lock()
                second.append("refused")

    made = model()
    made.add_hooks([Deletes()])
    made.compile().fit(efl.procedure_fn.train(max_step=8), checkpoint_dir=str(folder), save_checkpoint_steps=2)
    assert second == ["refused"]
    assert "was deleted while it was in use: the checkpoints that lay there are gone" in caplog.text
    assert made.steps_trained == 8 and list((folder / "local" / "0").glob("step-*"))
