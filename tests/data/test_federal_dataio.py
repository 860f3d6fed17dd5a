"""FederalDataIO: both parties read the same rows in the leader's order."""

from __future__ import annotations

import itertools
import json
import queue
from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.data import FederalDataIO
from efl.data.federal_dataio import _PART_BYTES, _split
from efl.errors import ConfigError, DataError, ProtocolError
from tests.data.records import example, write, write_ids
from tests.data.test_dataio import drain


class Line:
    """Both ends of a conversation in one process: records what is declared and hands plans over as JSON."""

    def __init__(self) -> None:
        self.plans: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.declared: dict[str, dict[str, Any]] = {"leader": {}, "follower": {}}
        self.blocks: dict[str, dict[str, tuple[str, ...]]] = {"leader": {}, "follower": {}}

    def end(self, role: str) -> Any:
        line = self

        class End:
            federal_role = role

            def declare(self, term: str, value: Any) -> None:
                line.declared[role][term] = value

            def send_plan(self, name: str, plan: dict[str, Any]) -> None:
                assert role == "leader"
                line.plans.put((name, json.dumps(plan)))

            def recv_plan(self, name: str) -> dict[str, Any]:
                sent, plan = line.plans.get(timeout=5)
                assert sent == name
                return json.loads(plan)

            def name_blocks(self, names: Any) -> None:
                line.blocks[role][efl.current_task_scope().wire] = tuple(names)

        return End()


def reader(line: Line, role: str, folder: Path, batch_size: int = 4, **options: Any) -> FederalDataIO:
    made = FederalDataIO(str(folder), batch_size, line.end(role), role, 0, 1, **options)
    made.fixedlen_feature("id", 1, tf.int64)
    return made


class Parties:
    """A leader's and a follower's reader, each in a graph and session of its own."""

    def __init__(self, leader: Path, follower: Path, **options: Any) -> None:
        self.line = Line()
        self.readers, self.ids, self.sessions = {}, {}, {}
        for role, folder in (("leader", leader), ("follower", follower)):
            with tf.Graph().as_default() as graph, efl.task_scope(efl.MODE.TRAIN):
                self.readers[role] = reader(self.line, role, folder, **options)
                self.ids[role] = self.readers[role].read()["id"]
                self.sessions[role] = tf.Session(graph=graph)

    def each(self, call: str) -> None:
        for role in ("leader", "follower"):
            getattr(self.readers[role], call)(self.sessions[role])

    def rest(self, role: str) -> list[int]:
        return [int(i) for batch in drain(self.sessions[role], self.ids[role]) for i in batch.ravel()]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("mode", ["local", "data-join"])
def test_both_read_the_same_rows_in_the_same_order(tmp_path: Path, mode: str, shuffle: bool) -> None:
    ids = write_ids(tmp_path / "l", [5, 9, 2, 7])
    write_ids(tmp_path / "f", [5, 9, 2, 7])
    parties = Parties(tmp_path / "l", tmp_path / "f", data_mode=mode, shuffle=shuffle, num_epochs=2)
    parties.each("initialize_iter")
    leader, follower = parties.rest("leader"), parties.rest("follower")
    assert leader == follower
    assert sorted(leader) == sorted(ids * 2)
    assert (leader == ids * 2) == (not shuffle)
    parties.readers["leader"].initialize_iter(parties.sessions["leader"])
    assert parties.line.plans.empty()  # a second time: no second plan
    parties.each("restart")
    assert parties.rest("leader") == parties.rest("follower") == leader


def test_the_seed_is_the_leaders(tmp_path: Path) -> None:
    for role in "lf":
        write_ids(tmp_path / role, [9, 9])
    orders = []
    for follower_seed in (1, 2):
        line = Line()
        with tf.Graph().as_default(), tf.Session() as sess:
            tf.set_random_seed(follower_seed)
            leader = reader(line, "leader", tmp_path / "l", shuffle=True, seed=7)
            leader.read()
            with tf.Graph().as_default() as graph, tf.Session(graph=graph) as other:
                tf.set_random_seed(100 + follower_seed)
                follower = reader(line, "follower", tmp_path / "f", shuffle=True, seed=follower_seed)
                ids = follower.read()["id"]
                leader.initialize_iter(sess)
                follower.initialize_iter(other)
                orders.append([int(i) for batch in drain(other, ids) for i in batch.ravel()])
    assert orders[0] == orders[1]


def test_the_follower_goes_on_where_the_leader_stands_after_a_restart(tmp_path: Path) -> None:
    for role in "lf":
        write_ids(tmp_path / role, [5, 9, 2, 7])
    parties = Parties(tmp_path / "l", tmp_path / "f", shuffle=True, num_epochs=2)
    parties.each("initialize_iter")
    for step in range(3):
        for role in ("leader", "follower"):
            if (role, step) != ("follower", 2):  # the follower is a step behind
                parties.sessions[role].run(parties.ids[role])
    state = parties.readers["leader"].reader_state(parties.sessions["leader"])
    expected = parties.rest("leader")

    again = Parties(tmp_path / "l", tmp_path / "f", shuffle=True, num_epochs=2)
    with again.sessions["leader"].graph.as_default():
        restore = again.readers["leader"].restore_from_reader_state_op(state)
    again.sessions["leader"].run(restore)
    again.each("initialize_iter")
    states = [again.readers[role].reader_state(again.sessions[role]) for role in ("leader", "follower")]
    assert states == [state, state]
    assert again.rest("follower") == again.rest("leader") == expected


def test_blocks_of_a_join_are_looked_up_by_name_and_the_follower_may_hold_more(tmp_path: Path) -> None:
    for folder, names in (("l", ["b/1", "d/1"]), ("f", ["a/1", "b/1", "c/1", "d/1"])):
        for name in names:
            write(tmp_path / folder / name, [example({"id": ord(name[0]) * 10 + i}) for i in range(3)])
    parties = Parties(tmp_path / "l", tmp_path / "f")
    parties.each("initialize_iter")
    assert parties.rest("follower") == parties.rest("leader") == [980, 981, 982, 1000, 1001, 1002]
    assert parties.line.blocks == {role: {"train": ("b/1", "d/1")} for role in ("leader", "follower")}


def test_the_blocks_of_one_worker_are_found_among_all_of_the_follower(tmp_path: Path) -> None:
    write_ids(tmp_path / "l", [1, 1, 1], ["b", "d", "e"])
    write_ids(tmp_path / "f", [1, 1, 1, 1], ["a", "b", "d", "e"])
    line = Line()
    with tf.Graph().as_default(), tf.Session() as sess:
        leader = FederalDataIO(str(tmp_path / "l"), 4, line.end("leader"), "leader", 1, 2)
        leader.fixedlen_feature("id", 1, tf.int64)
        leader.read()
        leader.initialize_iter(sess)
    with tf.Graph().as_default(), tf.Session() as sess:
        follower = FederalDataIO(str(tmp_path / "f"), 4, line.end("follower"), "follower", 1, 2)
        follower.fixedlen_feature("id", 1, tf.int64)
        ids = follower.read()["id"]
        follower.initialize_iter(sess)
        assert sess.run(ids).tolist() == [[2]]  # block "d", its third of four


def test_settings_are_declared_for_the_handshake(tmp_path: Path) -> None:
    for role in "lf":
        write_ids(tmp_path / role, [5])
    line = Parties(tmp_path / "l", tmp_path / "f", data_mode="local", drop_remainder=True).line
    assert (
        line.declared["leader"]
        == line.declared["follower"]
        == {
            "train/dataio/batch_size": 4,
            "train/dataio/num_epochs": 1,
            "train/dataio/drop_remainder": True,
            "train/dataio/data_mode": "local",
            "train/dataio/shuffle": False,
            "train/dataio/sampling": None,
            "train/dataio/worker_num": 1,
        }
    )


def test_local_files_of_different_names_are_refused(tmp_path: Path) -> None:
    write_ids(tmp_path / "l", [1, 1, 1], ["a", "b", "c"])
    write_ids(tmp_path / "f", [1, 1], ["b", "x"])
    parties = Parties(tmp_path / "l", tmp_path / "f", data_mode="local")
    with pytest.raises(DataError, match=r"Only the leader has: 'a', 'c'. Only the follower has: 'x'$"):
        parties.each("initialize_iter")


def test_a_block_that_the_follower_lacks_is_named(tmp_path: Path) -> None:
    write_ids(tmp_path / "l", [1, 1, 1], ["a", "b", "c"])
    write_ids(tmp_path / "f", [1, 1], ["a", "c"])
    parties = Parties(tmp_path / "l", tmp_path / "f")
    with pytest.raises(
        DataError, match=r"reads block 'b', which the follower does not hold in '.*f' .1 of 3 .*Copy the"
    ):
        parties.each("initialize_iter")


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": None}, {"blocks": [1]}, {"blocks": []}, {"parts": "2"}, {"part": 1}, {"seed": -1}, {"seed": 2**63},
        {"row": 1.5}, {"epoch": None}, {"position": 3}, {"epoch": 9},
    ],
)  # fmt: skip
def test_a_malformed_plan_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_ids(tmp_path, [1, 1])
    line = Line()
    with tf.Graph().as_default(), tf.Session() as sess:
        follower = reader(line, "follower", tmp_path)
        follower.read()
        good = {"seed": 0, "epoch": 0, "position": 0, "row": 0, "part": 0, "parts": 1, "blocks": ["part-0.tfrecord"]}
        line.plans.put(("run/dataio", json.dumps({**good, **change})))
        with pytest.raises(ProtocolError, match=r"the leader's plan"):
            follower.initialize_iter(sess)


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("00" * 32, "expected a secret from the leader, .* Give seed to both parties' readers, or .* to neither"),
        ("", "the leader's plan is malformed .a secret of 0 bytes, expected 32"),
        ("11" * 31, "the leader's plan is malformed .a secret of 31 bytes, expected 32"),
    ],
)
def test_a_secret_that_is_none_is_refused(tmp_path: Path, secret: str, message: str) -> None:
    write_ids(tmp_path, [9])
    line = Line()
    with tf.Graph().as_default(), tf.Session() as sess:
        follower = reader(line, "follower", tmp_path, sampling="poisson")
        follower.read()
        plan = {"seed": 0, "epoch": 0, "position": 0, "row": 0, "part": 0, "parts": 1, "blocks": ["part-0.tfrecord"]}
        line.plans.put(("run/dataio", json.dumps({**plan, "rows": [9], "secret": secret})))
        with pytest.raises(ProtocolError, match=message):
            follower.initialize_iter(sess)


def test_a_long_list_of_blocks_takes_several_messages() -> None:
    names = [f"bucket-{i:05}/{'é' * 20}.tfrecord" for i in range(10_000)]
    parts = _split(names)
    assert len(parts) > 1
    assert list(itertools.chain(*parts)) == names
    assert max(len(json.dumps(part)) for part in parts) <= _PART_BYTES
    assert _split([]) == [[]]
    assert _split(["x" * _PART_BYTES, "y"]) == [["x" * _PART_BYTES], ["y"]]


def test_a_plan_in_parts_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in "lf":
        write_ids(tmp_path / role, [2] * 5)
    monkeypatch.setattr("efl.data.federal_dataio._PART_BYTES", 200)
    parties = Parties(tmp_path / "l", tmp_path / "f", data_mode="local")
    parties.readers["leader"].initialize_iter(parties.sessions["leader"])
    assert parties.line.plans.qsize() == 3
    parties.readers["follower"].initialize_iter(parties.sessions["follower"])
    assert parties.rest("follower") == list(range(10))


def test_wrong_roles_modes_and_communicators_are_refused(tmp_path: Path) -> None:
    end = Line().end("leader")
    with pytest.raises(ConfigError, match=r"role='follower', but the communicator is the leader's"):
        FederalDataIO(str(tmp_path), 1, end, "follower", 0, 1)
    with pytest.raises(ConfigError, match=r"data_mode='join': expected 'data-join' or 'local'"):
        FederalDataIO(str(tmp_path), 1, end, "leader", 0, 1, data_mode="join")
    with pytest.raises(ConfigError, match=r"communicator=None: expected model.communicator"):
        FederalDataIO(str(tmp_path), 1, None, "leader", 0, 1)  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ConfigError, match=r"batch_size=0"):
        FederalDataIO(str(tmp_path), 0, end, "leader", 0, 1)


def test_init_dataset_needs_a_seed_to_shuffle(tmp_path: Path) -> None:
    write_ids(tmp_path, [9])
    line = Line()
    with pytest.raises(ConfigError, match=r"needs seed="):
        reader(line, "leader", tmp_path, shuffle=True).init_dataset()
    orders = []
    for role in ("leader", "follower"):
        dataset = reader(line, role, tmp_path, shuffle=True, seed=3).init_dataset()
        element = tf.data.make_one_shot_iterator(dataset).get_next()
        with tf.Session() as sess:
            orders.append([int(i) for batch in drain(sess, element) for i in batch["id"].ravel()])
    assert orders[0] == orders[1] != sorted(orders[0])
