"""What the parties refuse, and that both sides say why, with an exit code, within seconds."""

import re
from pathlib import Path

import pytest

from tests.federation.harness import run_both, script
from tests.federation.test_parity import FOLLOWER, LEADER
from tests.parties import free_address, start_party

FIT = "model.compile().fit(efl.procedure_fn.train(max_step=10))"


def refused(tmp_path, leader, follower, *messages):
    results = run_both(tmp_path, leader, follower, expect=None, timeout=60)
    for role, result in results.items():
        assert result.returncode == 1, result.output
        for internal in ("/pace", "/grad"):
            assert internal not in result.output, f"{role} bothers the user with {internal}:\n{result.output}"
        for message in messages:
            assert message in result.output, f"{role} does not say {message!r}:\n{result.output}"
    return results


@pytest.mark.parametrize(
    ("edit_leader", "edit_follower", "messages"),
    [
        (("m.recv('f',", "m.recv('g',"), None, ["train/f", "train/g"]),
        (
            None,
            ("m.send('f', h, require_grad=True)\n    return h", "m.send('f', h)\n    return tf.reduce_mean(h)"),
            ["train/f", "require_grad"],
        ),
        (
            ("m.recv('f', require_grad=True)", "m.recv('f', shape=[None, 7], require_grad=True)"),
            None,
            ["train/f", "7", "5"],
        ),
        (
            ("m.recv('f', require_grad=True)", "tf.cast(m.recv('f', tf.float64, require_grad=True), tf.float32)"),
            None,
            ["train/f", "float64", "float32"],
        ),
        (None, ("max_step=10", "max_step=11"), ["procedure", "train(max_step=10)", "train(max_step=11)"]),
        (
            ("train(max_step=10)", "train(max_step=10), project_name='other'"),
            None,
            ["project_name", "other", "default_prj"],
        ),
    ],
    ids=["name", "gradient", "shape", "dtype", "procedure", "project"],
)
def test_a_different_exchange_is_named_on_both_sides(tmp_path, edit_leader, edit_follower, messages):
    leader = LEADER.replace(*edit_leader) if edit_leader else LEADER
    follower = FOLLOWER.replace(*edit_follower) if edit_follower else FOLLOWER
    assert edit_leader is None or leader != LEADER
    assert edit_follower is None or follower != FOLLOWER
    refused(tmp_path, leader, follower, *messages)


NOT_BUILT = {
    "input_fn": (
        ("lambda m, mode: sample(m, batch, ROLE)", "lambda m, mode: batch"),
        "ModelError: input_fn of the model for TRAIN returned a tuple: expected an efl.Sample or efl.FederalSample",
    ),
    "column": (
        (
            "sample(m, batch, ROLE)",
            "efl.Sample({'x': batch[0]}, {'x': [tf.feature_column.numeric_column('age')]}, name='mine')",
        ),
        "DataError: mine: group 'x', column 'age' needs the feature 'age'; the features are: 'x'",
    ),
    "folder": (
        (
            "sample(m, batch, ROLE)",
            "(lambda r: (r.fixedlen_feature('x', 4), r.read()))"
            "(efl.data.FederalDataIO('nowhere', 4, m.communicator, ROLE, 0, 1))",
        ),
        "DataError: 'nowhere' is not a folder",
    ),
    "optimizer": (
        (".optimizer_fn(optimizer())", ""),
        "ModelError: the model has a loss_fn and trainable variables but no optimizer_fn",
    ),
    "option": (
        ("compile()", "compile(opt_config={'REDUSE': 'sum'})"),
        "ConfigError: opt_config has unknown keys REDUSE",
    ),
}


@pytest.mark.parametrize(
    ("failing", "case"),
    [
        ("leader", "input_fn"),
        ("follower", "input_fn"),
        ("follower", "column"),
        ("leader", "folder"),
        ("follower", "optimizer"),
        ("leader", "option"),
    ],
)
def test_a_party_that_cannot_be_built_tells_the_other(tmp_path, failing, case):
    edit, message = NOT_BUILT[case]
    code = {"leader": LEADER, "follower": FOLLOWER}
    code[failing] = code[failing].replace(*edit)
    assert code[failing] not in (LEADER, FOLLOWER)
    results = run_both(tmp_path, code["leader"], code["follower"], expect=(1, 1), timeout=40)
    other = results["follower" if failing == "leader" else "leader"].output
    own = results[failing].output
    assert f"{failing} could not begin: {message}" in own
    assert f"efl.errors.{message}" in own.splitlines()[-1]
    assert f"the {failing} could not begin: {message}" in other
    assert "HandshakeError" in other


@pytest.mark.parametrize("failing", ["leader", "follower"])
def test_a_party_whose_fit_cannot_begin_tells_the_other(tmp_path, failing):
    code = {"leader": LEADER, "follower": FOLLOWER}
    code[failing] += "\nmodel.fit(efl.procedure_fn.train(max_step=2), log_step=0)\n"
    other = "follower" if failing == "leader" else "leader"
    code[other] += "\nmodel.fit(efl.procedure_fn.train(max_step=2))\n"
    results = run_both(tmp_path, code["leader"], code["follower"], end="", expect=(1, 1), timeout=40)
    told = "ConfigError: log_step=0: expected a positive number of steps"
    assert results[failing].output.splitlines()[-1] == f"efl.errors.{told}"
    assert f"the {failing} could not begin: {told}" in results[other].output.splitlines()[-1]


@pytest.mark.parametrize("failing", ["leader", "follower"])
@pytest.mark.parametrize("place", ["before compile()", "after compile()", "between fits"])
def test_a_program_that_fails_between_its_calls_tells_the_other(tmp_path, failing, place):
    again = "model.fit(efl.procedure_fn.train(max_step=2))\n"
    compiled = "model.compile()"
    edit = {
        "before compile()": (compiled, "{}\n" + compiled),
        "after compile()": (compiled + ".fit", compiled + "\n{}\nmodel.fit"),
        "between fits": (again, "{}\n" + again),
    }[place]
    code = {"leader": LEADER + again, "follower": FOLLOWER + again}
    code[failing] = code[failing].replace(edit[0], edit[1].format("{}['secret']"))
    results = run_both(tmp_path, code["leader"], code["follower"], end="", expect=(1, 1), timeout=40)
    other = results["follower" if failing == "leader" else "leader"].output
    assert results[failing].output.splitlines()[-1] == "KeyError: 'secret'"
    assert f"the {failing} could not begin: KeyError: its own log says why" in other.splitlines()[-1]
    assert "secret" not in other


def test_an_error_that_the_other_knows_is_not_told_again(tmp_path):
    leader = LEADER.replace("    return cross_entropy", "    raise ValueError\n    return cross_entropy")
    results = run_both(tmp_path, leader, FOLLOWER, end="", expect=(1, 1), timeout=40)
    assert results["leader"].output.count("leader could not begin") == 1


def test_an_error_in_a_users_function_is_told_by_its_type(tmp_path):
    follower = FOLLOWER.replace("    return h\n", "    raise KeyError('secret value 4711')\n")
    results = run_both(tmp_path, LEADER, follower, expect=(1, 1), timeout=40)
    assert "secret value 4711" in results["follower"].output
    assert "the follower could not begin: KeyError: its own log says why" in results["leader"].output
    assert "4711" not in results["leader"].output


def test_a_party_that_cannot_be_built_does_not_wait_long_for_somebody_to_tell(tmp_path):
    leader = "import time\n" + LEADER.replace("model.compile()", "begun = time.monotonic()\ntry:\n    model.compile()\n"
        "finally:\n    print('gave up after', time.monotonic() - begun)\nmodel"
    ).replace(".optimizer_fn(optimizer())", "")  # fmt: skip
    results = run_both(tmp_path, leader, "pass\n", end="", expect=(1, 0))
    output = results["leader"].output
    assert "but no optimizer_fn" in output.splitlines()[-1]
    assert output.index("leader could not begin") < output.index("gave up after")
    assert 4 < float(re.findall(r"gave up after ([\d.]+)", output)[0]) < 12  # 5 s, and what a busy machine adds


def test_two_leaders(tmp_path):
    # Both dial or listen as the role says, so two followers meet nobody and two leaders want one port.
    leader = LEADER.replace("efl.FederalModel()", "efl.FederalModel(connect_timeout=3.0)")
    second = leader.replace(
        "efl.FederalModel(", "efl.FederalModel(federal_role='leader', local_addr=own_argument('peer_addr'), "
    )
    results = run_both(tmp_path, leader, second, expect=None, timeout=60)
    assert {result.returncode for result in results.values()} == {1}
    text = results["leader"].output + results["follower"].output
    assert "another program holds the port" in text
    assert "no follower came" in text


def test_sample_ids_out_of_line(tmp_path):
    follower = FOLLOWER.replace(
        "batch = batches()",
        "batch = batches(); x, y, i = batch\n"
        "import tests.federation.problem as p\n"
        "i = tf.where(tf.equal(i, 100 + 2 * p.BATCH + 3), i + 1, i)\nbatch = (x, y, i)",
    )
    refused(tmp_path, LEADER, follower, "differ at step 3 of train", "row 3 of the batch")


def test_sample_ids_out_of_line_under_a_message_made_before_the_batch(tmp_path):
    early = """
import time
from efl._steps.disputes import Disputes
note = Disputes.note
def late(self, scope, batch):
    time.sleep(0.2)  # the message must not leave before the ids are known
    note(self, scope, batch)
Disputes.note = late
batch = batches(first=0 if ROLE == 'leader' else 16, rows=48)
other = 'leader' if ROLE == 'follower' else 'follower'
model = efl.FederalModel()
model.send('from ' + ROLE, batch[0])
def loss_fn(m, s):
    return cross_entropy(s['label'], dense(tf.reshape(m.recv('from ' + other), [-1, 8]), 8, 3, 'own'))
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer())
model.compile().fit(efl.procedure_fn.train(max_step=3))
"""
    refused(tmp_path, early, early, "differ at step 1 of train", "row 0 of the batch")


def test_batches_of_different_size(tmp_path):
    follower = FOLLOWER.replace(
        "batch = batches()", "import tests.federation.problem as p\np.BATCH = 8\nbatch = batches()"
    )
    refused(tmp_path, LEADER, follower, "differ at step 1 of train", "give both the same batch size")


@pytest.mark.parametrize("static", [True, False])
def test_batches_of_different_size_whose_ids_are_not_compared(tmp_path, static):
    plain = "efl.FederalSample({'x': x_of(batch)}, COLUMN, ROLE, None, verify_id=False)"
    both = (
        "COLUMN = {'x': [tf.feature_column.numeric_column('x', 4)]}\n"
        "import tests.federation.problem as p\n"
        "p.BATCH = 16 if ROLE == 'leader' else 8\n"
        f"x_of = lambda batch: tf.ensure_shape(batch[0][:, :4], [{'p.BATCH' if static else None}, 4])\n"
    )
    leader = both + LEADER.replace("sample(m, batch, ROLE)", plain).replace("s['label']", "batch[1]")
    follower = both + FOLLOWER.replace("sample(m, batch, ROLE)", plain)
    results = run_both(tmp_path, leader, follower, expect=(1, 1), timeout=60)
    told = (
        r"DataError: step 1 of train failed \(.+\): follower sent 'f' with 8 rows, and the batch of leader has 16: "
        "give both the same batch size"
    )
    assert re.search("efl.errors." + told, results["leader"].output.splitlines()[-1])
    assert re.search(r"the leader .* failed at step 1 of train with " + told, results["follower"].output)


def test_a_shorter_batch_than_the_shape_that_the_receiver_gave(tmp_path):
    leader = LEADER.replace("require_grad=True)", "require_grad=True, shape=[16, 5])").replace(
        "batches()", "batches(rows=40)"
    )
    results = run_both(tmp_path, leader, FOLLOWER.replace("batches()", "batches(rows=40, epochs=1)"), expect=(1, 1))
    for result in results.values():
        assert (
            "shape (16, 5) was agreed, the array has (8, 5). Agreed is what the sender's static shape and the "
            in (result.output.splitlines()[-1])
        )
        assert "recv(shape=…) say together; None stands for what varies" in result.output.splitlines()[-1]


@pytest.mark.parametrize("where", ["tf.while_loop(lambda i: i < 3, lambda i: (SEND, i + 1)[1], [0])",
                                   "tf.cond(m.training_flag, lambda: SEND, lambda: tf.no_op())"])  # fmt: skip
def test_a_send_in_a_loop_or_a_branch_is_refused(tmp_path, where):
    send = "m.send('f', h, require_grad=True)"
    follower = FOLLOWER.replace(send, where.replace("SEND", send))
    results = run_both(tmp_path, LEADER, follower, expect=(1, 1), timeout=40)
    for result in results.values():
        assert "ModelError: send('f') inside tf.cond, tf.while_loop or a tf.function" in result.output


def test_one_side_verifies_ids_and_the_other_does_not(tmp_path):
    follower = FOLLOWER.replace(
        "sample(m, batch, ROLE)",
        "efl.Sample({'x': batch[0][:, 4:]}, {'x': [tf.feature_column.numeric_column('x', 4)]})",
    )
    refused(tmp_path, LEADER, follower, "train/sample_id")


def test_a_loss_that_is_nan_stops_both_and_names_party_and_step(tmp_path):
    leader = LEADER.replace(
        "    return cross_entropy",
        "    s_ = tf.cast(m.global_step, tf.float32)\n    return tf.where(s_ < 3.0, 1.0, np.nan) * cross_entropy",
    )
    results = run_both(tmp_path, leader, FOLLOWER, expect=(1, 1))
    for result in results.values():
        assert "the loss of leader is nan at step 4 of train" in result.output
    assert re.search(r"the leader \(.*\) failed with NonFiniteLoss: the loss", results["follower"].output)


def test_logits_in_place_of_probabilities_stop_both_and_their_range_stays_at_home(tmp_path):
    leader = LEADER.replace(
        "    return cross_entropy",
        "    p = tf.where(tf.equal(m.global_step, 2), 47.5, 0.5) * tf.ones([2])\n"
        "    m.add_metric('auc', efl.metrics.auc([0, 1], p))\n    return cross_entropy",
    )
    results = run_both(tmp_path, leader, FOLLOWER, expect=(1, 1))
    for result in results.values():
        assert "auc: predictions must lie in [0, 1]: pass probabilities" in result.output
        assert "(leader, step 3 of train)" in result.output
    assert "predictions range from 47.5 to 47.5" in results["leader"].output
    assert "47.5" not in results["follower"].output


def test_an_error_in_one_partys_own_code_ends_the_other(tmp_path):
    hook = """
class Breaks(tf.train.SessionRunHook):
    def before_run(self, context):
        if model.steps_trained == 2:
            raise KeyError('secret value 4711')
"""
    leader = hook + LEADER.replace(FIT, "model.add_hooks([Breaks()])\n" + FIT)
    results = run_both(tmp_path, leader, FOLLOWER, expect=(1, 1))
    assert "secret value 4711" in results["leader"].output
    assert "KeyError" in results["follower"].output
    assert "secret value" not in results["follower"].output


def test_no_peer(tmp_path):
    leader = LEADER.replace("efl.FederalModel()", "efl.FederalModel(connect_timeout=1.0)")
    results = run_both(tmp_path, leader, "pass\n", end="", expect=(1, 0))
    assert "no follower came" in results["leader"].output


def test_a_contradicting_mode_is_refused(tmp_path):
    follower = FOLLOWER.replace("m.send('f', h, require_grad=True)", "m.send('f', h, mode=efl.MODE.EVAL)")
    leader = LEADER.replace("efl.FederalModel()", "efl.FederalModel(connect_timeout=1.0)")
    results = run_both(tmp_path, leader, follower, expect=(1, 1))
    assert "mode=eval inside train: the peer would wait for ever" in results["follower"].output


@pytest.mark.parametrize("late", ["model.send('late', tf.zeros([2]))", "model.recv('late')"])
def test_an_exchange_after_compile_is_refused(tmp_path, late):
    # It would run in no step: the peer of a late send waited for ever, what came for a late receive was never taken.
    follower = FOLLOWER.replace("model.compile()", f"model.compile()\n{late}\nmodel")
    assert late in follower
    results = refused(tmp_path, LEADER, follower, "call it in loss_fn or eval_fn")
    assert f"{late[6:10]}('late') after compile()" in results["follower"].output


@pytest.mark.parametrize(
    ("early", "why"),
    [
        ("model.send('early', tf.zeros([2]), mode=efl.MODE.EVAL)", "in eval, but task None has no eval_fn"),
        ("model.recv('early', task='other')", "in train:other, but task 'other' has no loss_fn"),
    ],
)
def test_an_exchange_in_a_scope_without_steps_is_refused(tmp_path, early, why):
    follower = FOLLOWER.replace("model.compile()", f"{early}\nmodel.compile()")
    assert early in follower
    refused(tmp_path, LEADER, follower, f"'early': sent or received {why}", "and the peer would wait for ever")


def test_a_message_in_input_fn_is_refused(tmp_path):
    follower = FOLLOWER.replace("lambda m, mode: sample(m, batch, ROLE)", "early").replace(
        "model = efl", "def early(m, mode):\n    m.send('x', batch[0])\n    return sample(m, batch, ROLE)\nmodel = efl"
    )
    assert "def early" in follower
    refused(tmp_path, LEADER, follower, "send('x') in input_fn: a message tells the peer that there is a batch")


def test_an_exchange_in_an_optimizer_is_refused(tmp_path):
    late = """
class Late(tf.train.GradientDescentOptimizer):
    def apply_gradients(self, *arguments, **options):
        model.send('late', tf.zeros([2]))
        return super().apply_gradients(*arguments, **options)
"""
    follower = FOLLOWER.replace("optimizer()", "efl.optimizer_fn.optimizer_setter(Late(0.1))")
    assert "Late" in follower
    refused(tmp_path, LEADER, late + follower, "send('late') while the updates of train are made")


def test_without_a_role(tmp_path):
    code = "import sys\nsys.argv = sys.argv[:1]\n"
    results = run_both(tmp_path, code + LEADER, code + FOLLOWER, expect=(1, 1))
    assert "--federal_role=leader or --federal_role=follower" in results["leader"].output


@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_a_party_that_is_killed_is_missed_within_seconds(tmp_path, victim):
    code = {"leader": LEADER, "follower": FOLLOWER}
    address = free_address()
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    endless = {
        role: script(
            body.replace("max_step=10), ", "), ")
            .replace("train(max_step=10)", "train(), log_step=5")
            .replace("efl.FederalModel()", "efl.FederalModel(peer_timeout=3.0)")
        )
        for role, body in code.items()
    }
    parties = {role: start_party(role, text, cwd=tmp_path, address=address, env=env) for role, text in endless.items()}
    try:
        for party in parties.values():
            party.wait_for("step=50")
        parties[victim].kill()
        (survivor,) = (party for role, party in parties.items() if role != victim)
        result = survivor.wait(timeout=30)
    finally:
        for party in parties.values():
            party.kill()
    assert result.returncode == 1
    assert re.search(rf"lost the {victim} .* at step \d+ of train", result.output)
    assert re.search(rf"PeerLost: the {victim} .* did not come back within peer_timeout=3 s", result.output)


def test_what_trains_nothing_or_something_else_than_was_meant_is_told(tmp_path):
    leader = """
def loss_fn(m, s):
    m.recv('h', require_grad=True, shape=[None, 5])
    return cross_entropy(s['label'], dense(s['x'], 4, 3, 'top'))
"""
    follower = """
def loss_fn(m, s):
    h = dense(s['x'], 4, 5, 'right')
    m.send('h', tf.identity(h), require_grad=True)
    return h
"""
    common = """
batch = batches()
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).optimizer_fn(optimizer()).compile()
model.fit(efl.procedure_fn.train(max_step=2), log_step=1)
"""
    results = run_both(tmp_path, leader + common, follower + common)
    assert "nothing that is differentiated depends on the received tensor 'h'" in results["leader"].output
    told = results["follower"].output
    assert "returned a tensor of shape (None, 5), whose mean or sum (REDUCE) is minimised" in told
    assert "return the very tensor that was handed to send(), or None" in told
