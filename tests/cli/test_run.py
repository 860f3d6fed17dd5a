"""``efl run``, with scripts that only show what they were given and how they end."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import efl
from efl.cli import main
from efl.cli._transcript import Transcript
from efl.cli.noise import Noise
from efl.cli.run import assign_roles, choose_addresses
from efl.errors import ConfigError

ROOT = Path(efl.__file__).parent.parent
SHOW = "import os, sys\nprint(sys.argv[1:], os.getcwd())\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("EFL_LOCAL_ADDR", "EFL_PEER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def write(folder: Path, **scripts: str) -> None:
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "efl.cli", *arguments]


def efl_run(*arguments: str) -> tuple[int, list[str]]:
    """Runs ``efl run`` as a user does; returns its exit code and its lines."""
    result = subprocess.run(
        command("run", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )
    return result.returncode, result.stdout.splitlines()


def start(*arguments: str) -> subprocess.Popen[str]:
    # Also where the tests run under nohup: who ignores a signal hands that on.
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        return _start(*arguments)
    finally:
        signal.signal(signal.SIGHUP, hang_up)


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command("run", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines_until(process: subprocess.Popen[str], *words: str) -> list[str]:
    """Reads lines until each of the words has come."""
    assert process.stdout is not None
    lines: list[str] = []
    missing = set(words)
    while missing:
        line = process.stdout.readline()
        assert line, lines
        lines.append(line.rstrip())
        missing -= {word for word in missing if word in line}
    return lines


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def assert_ends(pid: int) -> None:
    limit = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < limit, f"process {pid} still runs"
        time.sleep(0.05)


def test_both_parties_get_their_roles_one_address_and_the_arguments(folder: Path) -> None:
    write(folder, leader=SHOW, follower=SHOW)
    code, lines = efl_run("leader.py", "follower.py", "--", "--seed=1", "--", "x")
    assert code == 0
    by_party = dict(line.split(" | ", 1) for line in lines)
    assert set(by_party) == {"leader  ", "follower"}
    pattern = r"\['--federal_role={}', '--{}=localhost:(\d+)', '--seed=1', '--', 'x'\] " + re.escape(str(folder))
    listens = re.fullmatch(pattern.format("leader", "local_addr"), by_party["leader  "])
    dials = re.fullmatch(pattern.format("follower", "peer_addr"), by_party["follower"])
    assert listens and dials, lines
    assert listens[1] == dials[1]


def test_two_parties_meet_at_the_address(folder: Path) -> None:
    write(
        folder,
        leader="""
            import socket, sys
            host, port = sys.argv[2].split('=')[1].split(':')
            with socket.create_server((host, int(port))) as server:
                connection, _ = server.accept()
                print('got', connection.recv(100).decode())
        """,
        follower="""
            import socket, sys, time
            host, port = sys.argv[2].split('=')[1].split(':')
            for attempt in range(200):
                try:
                    socket.create_connection((host, int(port))).sendall(b'hello')
                    break
                except ConnectionRefusedError:
                    time.sleep(.05)
        """,
    )
    assert efl_run("follower.py", "leader.py") == (0, ["leader   | got hello"])


def test_a_folder_may_be_named(folder: Path) -> None:
    (folder / "inner").mkdir()
    write(folder, leader="import os; print(os.getcwd())", follower="")
    assert efl_run("leader.py", "follower.py", "--cwd", "inner") == (0, [f"leader   | {folder / 'inner'}"])


def test_the_exit_code_is_that_of_the_worse(folder: Path) -> None:
    write(folder, leader="import sys; sys.exit(3)", follower="import sys; sys.exit(5)", fine="")
    assert efl_run("leader.py", "follower.py")[0] == 5
    code, lines = efl_run("--role", "leader=leader.py", "--role", "follower=fine.py")
    assert code == 3
    assert re.fullmatch(r"efl      \| leader failed after \d+\.\d s \(exit code 3\)", lines[-1]), lines


def test_a_party_may_end_early_without_harm_to_the_other(folder: Path) -> None:
    write(folder, leader="", follower="import time; time.sleep(1); print('still here')")
    assert efl_run("leader.py", "follower.py", "--grace", "0") == (0, ["follower | still here"])


def test_after_a_failure_the_other_may_say_its_own_last_words(folder: Path) -> None:
    write(
        folder,
        leader="raise ValueError('bad data')",
        follower="import sys, time; time.sleep(1); sys.exit('my peer has failed')",
    )
    code, lines = efl_run("leader.py", "follower.py")
    assert code == 1
    assert "leader   | ValueError: bad data" in lines
    assert "follower | my peer has failed" in lines
    told = lines.index("efl      | leader failed (exit code 1); the follower has 10 s to end (--grace)")
    assert lines.index("leader   | ValueError: bad data") < told < lines.index("follower | my peer has failed"), lines
    assert re.fullmatch(r"efl      \| leader failed after .* s \(exit code 1\): ValueError: bad data", lines[-2]), lines
    assert re.fullmatch(r"efl      \| follower failed after .* \(exit code 1\): my peer has failed", lines[-1]), lines


def test_the_closing_lines_repeat_the_whole_error(folder: Path) -> None:
    write(
        folder,
        leader="""
            from efl.errors import HandshakeError
            try:
                1 / 0
            except ZeroDivisionError:
                raise HandshakeError("they do not agree:\\n  - on a\\n  - on b\\nSay the same and start again.")
        """,
        follower="print('the rows\\nare mine'); raise SystemExit(2)",
    )
    code, lines = efl_run("leader.py", "follower.py")
    assert code == 2
    closing = [line for line in lines if line.startswith("efl ")]
    at = next(i for i, line in enumerate(closing) if "leader failed after" in line)
    assert re.fullmatch(r"efl +\| leader .* \(exit code 1\): HandshakeError: they do not agree:", closing[at])
    assert [line.split(" | ", 1)[1] for line in closing[at + 1 : at + 4]] == [
        "    - on a", "    - on b", "  Say the same and start again.",
    ]  # fmt: skip
    assert any(re.search(r"follower failed after .* \(exit code 2\): are mine$", line) for line in closing)


HEAD = ["Traceback (most recent call last):", '  File "a.py", line 1, in <module>', "    f()"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], []),
        (["one", "two", ""], ["two"]),
        ([*HEAD, "KeyError: 'x'"], ["KeyError: 'x'"]),
        ([*HEAD, "mine.errors.Bad"], ["Bad"]),
        (
            [*HEAD, "KeyError: 1", "", "During handling …:", "", *HEAD, "a.b.C: see", " 1", "", "x"],
            ["C: see", " 1", "", "x"],
        ),
        ([*HEAD, "E: 0", *map(str, range(1, 30))], ["E: 0", *"123456", "… (22 more lines)", "29"]),
        ([*HEAD, "E: " + "x" * 1000], ["E: " + "x" * 497 + " …"]),
        ([*HEAD, "ValueError: survived", "12:00:01 leader: went on", "sorry"], ["sorry"]),
        ([*HEAD, "no error, but a sentence"], ["no error, but a sentence"]),
    ],
)
def test_last_words(lines: list[str], words: list[str]) -> None:
    said = Transcript()
    for line in lines:
        said.add(line)
    assert said.last_words() == words


NOTES = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795259607.119778   14691 port.cc:153] oneDNN custom operations are on. You may see slightly different
I0000 00:00:1795259607.120134   14691 cudart_stub.cc:31] Could not find cuda drivers on your machine
2024-01-02 03:04:05.678901: I tensorflow/core/platform/cpu_feature_guard.cc:182] This TensorFlow binary is optimized
To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow with the appropriate flags.
E0000 00:00:1795259615.062615   14691 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error
"""


def test_tensorflows_notes_on_the_machine_are_dropped_unless_asked_for(folder: Path) -> None:
    mine = "see port.cc and cuda_platform.cc:52] in my notes"
    write(folder, leader=f"import sys; print({mine!r}); sys.stdout.write({NOTES!r}); sys.exit(3)", follower="")
    code, lines = efl_run("leader.py", "follower.py")
    assert code == 3
    assert [line for line in lines if line.startswith("leader")] == [f"leader   | {mine}"]
    assert lines[-1].endswith(f"(exit code 3): {mine}"), "a note is nobody's last words"
    code, lines = efl_run("leader.py", "follower.py", "--verbose")
    shown = [line.split(" | ", 1)[1] for line in lines if line.startswith("leader")]
    assert shown == [mine, *NOTES.splitlines()]


def test_tensorflow_itself_is_quiet(folder: Path) -> None:
    column = """
        import sys
        import tensorflow.compat.v1 as tf
        tf.disable_eager_execution()
        column = tf.feature_column.numeric_column("x", 2)
        tf.py_func(abs, [tf.constant(1)], tf.int32)  # its advice has many lines
        print(column.shape, file=sys.stderr)
    """
    write(folder, leader=column, follower="")
    assert efl_run("leader.py", "follower.py") == (0, ["leader   | (2,)"])
    code, lines = efl_run("leader.py", "follower.py", "--verbose")
    assert code == 0
    for words in ("numeric_column (from tensorflow", "Instructions for updating:", "py_func (from tensorflow"):
        assert any(words in line for line in lines), "TensorFlow does not say it any more: " + words


WARNING = "WARNING:tensorflow:From a.py:1: f (from tensorflow.python.f) is deprecated and will be removed after 2030."


@pytest.mark.parametrize(
    ("lines", "noise"),
    [
        ([WARNING, "Instructions for updating:", "Use g.", "    or h", "mine"], 4),
        ([WARNING, "mine", "Instructions for updating:", "Use g."], 1),
        ([WARNING, "Instructions for updating:", "Use g.", "mine", "    or h"], 3),
        ([WARNING, "Instructions for updating:", "Use g.", WARNING, "Instructions for updating:", "Use g.", "x"], 6),
        (["WARNING:tensorflow:From a.py:1: calling f (from keras.f) with a=1 is deprecated and will be removed in"], 1),
        (["WARNING:tensorflow:From a.py:1: f (from mine.f) is deprecated and will be removed in 2030"], 0),
        (["WARNING:tensorflow:your loss is NaN", "I am 0000 port.cc", "see port.cc:12]"], 0),
    ],
)
def test_a_warning_of_deprecation_is_noise_to_its_last_line_and_no_further(lines: list[str], noise: int) -> None:
    told = Noise()
    assert [told.is_noise(line) for line in lines] == [True] * noise + [False] * (len(lines) - noise)


def test_the_parties_are_quiet_unless_the_user_says_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    level = "import os; print('level', os.environ.get('TF_CPP_MIN_LOG_LEVEL'))\n"
    write(folder, leader=level + "import warnings; warnings.warn('advice')", follower="")
    assert efl_run("leader.py", "follower.py") == (0, ["leader   | level 3"])
    _, lines = efl_run("leader.py", "follower.py", "--verbose")
    assert "leader   | level None" in lines and any("UserWarning: advice" in line for line in lines), lines
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    _, lines = efl_run("leader.py", "follower.py")
    assert "leader   | level 1" in lines and any("UserWarning: advice" in line for line in lines), lines


def test_after_a_failure_a_party_that_hangs_is_stopped(folder: Path) -> None:
    write(folder, leader="import sys; sys.exit(3)", follower="import os, time; print(os.getpid()); time.sleep(600)")
    code, lines = efl_run("leader.py", "follower.py", "--grace", "2")
    assert code == 3, "the failure counts, not what we did to the other"
    assert re.search(r"^efl +\| follower was stopped after", lines[-1]), lines
    assert_ends(int(next(line for line in lines if line.startswith("follower")).split(" | ")[1]))


WAITS = "12:00:00 follower: waiting for the leader at localhost:1, 600 s of 600 s left"
MEETS = "12:00:01 follower: connected to the leader (localhost:1)"


@pytest.mark.parametrize(
    ("says", "waits"),
    [
        ([], False),
        ([WAITS], True),
        ([WAITS, WAITS, "mine"], True),
        ([WAITS, MEETS], False),
        ([WAITS, MEETS, WAITS], False),  # it looks for a peer that was there: the peer may have said why it went
        ([WAITS, "Traceback (most recent call last):"], False),
    ],
)
def test_who_waits_for_a_first_connection_is_known(says: list[str], waits: bool) -> None:
    said = Transcript()
    for line in says:
        said.add(line)
    assert said.waits_for == ("leader" if waits else None)


@pytest.mark.parametrize("late", [False, True])
def test_who_waits_for_a_party_that_failed_is_not_given_the_whole_grace(folder: Path, late: bool) -> None:
    """A real party, whose peer has failed before or after it begins to wait."""
    address = f"localhost:{choose_addresses([], {})['leader'][0].rpartition(':')[2]}"
    waiting = f"""
        import logging, time
        from efl.transport import Channel, Endpoint, Hello
        if {late}:
            time.sleep(2)
        logging.basicConfig(level=logging.INFO)
        Channel(Endpoint("follower", "{address}", listen=False), Hello("follower")).connect(60)
    """
    write(folder, leader=f"import sys, time; time.sleep({0 if late else 5}); sys.exit('no file')", follower=waiting)
    begin = time.monotonic()
    code, lines = efl_run("leader.py", "follower.py", "--grace", "40")
    assert code == 1 and time.monotonic() - begin < 25
    left = "has 40 s to end (--grace)" if late else "waits for it in vain and will be stopped"
    assert f"efl      | leader failed (exit code 1); the follower {left}" in lines, lines
    assert re.search(r"follower was stopped after \d.* s of waiting for the leader$", lines[-1]), lines


def test_a_party_ended_by_a_signal_counts_as_failed(folder: Path) -> None:
    write(folder, leader="import os; os.kill(os.getpid(), 9)", follower="")
    code, lines = efl_run("leader.py", "follower.py")
    assert code == 137 and re.search(r"leader failed after .* \(exit code 137\)$", lines[-1]), lines


# A party with a child of its own, as data loaders have.
WAIT = """
    import os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stderr=subprocess.DEVNULL)
    try:
        print('pids', os.getpid(), child.pid)
        time.sleep(600)
    except KeyboardInterrupt:
        print('saved')
        sys.exit(1)
"""


def pids(lines: list[str]) -> list[int]:
    return [int(word) for line in lines if " | pids " in line for word in line.split(" | pids ")[1].split()]


def test_one_interrupt_ends_both_and_lets_them_say_so(folder: Path) -> None:
    write(folder, leader=WAIT, follower=WAIT)
    process = start("leader.py", "follower.py")
    before = lines_until(process, "leader   | pids", "follower | pids")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert {"leader   | saved", "follower | saved"} <= set(rest.splitlines()), rest
    for pid in pids(before):
        assert_ends(pid)


DEAF = """
    import os, signal, time
    signal.signal(signal.SIGINT, lambda *_: print('no'))
    signal.signal(signal.SIGTERM, lambda *_: print('never'))
    print('pids', os.getpid())
    while True:
        time.sleep(1)
"""


def test_a_deaf_party_is_ended_with_force(folder: Path) -> None:
    write(folder, leader=DEAF, follower=WAIT)
    process = start("leader.py", "follower.py")
    before = lines_until(process, "leader   | pids", "follower | pids")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "leader   | never" in rest
    for pid in pids(before):
        assert_ends(pid)


def test_who_interrupts_again_need_not_wait(folder: Path) -> None:
    write(folder, leader=DEAF, follower=DEAF)
    # The same command, but with no end to its patience.
    patient = "import efl.cli, efl.cli._launcher as launcher; launcher._PATIENCE = 1e6; efl.cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", patient, "run", "leader.py", "follower.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    before = lines_until(process, "leader   | pids", "follower | pids")
    for words in ("no", "never"):
        process.send_signal(signal.SIGINT)
        lines_until(process, f"leader   | {words}", f"follower | {words}")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    for pid in pids(before):
        assert_ends(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # hang-up: the terminal was closed
def test_termination_is_passed_on(folder: Path, number: signal.Signals) -> None:
    write(folder, leader=WAIT, follower=WAIT)
    process = start("leader.py", "follower.py")
    before = lines_until(process, "leader   | pids", "follower | pids")
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 143
    for pid in pids(before):
        assert_ends(pid)


def test_lines_appear_when_they_are_written(folder: Path) -> None:
    write(folder, leader="import time; print('first'); time.sleep(600)", follower="import time; time.sleep(600)")
    process = start("leader.py", "follower.py")
    assert lines_until(process, "first") == ["leader   | first"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)


def test_colours_on_a_terminal_and_none_elsewhere(folder: Path, terminal: tuple[int, int]) -> None:
    write(folder, leader="print('[red]not markup[/red]')", follower="print('b')")
    master, slave = terminal
    environ = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")} | {"TERM": "xterm"}
    subprocess.run(command("run", "leader.py", "follower.py"), stdout=slave, env=environ, timeout=60, check=True)
    os.close(slave)
    shown = b""
    while b"markup" not in shown or b"b\r\n" not in shown:
        shown += os.read(master, 4096)
    leader = re.search(rb"(\x1b\[\d+m)leader   \| \x1b\[0m\[red\]not markup\[/red\]", shown)
    follower = re.search(rb"(\x1b\[\d+m)follower \| \x1b\[0mb", shown)
    assert leader and follower and leader[1] != follower[1], shown
    code, lines = efl_run("leader.py", "follower.py")
    assert code == 0 and sorted(lines) == ["follower | b", "leader   | [red]not markup[/red]"]


@pytest.mark.parametrize(
    ("scripts", "leader"),
    [
        (["a.py", "b.py"], "a.py"),
        (["follower.py", "leader.py"], "leader.py"),
        (["a.py", "leader.py"], "leader.py"),
        (["my_follower.py", "b.py"], "b.py"),
        (["criteo_dp_Follower_dense.py", "criteo_dp_leader_dense.py"], "criteo_dp_leader_dense.py"),
        (["leader_vs_follower.py", "b.py"], "leader_vs_follower.py"),
        (["follower/a.py", "leader/b.py"], "follower/a.py"),
        (["both.py", "both.py"], "both.py"),
    ],
)
def test_roles_follow_from_names_and_then_from_order(scripts: list[str], leader: str) -> None:
    paths = [Path(script) for script in scripts]
    assigned = assign_roles(paths)
    assert list(assigned) == ["leader", "follower"]
    assert assigned["leader"] == Path(leader)
    assert sorted(assigned.values()) == sorted(paths)


@pytest.mark.parametrize(
    ("scripts", "roles", "words"),
    [
        (["a.py"], [], "expected two scripts, the leader's and the follower's, got 1"),
        (["a.py", "b.py", "c.py"], [], "got 3"),
        (["leader.py", "leader2.py"], [], "expected one leader and one follower, got leader and leader"),
        ([], [("leader", "a.py")], "expected one leader and one follower, got leader;"),
        (["a.py"], [("leader", "a.py")], "either by --role or by position"),
    ],
)
def test_roles_that_do_not_work_out_are_refused(scripts: list[str], roles: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        assign_roles([Path(script) for script in scripts], [(role, Path(script)) for role, script in roles])


@pytest.mark.parametrize(
    ("arguments", "environ", "leader", "follower"),
    [
        (["--local_addr=h:1", "--peer_addr=h:2"], {}, [], []),
        (["--local_addr=h:1"], {}, [], ["--peer_addr=h:1"]),
        (["--local_addr", "0.0.0.0:1"], {}, [], ["--peer_addr=localhost:1"]),
        (["--peer_addr=h:2"], {}, ["--local_addr=h:2"], []),
        ([], {"EFL_PEER_ADDR": "h:2"}, ["--local_addr=h:2"], []),
        ([], {"EFL_LOCAL_ADDR": "h:1", "EFL_PEER_ADDR": "h:2"}, [], []),
    ],
)
def test_addresses_that_are_given_are_kept(
    arguments: list[str], environ: dict[str, str], leader: list[str], follower: list[str]
) -> None:
    assert choose_addresses(arguments, environ) == {"leader": leader, "follower": follower}


def test_the_chosen_port_is_free() -> None:
    port = int(choose_addresses([], {})["leader"][0].rpartition(":")[2])
    with socket.create_server(("localhost", port)):
        pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.py", "missing.py"], "File 'missing.py' does not exist"),
        (["a.py"], "expected two scripts"),
        (["--role", "boss=a.py"], "'boss=a.py': expected ROLE=SCRIPT with a role of leader, follower"),
        (["a.py", "b.py", "--", "--federal_role=leader"], "--federal_role is efl run's to give"),
        (["a.py", "b.py", "--", "--peer_addr"], "--peer_addr: expected a value"),
        (["a.py", "b.py", "--seed=1"], "No such option"),
    ],
)
def test_wrong_usage_is_one_clear_line(folder: Path, arguments: list[str], words: str) -> None:
    write(folder, a="", b="")
    result = CliRunner().invoke(main, ["run", *arguments])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_help_and_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"efl, version {efl.__version__}\n"
    assert "run" in CliRunner().invoke(main, ["--help"]).output
    text = CliRunner().invoke(main, ["run", "--help"]).output
    assert "[-- ARGUMENTS...]" in text and "--role" in text


def test_the_command_does_not_wait_for_tensorflow() -> None:
    code = "import sys, efl.cli; sys.exit('tensorflow' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
