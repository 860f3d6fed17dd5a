"""Settings: which source wins, what is refused, and with which words."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from efl.errors import ConfigError
from efl.settings import _PARSERS, Settings


def load(*argv: str, environ: dict[str, str] | None = None, **overrides: object) -> Settings:
    return Settings.load(argv, environ or {}, **overrides)


def test_defaults_run_both_parties_on_one_machine() -> None:
    assert load() == Settings()
    assert (load().federal_role, load().local_addr, load().peer_addr) == ("", "", "")
    assert load("--federal_role=leader").local_addr == "localhost:50051"
    assert load("--federal_role=follower").peer_addr == "localhost:50051"
    assert load().connect_timeout == 600
    assert load().default_timeout_milliseconds == 600_000
    assert load().scanning_interval_milliseconds == 30_000
    assert (load().task_index, load().worker_num, load().keep_checkpoints) == (0, 1, 5)


def test_every_field_has_a_parser_and_no_parser_lacks_a_field() -> None:
    assert [field.name for field in fields(Settings)] == list(_PARSERS)


def test_keyword_beats_command_line_beats_environment_beats_default() -> None:
    environ = {"EFL_SEED": "1"}
    assert load().seed is None
    assert load(environ=environ).seed == 1
    assert load("--seed=2", environ=environ).seed == 2
    assert load("--seed=2", environ=environ, seed=3).seed == 3
    assert load("--seed=2", environ=environ, seed=None).seed == 2


def test_both_forms_of_a_flag_and_the_last_one_wins() -> None:
    assert load("--seed", "7").seed == 7
    assert load("--seed=7", "--seed", "8").seed == 8
    assert load("--insecure").insecure is True
    assert load("--insecure=false").insecure is False
    assert load("--insecure", "--seed=1") == Settings(insecure=True, seed=1)


def test_the_rest_of_the_command_line_is_the_scripts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["train.py", "--epochs", "3", "-v", "data", "--federal_role", "follower", "--seedling=9", "--", "--seed=4"]
    monkeypatch.setattr(sys, "argv", list(argv))
    settings = Settings.load(environ={})
    assert settings == Settings(federal_role="follower")
    assert sys.argv == argv


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """efl's log, with nothing said before and whatever an earlier run has made of its logger undone."""
    monkeypatch.setattr("efl.settings._warned", set())
    monkeypatch.setattr(logging.getLogger("efl"), "propagate", True)
    return caplog


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--federal_rol=leader", "federal_role"),
        ("--peer-addr=localhost:1", "peer_addr"),
        ("--Seed=1", "seed"),
        ("--local_address", "local_addr"),
        ("--logdir", "log_dir"),
        ("--my-keys=k", "my_key"),
        ("--checkpoint=x", "checkpoint_dir"),
        ("--save_checkpoints_steps=4", "save_checkpoint_steps"),
    ],
)
def test_a_flag_that_looks_misspelt_is_told_once(flag: str, meant: str, warnings: pytest.LogCaptureFixture) -> None:
    assert load(flag, "--epochs=2") == load("--epochs=2", flag) == Settings()
    (record,) = warnings.records
    assert record.levelname == "WARNING"
    name = flag.partition("=")[0]
    assert record.getMessage().startswith(f"{name} is no flag of efl, so efl does not read it: did you mean --{meant}?")


def test_flags_that_are_the_scripts_own_or_right_pass_in_silence(warnings: pytest.LogCaptureFixture) -> None:
    load("--seed=1", "--epochs=3", "--batch_size=2", "--data", "x", "--log_step=5", "--lr=.1", "-seeds", "peer-addr")
    load("--insecure", "--seedling=9", "--role=boss", "--timeout=1", "--task=ctr", "--name=x", "--", "--peer-addr=a:1")
    assert not warnings.records


def test_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFL_CHECKPOINT_DIR", "/var/ckpt")
    assert Settings.load([]).checkpoint_dir == "/var/ckpt"


def test_numbers_and_paths_are_converted(tmp_path) -> None:
    settings = load("--connect_timeout=2.5", "--save_checkpoint_steps", "10", checkpoint_dir=tmp_path, seed=np.int64(4))
    assert settings.connect_timeout == 2.5
    assert settings.save_checkpoint_steps == 10
    assert settings.checkpoint_dir == str(tmp_path)
    assert settings.seed == 4 and type(settings.seed) is int


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        load().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--federal_role=boss", "--federal_role='boss': expected the role 'leader' or 'follower'"),
        ("--peer_addr=localhost", "--peer_addr='localhost': expected host:port"),
        ("--peer_addr=:50051", "--peer_addr=':50051': expected host:port"),
        ("--peer_addr=::1:50051", "expected host:port, such as localhost:50051 or [::1]:50051"),
        ("--peer_addr=http://localhost:80", "expected host:port"),
        ("--peer_addr=localhost:0", "expected a port from 1 to 65535"),
        ("--local_addr=localhost:65536", "expected a port from 1 to 65535"),
        ("--local_addr=localhost:0", "expected a port from 1 to 65535"),
        ("--task_index=one", "--task_index='one': expected the index of a worker, a whole number"),
        ("--task_index=-1", "--task_index='-1': expected the index of a worker, at least 0"),
        ("--worker_num=0", "--worker_num='0': expected a number of workers, at least 1"),
        ("--worker_num=1.5", "expected a number of workers, a whole number"),
        ("--task_index=2 --worker_num=2", "task_index=2 with worker_num=2: expected an index from 0 to 1"),
        ("--connect_timeout=soon", "--connect_timeout='soon': expected a time in seconds, greater than 0"),
        ("--connect_timeout=0", "expected a time in seconds, greater than 0"),
        ("--connect_timeout=nan", "expected a time in seconds, greater than 0"),
        ("--insecure=maybe", "--insecure='maybe': expected true or false"),
        ("--seed", "--seed: expected a value, as --seed=VALUE or --seed VALUE"),
        ("--seed --federal_role=leader", "--seed: expected a value"),
        ("--seed=4294967296", "--seed='4294967296': expected a seed, at most 4294967295"),
        ("--server_thread_num=0", "--server_thread_num='0': expected a number of threads, at least 1"),
        ("--client_thread_num=two", "--client_thread_num='two': expected a number of threads, a whole number"),
        ("--max_message_bytes=-1", "expected a size in bytes, at least 1"),
    ],
)
def test_bad_values_are_refused_with_where_and_what(argv: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(*argv.split())


def test_the_message_names_the_source() -> None:
    with pytest.raises(ConfigError, match=re.escape("EFL_SEED='x': expected a seed")):
        load(environ={"EFL_SEED": "x"})
    with pytest.raises(ConfigError, match=re.escape("seed=True: expected a seed")):
        load(seed=True)
    with pytest.raises(ConfigError, match="checkpoint_dir=3: expected text"):
        load(checkpoint_dir=3)


def test_unknown_keyword_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown setting rolle; known are federal_role, peer_addr"):
        load(rolle="leader")


def test_checks_hold_for_settings_made_directly() -> None:
    with pytest.raises(ConfigError, match="expected the role"):
        Settings(federal_role="boss")
    assert Settings(federal_role="leader").local_addr == "localhost:50051"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.1", "[::1]"])
def test_clear_text_is_allowed_on_this_machine(host: str) -> None:
    address = f"{host}:50051"
    assert load(f"--local_addr={address}", "--federal_role=leader").local_addr == address
    assert load(f"--peer_addr={address}", "--federal_role=follower").peer_addr == address


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.168.0.7", "bank.example", "localhost.example"])
def test_clear_text_beyond_this_machine_must_be_asked_for(host: str) -> None:
    address = f"{host}:50051"
    listen = ["--federal_role=leader", f"--local_addr={address}"]
    dial = ["--federal_role=follower", f"--peer_addr={address}"]
    with pytest.raises(ConfigError, match=r"local_addr=.*leader would listen on .* clear text.*--insecure"):
        load(*listen)
    with pytest.raises(ConfigError, match=r"peer_addr=.*follower would dial .* clear text.*--insecure"):
        load(*dial)
    assert load(*listen, "--insecure").local_addr == address
    assert load(*dial, environ={"EFL_INSECURE": "1"}).peer_addr == address


def test_an_address_that_a_role_does_not_use_is_no_danger() -> None:
    assert load("--federal_role=leader", "--peer_addr=bank.example:1").peer_addr == "bank.example:1"


TLS_VARIABLES = {
    "my_certs": "EFL_MY_CERTS_FILENAME",
    "my_key": "EFL_MY_KEY_FILENAME",
    "peer_certs": "EFL_PEER_CERTS_FILENAME",
    "peer_name": "EFL_SSL_TARGET_NAME_OVERRIDE",
}


def test_certificates_come_from_every_source_and_allow_any_address() -> None:
    files = {"my_certs": "a.pem", "my_key": "a.key", "peer_certs": "ca.pem"}
    beyond = ["--federal_role=leader", "--local_addr=0.0.0.0:50051"]
    by_flag = load(*beyond, *(f"--{name}={file}" for name, file in files.items()))
    assert (by_flag.my_certs, by_flag.my_key, by_flag.peer_certs) == ("a.pem", "a.key", "ca.pem")
    assert load(*beyond, environ={TLS_VARIABLES[name]: file for name, file in files.items()}) == by_flag
    assert load(*beyond, **files) == by_flag
    assert load(**files, environ={"EFL_SSL_TARGET_NAME_OVERRIDE": "bank.example"}).peer_name == "bank.example"


@pytest.mark.parametrize("field", TLS_VARIABLES)
def test_half_of_the_certificates_are_not_run_with(field: str) -> None:
    missing = next(name for name in TLS_VARIABLES if name != field)
    with pytest.raises(ConfigError, match=re.escape(f"{missing} ({TLS_VARIABLES[missing]})") + ".*all three files"):
        load(environ={TLS_VARIABLES[field]: "some.pem"})
    with pytest.raises(ConfigError, match=f"^{field} given, but not .*all three files"):
        load("--insecure", f"--{field}=some.pem")
    assert load(environ={TLS_VARIABLES[field]: ""}) == Settings()


def test_the_smallest_message_size_counts() -> None:
    environ = {"EFL_CLIENT_MAX_SEND_MESSAGE_SIZE": "5000", "EFL_SERVER_MAX_RECEIVE_MESSAGE_SIZE": "4000"}
    assert load(environ=environ).max_message_bytes == 4000
    assert load("--max_message_bytes=9", environ=environ).max_message_bytes == 9
    with pytest.raises(ConfigError, match="EFL_SERVER_MAX_SEND_MESSAGE_SIZE='-1'.*at least 1"):
        load(environ={**environ, "EFL_SERVER_MAX_SEND_MESSAGE_SIZE": "-1"})


def test_tf_config_gives_index_and_number_of_workers() -> None:
    def tf_config(kind: str, index: int, **cluster: list[str]) -> Settings:
        return load(environ={"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})})

    plain = tf_config("worker", 1, worker=["a:1", "b:1", "c:1"], ps=["p:1"])
    assert (plain.task_index, plain.worker_num) == (1, 3)
    chief = tf_config("chief", 0, chief=["a:1"], worker=["b:1"])
    assert (chief.task_index, chief.worker_num) == (0, 2)
    second = tf_config("worker", 0, chief=["a:1"], worker=["b:1"])
    assert (second.task_index, second.worker_num) == (1, 2)
    with pytest.raises(ConfigError, match="task type 'ps'; efl runs as one of chief, master, worker"):
        tf_config("ps", 0, worker=["a:1"])


def test_tf_config_is_weaker_than_efl_variables() -> None:
    environ = {"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'}
    assert load(environ={**environ, "EFL_TASK_INDEX": "0"}).task_index == 0
    assert load("--task_index=0", environ=environ).task_index == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"task": 3}', '{"task": {"index": "x"}}', '{"cluster": {"worker": 3}}'])
def test_a_broken_tf_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="TF_CONFIG=.*expected JSON such as"):
        load(environ={"TF_CONFIG": text})


def test_settings_do_not_load_tensorflow() -> None:
    code = "import sys, efl.settings; efl.settings.Settings.load(); sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
