"""Where a party's settings come from: keyword arguments, the command line, the environment. No TensorFlow.

A ``Settings`` is read when a model or a communicator is made, never at import:

    settings = Settings.load(seed=1)        # and --federal_role=leader on the command line
    settings.federal_role, settings.local_addr
    # ('leader', 'localhost:50051')

The strongest source wins: keyword arguments, then ``--name=value`` or ``--name value`` on the command line, then the
environment variable ``EFL_NAME`` (for ``task_index`` and ``worker_num`` also ``TF_CONFIG``), then the default. Flags
that efl does not know are left to the user's own script, with a warning where one looks like a misspelt flag of efl's;
``sys.argv`` is never changed.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import logging
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from efl.errors import ConfigError

_log = logging.getLogger("efl")
ROLES = ("leader", "follower")
DEFAULT_ADDRESS = "localhost:50051"

_MESSAGE_SIZE_VARIABLES = (
    "EFL_CLIENT_MAX_SEND_MESSAGE_SIZE",
    "EFL_CLIENT_MAX_RECEIVE_MESSAGE_SIZE",
    "EFL_SERVER_MAX_SEND_MESSAGE_SIZE",
    "EFL_SERVER_MAX_RECEIVE_MESSAGE_SIZE",
)
# Fields whose environment variable is not simply EFL_ and the name in capitals.
_VARIABLES = {
    "my_certs": "EFL_MY_CERTS_FILENAME",
    "my_key": "EFL_MY_KEY_FILENAME",
    "peer_certs": "EFL_PEER_CERTS_FILENAME",
    "peer_name": "EFL_SSL_TARGET_NAME_OVERRIDE",
}
_TLS_FILES = ("my_certs", "my_key", "peer_certs")
_WHOLE = (str, numbers.Integral)
_REAL = (str, numbers.Real)
_WORKER_TYPES = ("chief", "master", "worker")


@dataclass(frozen=True)
class Settings:
    """One party's settings, complete and checked.

    Attributes:
      federal_role: ``"leader"`` (listens) or ``"follower"`` (dials); ``""`` where none was given.
      peer_addr: ``host:port`` that a follower dials. Default for a follower: ``localhost:50051``.
      local_addr: ``host:port`` on which a leader listens. Default for a leader: ``localhost:50051``.
      checkpoint_dir: Folder of the checkpoints, ``None`` for none. Each party and task has its own folder in it.
      log_dir: Folder of the TensorBoard summaries; ``None``: beside the checkpoints, if there are any.
      task_index: Which worker of its party this process is, from 0.
      worker_num: How many workers the party has.
      seed: Makes a whole run reproducible, with a peer if both parties are given one; ``None``: a run differs from the
        next.
      connect_timeout: Seconds to wait for the peer to appear.
      peer_timeout: Seconds to wait for a peer that was lost, while the line or its program comes back.
      default_timeout_milliseconds: How long a step waits for a message of a peer that is alive, in milliseconds.
      scanning_interval_milliseconds: Time between two looks at the steps that wait, in milliseconds.
      client_thread_num: Accepted for compatibility: one stream per pair of parties needs no pool of threads.
      server_thread_num: As ``client_thread_num``.
      save_checkpoint_steps: Train steps between two checkpoints; ``None``: not by steps.
      save_checkpoint_secs: Seconds between two checkpoints, by the leader's clock; ``None``: not by time.
      share_error_text: Whether the peer is told the text of an error that is not efl's own; it may hold data.
      keep_checkpoints: How many checkpoints are kept.
      max_message_bytes: Largest message that is sent or accepted, in bytes; ``None``: the transport's own bound.
      insecure: Allows clear text beyond this machine. Everybody on the way can then read and change what is sent.
      my_certs: File of this party's certificate, and of what leads from it to an authority that the peer knows (PEM).
        With it, ``my_key`` and ``peer_certs`` the connection is encrypted, and each party proves who it is.
      my_key: File of the certificate's private key (PEM, without a passphrase).
      peer_certs: File of the authorities, or certificates, by which the peer is recognised (PEM).
      peer_name: Name that the peer's certificate must carry; ``None``: the peer's role.

    Raises:
      ConfigError: A value that efl cannot work with.
    """

    federal_role: str = ""
    peer_addr: str = ""
    local_addr: str = ""
    checkpoint_dir: str | None = None
    log_dir: str | None = None
    task_index: int = 0
    worker_num: int = 1
    seed: int | None = None
    connect_timeout: float = 600.0
    peer_timeout: float = 600.0
    default_timeout_milliseconds: int = 600_000
    scanning_interval_milliseconds: int = 30_000
    client_thread_num: int | None = None
    server_thread_num: int | None = None
    save_checkpoint_steps: int | None = None
    save_checkpoint_secs: float | None = None
    share_error_text: bool = False
    keep_checkpoints: int = 5
    max_message_bytes: int | None = None
    insecure: bool = False
    my_certs: str | None = None
    my_key: str | None = None
    peer_certs: str | None = None
    peer_name: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value != field.default:
                object.__setattr__(self, field.name, _PARSERS[field.name](value, field.name))
        if self.federal_role == "leader" and not self.local_addr:
            object.__setattr__(self, "local_addr", DEFAULT_ADDRESS)
        if self.federal_role == "follower" and not self.peer_addr:
            object.__setattr__(self, "peer_addr", DEFAULT_ADDRESS)
        if self.task_index >= self.worker_num:
            raise ConfigError(
                f"task_index={self.task_index} with worker_num={self.worker_num}: expected an index from 0 to "
                f"{self.worker_num - 1}"
            )
        self._check_security()

    @classmethod
    def load(
        cls,
        argv: Sequence[str] | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> Settings:
        """Collects the settings from all sources.

        Args:
          argv: Command line without the program's name; ``None``: ``sys.argv[1:]``. It is not changed.
          environ: Environment variables; ``None``: ``os.environ``.
          **overrides: Fields of this class, stronger than any other source. ``None`` means not given.

        Returns:
          The settings, with the defaults for this machine filled in.

        Raises:
          ConfigError: A name that is no setting, or a value that efl cannot work with; the message says where it
            was given.
        """
        unknown = sorted(set(overrides) - set(_PARSERS))
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known are {', '.join(_PARSERS)}")
        given: dict[str, Any] = {}
        arguments = sys.argv[1:] if argv is None else argv
        _warn_of_misspelt(arguments)
        # From the weakest source to the strongest.
        for name, value, source in (
            *_from_environment(os.environ if environ is None else environ),
            *command_line_settings(arguments),
            *((name, value, name) for name, value in overrides.items() if value is not None),
        ):
            given[name] = _PARSERS[name](value, source)
        return cls(**given)

    def _check_security(self) -> None:
        encrypted = check_certificates({name: getattr(self, name) for name in _VARIABLES})
        if self.federal_role and not encrypted:
            check_clear_text(self.federal_role, self.peer_addr, self.local_addr, self.insecure)


def check_certificates(given: Mapping[str, str | None]) -> bool:
    """Refuses certificates of which a part is missing: half of them protect nothing.

    Args:
      given: ``my_certs``, ``my_key``, ``peer_certs`` and ``peer_name``.

    Returns:
      Whether the connection is to be encrypted.

    Raises:
      ConfigError: Some are given, but not all three files.
    """
    missing = [name for name in _TLS_FILES if not given.get(name)]
    some = [name for name in _VARIABLES if given.get(name)]
    if missing and some:
        raise ConfigError(
            f"{' and '.join(some)} given, but not {' and '.join(f'{name} ({_VARIABLES[name]})' for name in missing)}: "
            "an encrypted connection needs this party's certificate (my_certs), its key (my_key) and the peer's "
            "authority (peer_certs); give all three files, or none for clear text. `efl certs` makes some to try with"
        )
    return not missing


def check_clear_text(federal_role: str, peer_addr: str, local_addr: str, insecure: bool) -> None:
    """Refuses clear text beyond this machine unless it was asked for.

    Args:
      federal_role: ``"leader"`` or ``"follower"``; says which of the addresses is used.
      peer_addr: ``host:port`` that a follower dials.
      local_addr: ``host:port`` on which a leader listens.
      insecure: Whether it was asked for.

    Raises:
      ConfigError: It was not, and the address is not one of this machine.
    """
    leads = federal_role == "leader"
    name, address, verb = ("local_addr", local_addr, "listen on") if leads else ("peer_addr", peer_addr, "dial")
    if not insecure and not _is_loopback(_split_address(address)[0]):
        raise ConfigError(
            f"{name}={address!r}: {federal_role} would {verb} an address beyond this machine in clear text, readable "
            "and changeable by everybody on the way; give certificates (my_certs, my_key, peer_certs), use a "
            "tunnel to a localhost address, or say insecure=True (--insecure, EFL_INSECURE=1) if the network is trusted"
        )


def _role(value: Any, source: str) -> str:
    if value not in ("", *ROLES):
        raise ConfigError(f"{source}={value!r}: expected the role 'leader' or 'follower'")
    return str(value)


def _text(value: Any, source: str) -> str | None:
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{source}={value!r}: expected text")
    return os.fspath(value) or None


def _split_address(address: str) -> tuple[str, str]:
    """``host:port`` or ``[ipv6]:port`` as (host without brackets, port); ('', '') where it is neither."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return "", ""  # an IPv6 address without brackets: where it ends and the port begins is anybody's guess
    return (host, port) if colon else ("", "")


def _address(value: Any, source: str) -> str:
    if value == "":
        return ""
    host, port = _split_address(value) if isinstance(value, str) else ("", "")
    if not host or any(c in host for c in " /\\@,") or not (port.isascii() and port.isdigit()):
        raise ConfigError(f"{source}={value!r}: expected host:port, such as localhost:50051 or [::1]:50051")
    if not 1 <= int(port) <= 65535:
        raise ConfigError(f"{source}={value!r}: expected a port from 1 to 65535")
    return str(value)


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: what it resolves to is not ours to trust


def _integer(low: int, what: str, high: int | None = None) -> Callable[[Any, str], int]:
    def parse(value: Any, source: str) -> int:
        try:
            number = None if isinstance(value, bool) or not isinstance(value, _WHOLE) else int(value)
        except ValueError:
            number = None
        if number is None:
            raise ConfigError(f"{source}={value!r}: expected {what}, a whole number")
        if number < low:
            raise ConfigError(f"{source}={value!r}: expected {what}, at least {low}")
        if high is not None and number > high:
            raise ConfigError(f"{source}={value!r}: expected {what}, at most {high}")
        return number

    return parse


def _seconds(value: Any, source: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, _REAL) else float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{source}={value!r}: expected a time in seconds, greater than 0")
    return number


def _flag(value: Any, source: str) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else None
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(f"{source}={value!r}: expected true or false")


_PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "federal_role": _role,
    "peer_addr": _address,
    "local_addr": _address,
    "checkpoint_dir": _text,
    "log_dir": _text,
    "task_index": _integer(0, "the index of a worker"),
    "worker_num": _integer(1, "a number of workers"),
    "seed": _integer(0, "a seed", 2**32 - 1),
    "connect_timeout": _seconds,
    "peer_timeout": _seconds,
    "default_timeout_milliseconds": _integer(1, "a time in milliseconds"),
    "scanning_interval_milliseconds": _integer(1, "a time in milliseconds"),
    "client_thread_num": _integer(1, "a number of threads"),
    "server_thread_num": _integer(1, "a number of threads"),
    "save_checkpoint_steps": _integer(1, "a number of steps"),
    "save_checkpoint_secs": _seconds,
    "share_error_text": _flag,
    "keep_checkpoints": _integer(1, "a number of checkpoints"),
    "max_message_bytes": _integer(1, "a size in bytes"),
    "insecure": _flag,
    "my_certs": _text,
    "my_key": _text,
    "peer_certs": _text,
    "peer_name": _text,
}


def command_line_settings(argv: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Finds the flags that efl knows on a command line.

    Args:
      argv: Command line without the program's name. What follows ``--`` is not looked at.

    Yields:
      (field of ``Settings``, text given for it, the flag), in the order of the command line.

    Raises:
      ConfigError: A flag lacks its value.
    """
    rest = iter(argv)
    for argument in rest:
        if argument == "--":
            return  # what follows is not flags
        name, equals, value = argument[2:].partition("=")
        if not argument.startswith("--") or name not in _PARSERS:
            continue
        if not equals and _PARSERS[name] is _flag:
            value = "true"
        elif not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{name}: expected a value, as --{name}=VALUE or --{name} VALUE")
        yield name, value, f"--{name}"


# Low enough for a letter too many, too few or in another's place, and for --checkpoint; words of which half is
# different are other words.
_LIKENESS = 0.8
_warned: set[str] = set()  # several models read one command line; what was said of a flag once is said


def _warn_of_misspelt(argv: Sequence[str]) -> None:
    """Logs, once in a process, each flag that efl does not know but that looks like one it knows.

    No error: the flag may be the script's own.
    """
    flags = argv[: argv.index("--")] if "--" in argv else argv
    for name in (flag[2:].partition("=")[0] for flag in flags if flag.startswith("--")):
        if name in _PARSERS or name in _warned:
            continue
        like = difflib.get_close_matches(name.lower().replace("-", "_"), _PARSERS, n=1, cutoff=_LIKENESS)
        if like:
            _warned.add(name)
            _log.warning(
                "--%s is no flag of efl, so efl does not read it: did you mean --%s? (Nothing is wrong where it is the "
                "script's own.)",
                name,
                like[0],
            )


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    """Yields (field, value, where from) of the environment variables that efl knows, the weaker first."""
    if environ.get("TF_CONFIG"):
        yield from _from_tf_config(environ["TF_CONFIG"])
    sizes = [(variable, environ[variable]) for variable in _MESSAGE_SIZE_VARIABLES if environ.get(variable)]
    if sizes:
        # gRPC bounds each direction of each side; efl has one bound, so the smallest is the one that all allow.
        size = _PARSERS["max_message_bytes"]
        smallest = min((size(value, variable), variable) for variable, value in sizes)
        yield "max_message_bytes", *smallest
    for name in _PARSERS:
        variable = _VARIABLES.get(name, f"EFL_{name.upper()}")
        if environ.get(variable):
            yield name, environ[variable], variable


def _from_tf_config(text: str) -> Iterator[tuple[str, Any, str]]:
    """Reads ``{"cluster": {"chief": [...], "worker": [...]}, "task": {"type": ..., "index": ...}}``."""
    expected = (
        "expected JSON such as " + '{"cluster": {"worker": ["host:port"]}, "task": {"type": "worker", "index": 0}}'
    )
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster", {}), config.get("task", {})
        kind, index = task.get("type", "worker"), int(task.get("index", 0))
        # The chief is worker 0, the workers proper come after it.
        chiefs = sum(len(cluster.get(name, ())) for name in ("chief", "master"))
        workers = len(cluster.get("worker", ()))
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(f"TF_CONFIG={text!r:.200}: {expected}") from None
    if kind not in _WORKER_TYPES:
        raise ConfigError(f"TF_CONFIG: task type {kind!r}; efl runs as one of {', '.join(_WORKER_TYPES)}")
    if cluster:
        yield "worker_num", chiefs + workers, "TF_CONFIG: number of workers"
    yield "task_index", index + (chiefs if kind == "worker" else 0), "TF_CONFIG: task index"
