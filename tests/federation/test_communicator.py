"""A communicator by itself, in sessions that are not efl's; and how it stands up to narrow and slow ones."""

import json
import re

import numpy as np
import pytest

import efl

import tensorflow.compat.v1 as tf  # isort: skip
from efl.errors import ConfigError, LinkError, ModelError
from tests.federation.harness import assert_same_weights, run_both
from tests.federation.problem import cross_entropy, dense, load
from tests.federation.test_parity import joint

MAKE = """
import json, os, resource, time
def write(result):
    json.dump(result, open(ROLE + '.json', 'w'))
def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
comm = efl.Communicator(
    ROLE, peer_addr=own_argument('peer_addr', ''), local_addr=own_argument('local_addr', ''), **OPTIONS)
"""


def talk(tmp_path, leader, follower, expect=(0, 0), options="{}", **more):
    make = MAKE.replace("OPTIONS", options)
    results = run_both(tmp_path, make + leader, make + follower, expect=expect, end="", **more)
    written = {
        role: json.loads((tmp_path / f"{role}.json").read_text())
        for role in results
        if (tmp_path / f"{role}.json").exists()
    }
    return results, written


# ---- sessions that are not efl's

LEADER_GRAPH = """
x = tf.reshape(comm.recv('x'), [-1, 3])
names = comm.recv('names', tf.string, shape=[2])
done = comm.send('y', 2.0 * x)
length = tf.strings.length(names)
"""
FOLLOWER_GRAPH = """
value = tf.placeholder(tf.float32, [None, 3])
sent = [comm.send('x', value), comm.send('names', tf.constant(['a', 'four']))]
y = comm.recv('y', shape=[None, 3])
def block(step):
    return np.full((step + 1, 3), step, np.float32)
"""


def test_a_monitored_session_with_its_hook(tmp_path):
    leader = """
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    write([sess.run([x, length, done])[1].tolist() for _ in range(6)])
"""
    follower = """
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    write([sess.run([y, sent], {value: block(step)})[0].tolist() for step in range(6)])
"""
    _, written = talk(tmp_path, LEADER_GRAPH + leader, FOLLOWER_GRAPH + follower)
    assert written["leader"] == [[1, 4]] * 6
    assert written["follower"] == [np.full((step + 1, 3), 2.0 * step).tolist() for step in range(6)]


def test_a_plain_session(tmp_path):
    leader = """
advance = comm.add_step()
with tf.Session() as sess:
    comm.initialize(sess)
    for step in range(6):
        if step % 2 == 0:
            sess.run([x, length, done])
        else:  # the ops of a step may run in several calls
            got = sess.run(x)
            assert sess.run(length).tolist() == [1, 4]
            sess.run(late, {twice: 2 * got})
        sess.run(advance)
    comm.shutdown(sess)
"""
    graph = LEADER_GRAPH.replace("done = comm.send('y', 2.0 * x)", "").replace("length =", "\nlength =")
    graph += """
twice = tf.placeholder_with_default(2.0 * x, [None, 3])
late = done = comm.send('y', twice)
"""
    follower = """
advance = comm.add_step()
with tf.Session() as sess:
    comm.initialize(sess)
    got = []
    for step in range(6):
        got.append(sess.run([y, sent], {value: block(step)})[0].tolist())
        sess.run(advance)
    write(got)
    comm.shutdown(sess)
"""
    _, written = talk(tmp_path, graph + leader, FOLLOWER_GRAPH + follower)
    assert written["follower"] == [np.full((step + 1, 3), 2.0 * step).tolist() for step in range(6)]


def test_a_communicator_can_be_used_again_after_shutdown(tmp_path):
    leader = """
for _ in range(2):
    with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
        for _ in range(3):
            sess.run([x, length, done])
"""
    follower = """
got = []
for turn in range(2):
    with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
        got += [sess.run([y, sent], {value: block(step)})[0].shape[0] for step in range(3)]
write(got)
"""
    _, written = talk(tmp_path, LEADER_GRAPH + leader, FOLLOWER_GRAPH + follower)
    assert written["follower"] == [1, 2, 3, 1, 2, 3]


GO_ON = """
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    for step in range(6):
        sess.run([x, length, done])
        write(step)
"""
FOREVER = """
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    for step in range(100):
        sess.run([y, sent], {value: block(step)})
"""


def go_away(how, session="tf.train.MonitoredSession(hooks=[comm.hook])", more=""):
    return f"""
with {session} as sess:
    {more}
    for step in range(3):
        sess.run([y, sent], {{value: block(step)}})
        {"sess.run(advance)" if more else ""}
    {how}
"""


PLAIN = {"session": "tf.Session()", "more": "comm.initialize(sess)"}


@pytest.mark.parametrize(
    ("graph", "leave"),
    [("", {}), ("advance = comm.add_step()\n", PLAIN)],
    ids=["with its hook", "without shutdown()"],
)
def test_a_peer_that_has_taken_its_last_step_ends_the_session_as_the_end_of_data_does(tmp_path, graph, leave):
    results, written = talk(tmp_path, LEADER_GRAPH + GO_ON, FOLLOWER_GRAPH + graph + go_away("pass", **leave))
    assert written["leader"] == 2
    assert "follower ended the run while leader still had steps to take" in results["leader"].output
    assert "Traceback" not in results["leader"].output + results["follower"].output


@pytest.mark.parametrize(
    ("graph", "leave", "where"),
    [("", {}, " at step 3"), ("advance = comm.add_step()\n", PLAIN, "")],
    ids=["with its hook", "without"],
)
def test_an_error_between_two_steps_ends_the_peer(tmp_path, graph, leave, where):
    follower = FOLLOWER_GRAPH + graph + go_away("raise KeyError('secret')", **leave)
    results, written = talk(tmp_path, LEADER_GRAPH + GO_ON, follower, expect=(1, 1))
    assert written["leader"] == 2
    last = results["leader"].output.rstrip().splitlines()[-1]
    assert "PeerFailed: the follower" in last
    assert last.endswith(f"failed{where} with KeyError (its own log says why)")
    assert "secret" not in results["leader"].output


@pytest.mark.parametrize(
    ("leave", "code", "told"),
    [
        ("os.kill(os.getpid(), 2); time.sleep(5)", -2, "follower was interrupted (Ctrl-C)"),
        ("raise SystemExit(3)", 3, "follower's program ended with the exit code 3"),
    ],
)
def test_a_program_that_is_ended_between_two_steps_ends_the_peer(tmp_path, leave, code, told):
    follower = FOLLOWER_GRAPH + go_away(leave)
    results, written = talk(tmp_path, LEADER_GRAPH + GO_ON, follower, expect=(1, code))
    assert written["leader"] == 2
    assert f" failed at step 3 with Interrupted: {told}" in results["leader"].output.rstrip().splitlines()[-1]
    assert "a callback of the channel failed" not in results["follower"].output


def test_an_error_in_the_graph_ends_both(tmp_path):
    check = "check = tf.debugging.assert_less(x, 1.5, message='too much')\n"
    broken = check + GO_ON.replace("[x, length, done]", "[x, length, done, check]")
    results, written = talk(tmp_path, LEADER_GRAPH + broken, FOLLOWER_GRAPH + FOREVER, expect=(1, 1))
    assert written["leader"] == 1
    assert "too much" in results["leader"].output
    told = results["follower"].output.rstrip().splitlines()[-1]
    assert "PeerFailed: the leader" in told
    assert "failed at step 3 with InvalidArgumentError" in told


@pytest.mark.parametrize("error", ["AbortedError", "UnavailableError"])
def test_a_monitored_session_is_not_made_anew_behind_the_peers_back(tmp_path, error):
    broken = f"""
plain, runs = tf.Session.run, []
def run(self, fetches, *more, **options):
    runs.append(fetches)
    if len([fetched for fetched in runs if "StringLength" in str(fetched)]) == 3:
        raise tf.errors.{error}(None, None, "gone")
    return plain(self, fetches, *more, **options)
tf.Session.run = run
{GO_ON}
"""
    results, written = talk(tmp_path, LEADER_GRAPH + broken, FOLLOWER_GRAPH + FOREVER, expect=(1, 1), timeout=60)
    assert written["leader"] == 1
    assert "gone (the session ends: a new one would be out of step with the peer)" in results["leader"].output
    assert "failed at step 3 with InternalError" in results["follower"].output


def test_a_peer_that_is_killed(tmp_path):
    options = "dict(limits=efl.transport.Limits(peer_timeout=2.0))"
    follower = FOLLOWER_GRAPH + go_away("import signal; os.kill(os.getpid(), signal.SIGKILL)")
    results, written = talk(tmp_path, LEADER_GRAPH + GO_ON, follower, expect=(1, -9), options=options)
    assert written["leader"] == 2
    assert "efl.errors.PeerLost: the follower" in results["leader"].output.rstrip().splitlines()[-1]
    # It has begun the next step, or not yet.
    assert re.search(r" (at step 4|after step 3) of run; ", results["leader"].output)


def test_a_plain_session_is_told_where_to_ask(tmp_path):
    leader = """
advance = comm.add_step()
with tf.Session() as sess:
    comm.initialize(sess)
    try:
        for step in range(6):
            sess.run([x, length, done])
            sess.run(advance)
    except tf.errors.InvalidArgumentError as error:
        assert "Communicator.check() raises why" in error.message, error.message
        try:
            comm.check()
        except efl.errors.PeerClosed as why:
            write([step, str(why)])
"""
    _, written = talk(tmp_path, LEADER_GRAPH + leader, FOLLOWER_GRAPH + go_away("pass"))
    assert written["leader"][0] == 3
    assert "follower ended the run" in written["leader"][1]


def test_any_printable_name_can_be_sent(tmp_path):
    # TensorFlow allows few letters in the name of an op; a tensor's name is the users' own.
    names = "NAMES = ['中文', ' x', '/', 'ä b:c(0)', '中国']\n"
    leader = """
got = [comm.recv(name, shape=[]) for name in NAMES]
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    write([float(value) for value in sess.run(got)])
"""
    follower = """
sent = [comm.send(name, tf.constant(float(i))) for i, name in enumerate(NAMES)]
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    sess.run(sent)
"""
    _, written = talk(tmp_path, names + leader, names + follower)
    assert written["leader"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_tensor_whose_op_cannot_be_made_is_not_announced(monkeypatch):
    def broken(*arguments):
        raise ValueError("no op")

    with tf.Graph().as_default():
        comm = make()
        with monkeypatch.context() as patch:
            patch.setattr("efl.communicator.call_python", broken)
            patch.setattr("efl.communicator.Inbox", broken)
            with pytest.raises(ValueError, match="no op"):
                comm.send("x", tf.constant(1.0))
            with pytest.raises(ValueError, match="no op"):
                comm.recv("y")
        assert comm._exchanged.specs == ()
        comm.send("x", tf.constant(1.0))
        comm.recv("y")


def test_checkpoint_versions(tmp_path):
    leader = """
with tf.Session() as sess:
    comm.initialize(sess)
    comm.send_ckpt_version(sess, 'step-100')
    write(comm.recv_ckpt_version(sess))
    comm.shutdown(sess)
"""
    follower = """
with tf.Session() as sess:
    comm.initialize(sess)
    version = comm.recv_ckpt_version(sess)
    comm.send_ckpt_version(sess, version + '!')
    write(version)
    comm.shutdown(sess)
"""
    _, written = talk(tmp_path, leader, follower)
    assert written == {"leader": "step-100!", "follower": "step-100"}


def test_the_states_of_two_readers(tmp_path):
    # More states than fit into the window: the leader waits until the follower takes some, and takes no step meanwhile.
    leader = """
block, row = tf.placeholder(tf.string), tf.placeholder(tf.int64)
tell = {name: comm.send_reader_state(name, block, row) for name in ('train', 'test')}
stop = {name: comm.terminate_reader(name) for name in ('train', 'test')}
with tf.Session() as sess:
    comm.initialize(sess)
    for i in range(60):
        sess.run(tell['train'], {block: f'part-{i}', row: 10 * i})
        if i < 3:
            sess.run(tell['test'], {block: 'other', row: 2**40 + i})
    sess.run([stop['train'], stop['test']])
    comm.shutdown(sess)
"""
    follower = """
state = {name: comm.recv_reader_state(name) for name in ('train', 'test')}
got = {'train': [], 'test': []}
with tf.Session() as sess:
    comm.initialize(sess)
    for name in ('train', 'test'):
        try:
            while True:
                block, row = sess.run(state[name])
                got[name].append([block.decode(), int(row)])
        except tf.errors.OutOfRangeError:
            pass
    comm.shutdown(sess)
write(got)
"""
    _, written = talk(tmp_path, leader, follower)
    assert written["follower"]["train"] == [[f"part-{i}", 10 * i] for i in range(60)]
    assert written["follower"]["test"] == [["other", 2**40 + i] for i in range(3)]


@pytest.mark.parametrize("late", [False, True], ids=["soon", "after the goodbye"])
def test_states_that_were_told_before_a_goodbye_are_taken_after_it(tmp_path, late):
    leader = """
block, row = tf.placeholder(tf.string), tf.placeholder(tf.int64)
tell, stop = comm.send_reader_state('train', block, row), comm.terminate_reader('train')
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    for i in range(3):
        sess.run(tell, {block: f'part-{i}', row: i})
    sess.run(stop)
"""
    follower = """
state, got = comm.recv_reader_state('train'), []
comm.connect()
if LATE:
    time.sleep(2.0)
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    while True:
        try:
            block, row = sess.run(state)
        except tf.errors.OutOfRangeError as error:
            write([got, 'ended the run' in str(error)])
            break
        got.append(int(row))
        time.sleep(0.5)
"""
    _, written = talk(tmp_path, leader, follower.replace("LATE", str(late)))
    assert written["follower"] == [[0, 1, 2], False]  # and the end that it was told, not the goodbye


# ---- narrow pools


def test_64_receives_with_one_thread(tmp_path):
    leader = """
batch = batches()
def loss_fn(m, s):
    parts = [tf.reshape(m.recv(f'f{i}', require_grad=True), [-1, 1]) for i in range(64)]
    h = dense(s['x'], 4, 8, 'left', tf.tanh)
    for i in range(8):
        m.send(f'h{i}', h[:, i : i + 1], require_grad=True)
    return cross_entropy(s['label'], dense(tf.concat([h, *parts], 1), 72, 3, 'top'))
"""
    follower = """
batch = batches()
def loss_fn(m, s):
    f = dense(s['x'], 4, 64, 'right', tf.tanh)
    for i in range(64):
        m.send(f'f{i}', f[:, i : i + 1], require_grad=True)
    parts = [tf.reshape(m.recv(f'h{i}', require_grad=True), [-1, 1]) for i in range(8)]
    return cross_entropy(s['label'], dense(tf.concat([*parts, f], 1), 72, 3, 'other'))
"""
    fit = """
model = efl.FederalModel(client_thread_num=1)
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer(0.1))
model.compile(session_config=tf.ConfigProto(inter_op_parallelism_threads=1, intra_op_parallelism_threads=1))
model.fit(efl.procedure_fn.train(max_step=10))
"""

    def loss(x, label, ids):
        h, f = dense(x[:, :4], 4, 8, "left", tf.tanh), dense(x[:, 4:], 4, 64, "right", tf.tanh)
        both = tf.concat([h, f], 1)
        return cross_entropy(label, dense(both, 72, 3, "top")) + cross_entropy(label, dense(both, 72, 3, "other"))

    run_both(tmp_path, leader + fit, follower + fit, args=["--server_thread_num=1"])
    got = {**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}
    assert_same_weights(got, joint(loss, rate=0.1))


def test_sends_that_wait_for_the_peer_do_not_keep_what_arrives_from_one_thread(tmp_path):
    # Both send a small tensor, then more than the window holds. Each one's only pool thread waits in a send; the small
    # tensors arrive all the same, and with them the credit that ends the wait.
    body = """
small = comm.send('small_' + ROLE, tf.constant(1.0))
with tf.control_dependencies([small]):
    big = [comm.send(f'big{i}_{ROLE}', tf.random.uniform([3 << 20])) for i in range(2)]
other = 'follower' if ROLE == 'leader' else 'leader'
got = [tf.size(comm.recv(f'big{i}_{other}')) for i in range(2)] + [comm.recv('small_' + other)]
one = tf.ConfigProto(inter_op_parallelism_threads=1, intra_op_parallelism_threads=1)
advance = comm.add_step()
with tf.Session(config=one) as sess:
    comm.initialize(sess)
    for _ in range(4):
        sizes = sess.run([*got, *big])[:3]
        sess.run(advance)
    write([float(size) for size in sizes])
    comm.shutdown(sess)
"""
    options = "{'limits': __import__('efl.transport').transport.Limits(max_outstanding_bytes=1 << 20)}"
    _, written = talk(tmp_path, body, body, options=options, timeout=60)
    assert written == {"leader": [3 << 20, 3 << 20, 1.0], "follower": [3 << 20, 3 << 20, 1.0]}


# ---- slow and silent peers


def test_a_deadline_names_party_tensor_step_and_time(tmp_path):
    leader = """
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    try:
        for _ in range(3):
            sess.run([x, length, done])
    except tf.errors.OpError:
        comm.check()
"""
    follower = """
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    sess.run([y, sent], {value: block(0)})
    time.sleep(4)
    sess.run([y, sent], {value: block(1)})
"""
    options = "{'default_timeout_milliseconds': 500, 'scanning_interval_milliseconds': 50} if ROLE == 'leader' else {}"
    results, _ = talk(tmp_path, LEADER_GRAPH + leader, FOLLOWER_GRAPH + follower, expect=(1, 1), options=f"({options})")
    told = results["leader"].output
    assert "DeadlineError: leader waited 0." in told
    assert "at step 2 of run for run/x, run/names from follower, which is alive" in told
    assert "default_timeout_milliseconds" in told


def test_a_federal_models_deadline_ends_both(tmp_path):
    leader = """
batch = batches()
def loss_fn(m, s):
    f = tf.reshape(m.recv('f', require_grad=True), [-1, 5])
    return cross_entropy(s['label'], dense(f, 5, 3, 'top'))
model = efl.FederalModel(default_timeout_milliseconds=500, scanning_interval_milliseconds=50)
"""
    follower = """
import time
batch = batches()
class Sleep(tf.train.SessionRunHook):
    steps = 0
    def before_run(self, context):
        self.steps += 1
        if self.steps == 4:
            time.sleep(4)
def loss_fn(m, s):
    m.send('f', dense(s['x'], 4, 5, 'right'), require_grad=True)
    m.add_hooks([Sleep()])
model = efl.FederalModel()
"""
    fit = """
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
model.compile().fit(efl.procedure_fn.train(max_step=10))
"""
    results = run_both(tmp_path, leader + fit, follower + fit, expect=(1, 1))
    assert "step 4 of train for train/f from follower, which is alive" in results["leader"].output
    assert "DeadlineError" in results["leader"].output
    assert "DeadlineError" in results["follower"].output  # the leader told why it left


ONE_WAY_LEADER = """
x = comm.recv('x')
first, mean = tf.reshape(x, [-1])[0], tf.reduce_mean(x)
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    before, got = megabytes(), []
    for step in range(2000):
        if step in (0, 50, 300):
            time.sleep(1)
        got.append(float(sess.run([first, mean])[0]))
    write({'got': got == list(range(2000)), 'grown': megabytes() - before})
"""
ONE_WAY_FOLLOWER = """
value = tf.placeholder(tf.float32)
sent = comm.send('x', value)
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    before = megabytes()
    for step in range(2000):
        sess.run(sent, {value: np.full(1 << 16, step, np.float32)})
    write({'grown': megabytes() - before})
"""


def test_a_sender_that_waits_for_nothing_does_not_fill_the_receivers_memory(tmp_path):
    _, written = talk(tmp_path, ONE_WAY_LEADER, ONE_WAY_FOLLOWER)  # 500 MB in all
    assert written["leader"]["got"]
    assert written["leader"]["grown"] < 100
    assert written["follower"]["grown"] < 100


def test_a_sender_gives_up_on_a_receiver_that_takes_nothing(tmp_path):
    leader = """
x = comm.recv('x')
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    sess.run(x)
    time.sleep(4)
"""
    follower = """
sent = comm.send('x', tf.zeros([100]))
with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
    try:
        for step in range(2000):
            sess.run(sent)
    except tf.errors.OpError:
        comm.check()
"""
    options = "{'default_timeout_milliseconds': 500}"
    results, _ = talk(tmp_path, leader, follower, expect=None, options=options)
    assert results["follower"].returncode == 1
    assert "DeadlineError: send('run/x', step=10): the leader (" in results["follower"].output
    assert "has not taken what was sent before within 0.5 s, but is alive" in results["follower"].output


# ---- refusals


def make(role="leader", peer_addr="", local_addr="localhost:50051", **more):
    return efl.Communicator(role, peer_addr, local_addr, **more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"role": "boss"}, "federal_role='boss': expected 'leader' or 'follower'"),
        ({"local_addr": ""}, r"a leader needs local_addr \(host:port\); it is empty"),
        ({"role": "follower"}, r"a follower needs peer_addr \(host:port\); it is empty"),
        ({"local_addr": "localhost"}, "address 'localhost' of the leader: expected 'host:port'"),
        ({"local_addr": "0.0.0.0:50051"}, "local_addr='0.0.0.0:50051': leader would listen on .* clear text"),
        ({"role": "follower", "peer_addr": "bank.example:5"}, "peer_addr='bank.example:5': follower would dial"),
        ({"client_thread_num": 0}, "client_thread_num=0: expected a positive number or None"),
        ({"server_thread_num": 0}, "server_thread_num=0: expected a positive number or None"),
        ({"default_timeout_milliseconds": 0}, "default_timeout_milliseconds=0: expected a positive number"),
        ({"scanning_interval_milliseconds": -1}, "scanning_interval_milliseconds=-1: expected a positive number"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_clear_text_beyond_this_machine_can_be_asked_for():
    assert make(local_addr="0.0.0.0:50051", insecure=True).federal_role == "leader"
    assert make("follower", peer_addr="bank.example:5", insecure=True).federal_role == "follower"
    assert make(peer_addr="bank.example:5").federal_role == "leader"  # a leader dials nobody


def test_names_are_unique_per_direction_and_scope():
    with tf.Graph().as_default():
        comm = make()
        comm.send("x", tf.zeros([2]))
        comm.recv("x")
        with efl.task_scope(efl.MODE.EVAL):
            comm.send("x", tf.zeros([2]))
        with pytest.raises(ModelError, match="send 'x' exists already in run: names are unique"):
            comm.send("x", tf.zeros([2]))
        with pytest.raises(ModelError, match="recv 'x' exists already in run"):
            comm.recv("x")
        for name in ("", 3, "a\nb", "x" * 201):
            with pytest.raises(ModelError, match="the name of a sent or received tensor is a text of 1 to 200"):
                comm.recv(name)
        with pytest.raises(ModelError, match=r"send\('s'\): expected a dense tensor, got SparseTensor"):
            comm.send("s", tf.sparse.from_dense([[1.0]]))
        with pytest.raises(ModelError, match=r"send\('o'\): expected a tensor, got object"):
            comm.send("o", object())


def test_without_a_peer_nothing_can_be_sent():
    with tf.Graph().as_default(), tf.Session() as sess:
        comm = make()
        with pytest.raises(LinkError, match=r"leader is not connected to follower; call initialize\(sess\) first"):
            comm.send_ckpt_version(sess, "1")
        sent = comm.send("x", tf.zeros([2]))
        with pytest.raises(tf.errors.OpError, match="'run/x' can only be sent within a step of a running federation"):
            sess.run(sent)
