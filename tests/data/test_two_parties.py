"""Readers and samples of two processes, over the real wire."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.records import example, write
from tests.parties import PartyResult, run_parties

SCRIPT = """
import json, sys
import efl
import tensorflow.compat.v1 as tf

role = next(a for a in sys.argv if a.startswith("--federal_role=")).split("=")[1]
options = json.loads(sys.argv[-1])
steps = options.pop("steps", None)
checkpoint_dir = options.pop("checkpoint_dir", None)
batch_size = options.pop("batch_size", 4)


class Ids(tf.train.SessionRunHook):
    def __init__(self, ids):
        self.ids, self.seen = ids, []

    def before_run(self, run_context):
        return tf.train.SessionRunArgs(self.ids)

    def after_run(self, run_context, run_values):
        self.seen += run_values.results.ravel().tolist()

    def end(self, session):
        print("ids", json.dumps(self.seen), flush=True)


def input_fn(model, mode):
    reader = efl.data.FederalDataIO(
        role, batch_size, model.communicator, model.federal_role, 0, 1, **options)
    reader.fixedlen_feature("sample_id", 1, dtype=tf.int64)
    reader.fixedlen_feature("x", 2)
    features = reader.read()
    model.add_hooks([reader.get_hook(), Ids(features["sample_id"])])
    columns = {"x": [tf.feature_column.numeric_column("x", 2)]}
    return efl.FederalSample(
        features, columns, model.federal_role, model.communicator, sample_id_name="sample_id")


def loss_fn(model, sample):
    hidden = tf.layers.dense(sample["x"], 2)
    if role == "follower":
        model.send("hidden", hidden, require_grad=True)
        return None
    received = tf.reshape(model.recv("hidden", require_grad=True), [-1, 2])
    return tf.reduce_mean(tf.square(tf.concat([hidden, received], 1) - 1.0))


model = efl.FederalModel()
model.input_fn(input_fn).loss_fn(loss_fn)
model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1)))
model.compile()
model.fit(efl.procedure_fn.train(steps), log_step=100, checkpoint_dir=checkpoint_dir)
"""


def write_blocks(folder: Path, blocks: dict[str, list[int]]) -> None:
    for name, ids in blocks.items():
        write(folder / name, [example({"sample_id": i, "x": [0.1 * i, 1.0]}) for i in ids])


def run(
    folder: Path,
    script: str = SCRIPT,
    leader: dict[str, Any] | None = None,
    follower: dict[str, Any] | None = None,
    **both: Any,
) -> dict[str, PartyResult]:
    args = {"leader": [json.dumps({**both, **(leader or {})})], "follower": [json.dumps({**both, **(follower or {})})]}
    return run_parties({"leader": script, "follower": script}, args=args, cwd=folder, timeout=90)


def seen(result: PartyResult) -> list[int]:
    assert result.returncode == 0, result.output
    found = re.search(r"^ids (\[.*\])$", result.output, re.MULTILINE)
    assert found is not None, result.output
    return list(json.loads(found.group(1)))


BLOCKS = {f"part-{k}": list(range(10 * k, 10 * k + 7)) for k in range(3)}
ALL = [i for ids in BLOCKS.values() for i in ids]


def test_both_parties_draw_the_same_random_order(tmp_path: Path) -> None:
    for role in ("leader", "follower"):
        write_blocks(tmp_path / role, BLOCKS)
    results = run(tmp_path, shuffle=True, num_epochs=2)
    leader = seen(results["leader"])
    assert leader == seen(results["follower"])
    assert sorted(leader) == sorted(2 * ALL)
    assert leader != 2 * ALL


def test_a_stopped_run_goes_on_with_the_next_row(tmp_path: Path) -> None:
    for role in ("leader", "follower"):
        write_blocks(tmp_path / role, BLOCKS)
    options = {"shuffle": True, "seed": 5, "checkpoint_dir": "saved"}
    first = run(tmp_path, steps=3, **options)
    rest = run(tmp_path, follower={"seed": 6}, **options)
    begun, ended = seen(first["leader"]), seen(rest["leader"])
    assert (seen(first["follower"]), seen(rest["follower"])) == (begun, ended)
    assert len(begun) == 12
    assert sorted(begun + ended) == ALL


def test_both_parties_draw_the_same_samples_also_after_a_stop(tmp_path: Path) -> None:
    for role in ("leader", "follower"):
        write_blocks(tmp_path / role, BLOCKS)
    options: dict[str, Any] = {"sampling": "poisson", "seed": 5, "num_epochs": 4}
    whole = run(tmp_path, follower={"seed": 6}, **options)
    assert seen(whole["leader"]) == seen(whole["follower"])
    parts = [seen(run(tmp_path, checkpoint_dir="saved", **more, **options)["follower"]) for more in ({"steps": 9}, {})]
    assert parts[0] + parts[1] == seen(whole["leader"])
    hidden = [seen(run(tmp_path, sampling="poisson", num_epochs=4)["leader"]) for _ in range(2)]
    assert hidden[0] != hidden[1]
    # 21 steps: the probability that a row is never drawn in them is 0.011.
    assert len(set(hidden[0])) > 15


def test_samples_of_blocks_of_different_size_end_both_sides(tmp_path: Path) -> None:
    write_blocks(tmp_path / "leader", BLOCKS)
    write_blocks(tmp_path / "follower", {**BLOCKS, "part-2": [20, 21, 22, 23, 24]})
    for output in failed(run(tmp_path, sampling="poisson")):
        assert "block 'part-2' has 5 rows here and 7 at the leader" in output


def failed(results: dict[str, PartyResult]) -> tuple[str, str]:
    assert all(result.returncode != 0 for result in results.values()), results
    return results["leader"].output, results["follower"].output


def test_settings_that_differ_end_the_handshake_on_both_sides(tmp_path: Path) -> None:
    for role in ("leader", "follower"):
        write_blocks(tmp_path / role, BLOCKS)
    for output in failed(run(tmp_path, leader={"batch_size": 8}, follower={"num_epochs": 3, "sampling": "poisson"})):
        assert "train/dataio/batch_size" in output
        assert "train/dataio/sampling: the leader has None, the follower has 'poisson, by a secret: give" in output
        assert "train/dataio/num_epochs" in output


@pytest.mark.parametrize("seeded", ["leader", "follower"])
def test_a_seed_of_samples_at_one_party_only_ends_the_handshake(tmp_path: Path, seeded: str) -> None:
    for role in ("leader", "follower"):
        write_blocks(tmp_path / role, BLOCKS)
    other = "follower" if seeded == "leader" else "leader"
    for output in failed(run(tmp_path, sampling="poisson", **{seeded: {"seed": 5}})):
        assert "train/dataio/sampling: the leader has 'poisson, " in output
        assert f"the {seeded} has 'poisson, by a seed: give both readers one'" in output
        assert f"the {other} has 'poisson, by a secret: give neither reader a seed'" in output


@pytest.mark.parametrize("mode", ["local", "data-join"])
def test_a_missing_block_ends_both_sides_and_is_named(tmp_path: Path, mode: str) -> None:
    write_blocks(tmp_path / "leader", BLOCKS)
    write_blocks(tmp_path / "follower", {name: BLOCKS[name] for name in ("part-0", "part-2")})
    leader, follower = failed(run(tmp_path, data_mode=mode))
    for output in (leader, follower):
        assert "DataError" in output or "PeerFailed" in output
        assert "'part-1'" in output


def test_ids_out_of_line_end_both_sides_with_block_and_row(tmp_path: Path) -> None:
    write_blocks(tmp_path / "leader", BLOCKS)
    write_blocks(tmp_path / "follower", {**BLOCKS, "part-1": [10, 11, 12, 14, 13, 15, 16]})
    for output in failed(run(tmp_path)):
        assert "SampleMismatch" in output
        assert "part-1" in output
        assert re.search(r"row 3\b", output)


def test_a_block_that_is_shorter_at_one_party_ends_both_sides_and_is_named(tmp_path: Path) -> None:
    # As a file that was cut exactly between two records: every record that is left can be read.
    write_blocks(tmp_path / "leader", BLOCKS)
    write_blocks(tmp_path / "follower", {**BLOCKS, "part-2": [20, 21, 22, 23, 24]})
    for output in failed(run(tmp_path)):
        assert "SampleMismatch" in output
        assert "follower's data ends there after row 4 of block part-2" in output
        assert "Compare how many records block part-2 has on both sides" in output
        assert "batch size" not in output


def test_a_cut_off_file_ends_both_sides_and_is_named(tmp_path: Path) -> None:
    for role in ("leader", "follower"):
        write_blocks(tmp_path / role, BLOCKS)
    path = tmp_path / "follower" / "part-1"
    path.write_bytes(path.read_bytes()[:-5])
    leader, follower = failed(run(tmp_path))
    assert re.search(r"DataError: .*cannot read record 6 of .*part-1", follower)
    assert "PeerFailed" in leader


def test_sub_folders_and_features_of_any_length_belong_to_their_row(tmp_path: Path) -> None:
    # Each party's rows say which row they are of, in a feature of 0 to 2 values; those of "old" are not to be read.
    def tags(role: str, i: int) -> list[int]:
        return [i + (100 if role == "follower" else 0)] * (i % 3)

    for role in ("leader", "follower"):
        for node in ("new", "newer", "old"):
            ids = {"new": range(7), "newer": range(10, 15), "old": range(20, 30)}[node]
            rows = (
                example({"sample_id": i, "x": [0.1 * i, 1.0], "tags": np.array(tags(role, i), np.int64)}) for i in ids
            )
            write(tmp_path / role / node / "part-0", rows)
    script = SCRIPT.replace(
        '    features = reader.read()\n',
        """    reader.varlen_feature("tags", tf.int64)
    reader.add_file_node("new")
    reader.add_file_nodes(["newer"])
    features = reader.read()
""",
    ).replace(
        '{"x": [tf.feature_column.numeric_column("x", 2)]}',
        """{"x": [tf.feature_column.numeric_column("x", 2), tf.feature_column.embedding_column(
        tf.feature_column.categorical_column_with_identity("tags", 200), 2, combiner="sum")]}""",
    ).replace(
        "    if role ==",
        """    told = tf.sparse.reduce_sum(sample.features["tags"], 1)
    if role == "follower":
        model.send("tags", told)
    else:
        model.add_hooks([Ids(tf.stack([told, model.recv("tags", tf.int64, shape=[None])], 1))])
    if role ==""",
        1,
    )  # fmt: skip
    results = run(tmp_path, script, shuffle=True, num_epochs=2)
    leader, follower = seen(results["leader"]), seen(results["follower"])
    assert leader == follower
    assert sorted(leader) == sorted(2 * [*range(7), *range(10, 15)])
    both = json.loads(re.findall(r"^ids (\[.*\])$", results["leader"].output, re.MULTILINE)[1])
    assert both == [sum(tags(role, i)) for i in leader for role in ("leader", "follower")]
