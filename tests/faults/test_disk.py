"""A disk that is full when a checkpoint is written. RLIMIT_FSIZE does it for one process, without root."""

import contextlib
import resource

import pytest
import tensorflow.compat.v1 as tf

from efl._checkpoint import CheckpointStore
from efl._position import Position
from efl.errors import CheckpointError
from tests.faults.runs import OPTIMIZERS, TRAIN, Federation, program, weights, write_data

STEP = 7  # from which on no file may be as large as a checkpoint; the one of step 6 is written
# A weight that nobody uses makes a checkpoint larger than anything else that a party writes.
FULL = f"""
import resource
class Full(tf.train.SessionRunHook):
    def after_run(self, context, values):
        if os.path.exists(f"full-{{ROLE}}") and model.steps_trained + 1 >= {STEP}:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
tf.get_variable("ballast", [100_000], initializer=tf.zeros_initializer())
model.add_hooks([Full()], mode=efl.MODE.TRAIN)
model.compile()
"""
WHAT_TO_DO = "The earlier ones are whole: make room (or repair what is wrong there), then start again as before"


def script(optimizer):
    return program(TRAIN, OPTIMIZERS[optimizer]).replace("\nmodel.compile()\n", FULL)


def checkpoints(folder, role):
    return [position.trained for position, _ in CheckpointStore(folder / "checkpoints" / role / "0").known()]


@pytest.mark.parametrize(
    ("victims", "optimizer"),
    [
        (["leader"], "momentum"),
        pytest.param(["follower"], "adam", marks=pytest.mark.full),
        pytest.param(["leader"], "adam", marks=pytest.mark.full),
        pytest.param(["follower"], "momentum", marks=pytest.mark.full),
        pytest.param(["leader", "follower"], "adam", marks=pytest.mark.full),
    ],
)
def test_a_full_disk_ends_both_in_words_and_a_restart_goes_on(tmp_path, undisturbed, tally, victims, optimizer):
    write_data(tmp_path)
    for role in victims:
        (tmp_path / f"full-{role}").touch()
    federation = Federation(tmp_path, script(optimizer))
    try:
        for role in ("leader", "follower"):
            federation.start(role)
        ended = {role: party.wait(60) for role, party in federation.parties.items()}
    finally:
        for party in federation.parties.values():
            party.kill()
    assert {role: result.returncode for role, result in ended.items()} == {"leader": 1, "follower": 1}
    for role, result in ended.items():
        last = result.output.splitlines()[-1]
        if role not in victims:
            assert last.startswith(f"efl.errors.PeerFailed: the {victims[0]} ("), federation.told()
        # Of two who both cannot write, one may hear of the other's trouble before its own.
        assert "CheckpointError: cannot write checkpoint checkpoints/" in last, federation.told()
        assert "/.writing-step-0000000009-" in last
        assert "File too large" in last
        assert WHAT_TO_DO in last
        # What was there is whole, and nothing else is.
        assert checkpoints(tmp_path, role)[:3] == [0, 3, 6], federation.told()
        assert not list((tmp_path / "checkpoints" / role / "0").glob(".writing*"))
    for role in victims:
        assert checkpoints(tmp_path, role) == [0, 3, 6]
        (tmp_path / f"full-{role}").unlink()
    federation.run({})
    assert "from the checkpoint of step 6" in federation.told()
    got = {name: value for name, value in weights(tmp_path).items() if not name.endswith("/ballast")}
    tally.compare("disk full at a checkpoint", len(victims), got, undisturbed(TRAIN, OPTIMIZERS[optimizer])[0])


@contextlib.contextmanager
def files_of_at_most(count):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_from_the_start_is_told_in_words(tmp_path):
    store = CheckpointStore(tmp_path / "held")
    with files_of_at_most(0), pytest.raises(CheckpointError, match="cannot write checkpoints below .*held: .* large"):
        store.lock()
    store.lock()  # nothing of the first attempt is left
    store.unlock()


def test_a_disk_that_is_full_when_the_manifest_is_written_leaves_the_earlier_ones(tmp_path):
    store = CheckpointStore(tmp_path)
    with tf.Graph().as_default(), tf.Session() as session:
        session.run(tf.get_variable("w", [2], initializer=tf.zeros_initializer()).initializer)
        saver = tf.train.Saver()
        store.save(session, saver, Position(1, 1, 0, 1), {"run": "a"})
        with files_of_at_most(2000), pytest.raises(CheckpointError, match=r"File too large"):
            store.save(session, saver, Position(2, 1, 0, 2), {"run": "a" * 4000})
    assert [position.trained for position, _ in CheckpointStore(tmp_path).known()] == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-0000000001-fit-1-loop-0000-at-0000000001"]
