"""The harness itself: a party that it starts behaves as one that a user starts."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parties import PartiesTimeout, free_address, run_parties, start_party

SHOW = """
    import os, sys
    print(__name__, os.path.basename(__file__), os.getcwd(), sys.argv[1:])
"""


def test_each_party_gets_its_role_and_the_common_address(tmp_path: Path) -> None:
    result = run_parties({"leader": SHOW, "follower": SHOW}, args=["--seed=1"], cwd=tmp_path)
    for role, flag in (("leader", "--local_addr"), ("follower", "--peer_addr")):
        assert result[role].returncode == 0, result[role].output
        assert result[role].output.startswith(f"__main__ {role}.py {tmp_path} ['--federal_role={role}', '{flag}=127.")
        assert result[role].output.endswith("'--seed=1']\n")
    address = [result[role].output.split("_addr=")[1].split("'")[0] for role in result]
    assert address[0] == address[1]


def test_exit_codes_and_tracebacks_are_those_of_a_plain_interpreter(tmp_path: Path) -> None:
    scripts = {
        "fails": "def f():\n    raise ValueError('told')\nf()\n",
        "quits": "import sys\nsys.exit(7)\n",
        "says": "import sys\nsys.exit('no data')\n",
        "late": "import atexit, threading, time\natexit.register(print, 'bye')\n"
        "threading.Thread(target=lambda: (time.sleep(.2), print('thread'))).start()\n",
        "syntax": "print(\n",
        "interrupted": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n",
    }
    for name, text in scripts.items():
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        plain = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, check=False)
        party = start_party("", file, cwd=tmp_path).wait(60)
        assert party.returncode == plain.returncode, (name, party.output)
        if name != "interrupted":  # its traceback shows where the harness waits
            assert party.output == plain.stdout + plain.stderr, name


def test_a_script_imports_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("WORD = 'from next door'\n")
    (tmp_path / "main.py").write_text("import helper\nprint(helper.WORD)\n")
    assert start_party("", tmp_path / "main.py", cwd=tmp_path).wait(60).output == "from next door\n"


def test_parties_do_not_share_random_numbers(tmp_path: Path) -> None:
    script = "import random, numpy\nprint(random.random(), numpy.random.rand())\n"
    result = run_parties({"leader": script, "follower": script}, cwd=tmp_path)
    mine, theirs = (result[role].output.split() for role in result)
    assert mine[0] != theirs[0] and mine[1] != theirs[1]


def test_tensorflow_is_there_and_runs_a_session(tmp_path: Path) -> None:
    script = """
        import tensorflow.compat.v1 as tf
        with tf.Graph().as_default(), tf.Session() as sess:
            print('sum', sess.run(tf.reduce_sum(tf.ones([3, 4]) @ tf.ones([4, 2]))))
    """
    result = run_parties({"leader": script, "follower": script}, cwd=tmp_path)
    assert [(r.returncode, "sum 24.0" in r.output) for r in result.values()] == [(0, True)] * 2, result


def test_two_parties_talk_over_grpc(tmp_path: Path) -> None:
    """gRPC has threads of its own; it must work in processes forked after it was imported."""
    leader = """
        import sys, threading, grpc
        from concurrent import futures
        done = threading.Event()
        class Echo(grpc.GenericRpcHandler):
            def service(self, details):
                def handle(request, context):
                    done.set()
                    return b'echo ' + request
                return grpc.unary_unary_rpc_method_handler(handle)
        server = grpc.server(futures.ThreadPoolExecutor(2))
        server.add_generic_rpc_handlers((Echo(),))
        server.add_insecure_port(sys.argv[2].split('=')[1])
        server.start()
        done.wait(30)
        server.stop(1).wait()
    """
    follower = """
        import sys, grpc
        with grpc.insecure_channel(sys.argv[2].split('=')[1]) as channel:
            print(channel.unary_unary('/a/b')(b'hello', wait_for_ready=True, timeout=30).decode())
    """
    result = run_parties({"leader": leader, "follower": follower}, cwd=tmp_path, timeout=60)
    assert result["follower"].output == "echo hello\n" and result["leader"].returncode == 0, result


def test_a_party_that_hangs_is_killed_and_everything_is_shown(tmp_path: Path) -> None:
    scripts = {"leader": "print('mine is done')\n", "follower": "import time\nprint('waiting')\ntime.sleep(600)\n"}
    with pytest.raises(PartiesTimeout, match="follower still ran after 5 s") as caught:
        run_parties(scripts, cwd=tmp_path, timeout=5)
    assert "mine is done" in str(caught.value) and "waiting" in str(caught.value)


def test_one_party_can_be_killed_and_started_again(tmp_path: Path) -> None:
    address = free_address()
    script = "import time\nprint('up')\ntime.sleep(600)\n"
    party = start_party("leader", script, cwd=tmp_path, address=address)
    party.wait_for("up")
    assert party.returncode is None
    party.kill(signal.SIGKILL)
    assert party.wait(10).returncode == -signal.SIGKILL
    again = start_party("leader", script, cwd=tmp_path, address=address, env={"EFL_SEED": "3"})
    again.wait_for("up")
    again.kill(signal.SIGTERM)
    assert again.wait(10).returncode == -signal.SIGTERM
    assert again.pid != party.pid


def test_waiting_for_words_that_never_come_fails(tmp_path: Path) -> None:
    party = start_party("", "print('something else')\n", cwd=tmp_path)
    with pytest.raises(AssertionError, match="did not write 'hello' but:\nsomething else"):
        party.wait_for("hello")
