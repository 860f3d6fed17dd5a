"""What both parties must agree on before anything else travels.

Each side sends a ``Hello``: the tensors it will send and receive, the *terms* that must be the same on
both sides (procedure, batch size, ...) and *facts* that it only tells. Both compute ``disagreements``;
where there is one, both stop with the whole list.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from efl.errors import ConfigError, EflError, ProtocolError
from efl.transport import codec
from efl.transport.frame import MAX_NDIM, PROTOCOL_VERSION
from efl.transport.limits import Limits
from efl.transport.said import JSON, MAX_TEXT, encodable, plain, read_json

#: Which role talks to which.
PARTNERS = {"leader": "follower", "follower": "leader"}
#: Name of what a model sends in a scope in which it has nothing of its own to send.
TOKEN = "pace"
#: The fact that says that a party has failed, and with what.
FAILED = "failed"
MAX_HELLO_BYTES = 8 << 20
_NAME_LENGTH = 80
_MAX_DIMENSION = 1 << 40
_MAX_TERMS = 4096
_LACKS = "has no"
_MANY = 3  # tensors or terms of one part of a program, of which the same is wrong, are told in one sentence
_MAX_VALUE, _MAX_REASONS = 1000, 1 << 19  # characters: of a value within a reason, of all reasons


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the exchange, as the party that states it sees it.

    Attributes:
      name: Its name on the wire, for example ``"train/fc1"`` or ``"train:ctr/fc1/grad"``.
      dtype: ``"float32"``, ``"int64"``, ``"string"``, ...; see ``efl.transport.codec.dtype_names``.
      shape: Static shape with None for what varies; None when even the rank varies.
      direction: ``"send"`` or ``"recv"``.
      require_grad: Whether a gradient of it comes back.
      mode: The mode in which it travels, ``""`` for any.
      task: The task in which it travels, ``""`` for any.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    direction: Literal["send", "recv"]
    require_grad: bool = False
    mode: str = ""
    task: str = ""


@dataclass(frozen=True)
class Hello:
    """Everything a party says before the first tensor. The peer learns all of it.

    Attributes:
      role: ``"leader"`` or ``"follower"``.
      tensors: The exchange.
      terms: Settings that must be equal on both sides, by name (JSON values).
      facts: Settings that are only told (JSON values).
      instance: Names this party's part of one conversation, or of one attempt to begin it; fresh random hex.
      version: Of the protocol.
    """

    role: str
    tensors: tuple[TensorSpec, ...] = ()
    terms: Mapping[str, JSON] = field(default_factory=dict)
    facts: Mapping[str, JSON] = field(default_factory=dict)
    instance: str = field(default_factory=lambda: secrets.token_hex(16))
    version: int = PROTOCOL_VERSION


def anew(hello: Hello) -> Hello:
    """The same hello for another attempt to begin: who has taken up the one before can tell it from a copy."""
    return replace(hello, instance=secrets.token_hex(16))


def merged_shape(
    one: tuple[int | None, ...] | None, other: tuple[int | None, ...] | None
) -> tuple[int | None, ...] | None:
    """The shape that satisfies both (which must not contradict each other)."""
    if one is None or other is None:
        return other if one is None else one
    return tuple(b if a is None else a for a, b in zip(one, other, strict=True))


def shape_fits(shape: tuple[int, ...], static: tuple[int | None, ...] | None) -> bool:
    """Whether an array of ``shape`` is what a static shape allows."""
    if static is None:
        return True
    return len(shape) == len(static) and all(s is None or s == d for d, s in zip(shape, static, strict=True))


def _contradict(a: tuple[int | None, ...] | None, b: tuple[int | None, ...] | None) -> bool:
    if a is None or b is None:
        return False
    return len(a) != len(b) or any(x is not None and y is not None and x != y for x, y in zip(a, b, strict=True))


def disagreements(mine: Hello, peer: Hello) -> list[str]:
    """Everything on which two hellos contradict each other; the same list whichever party computes it.

    What only follows from another entry is left out: a user's program names neither the gradient of a tensor, which
    differs where the tensor does, nor the token of a scope without sends, which is there where a send is missing.

    Args:
      mine: This party's hello.
      peer: The other's.

    Returns:
      One sentence each, saying which party has what; empty when the parties may start.
    """
    if mine.version != peer.version:  # nothing else can be compared with confidence
        return sorted_pair("protocol version", mine, peer, mine.version, peer.version)
    if mine.role == peer.role:
        return [f"both parties have the role {mine.role!r}; one must be the leader, the other the follower"]
    for hello in (mine, peer):
        if hello.role not in PARTNERS:
            return [f"role {hello.role!r} is unknown; expected 'leader' or 'follower'"]
    first, second = sorted((mine, peer), key=lambda h: h.role, reverse=True)  # leader first
    failures = [_failure(hello) for hello in (first, second) if FAILED in hello.facts]
    if failures:
        return failures  # of a program that failed before it was complete, nothing else is worth comparing
    tensors, terms = _tensor_disagreements(first, second), _term_disagreements(first, second)
    one, two = (_parts(_normal(hello.terms)) for hello in (first, second))
    found = [each for each in _causes(tensors, terms, (first, second)) if _part_of(each, one ^ two) is None]
    return _bounded([*_told(found, one & two), *terms])


def _bounded(reasons: list[str]) -> list[str]:
    """As many as both can be told; the last says how many there were."""
    size = 0
    for count, reason in enumerate(reasons):
        size += len(reason)
        if size > _MAX_REASONS:
            return [*reasons[:count], f"... and {len(reasons) - count} more"]
    return reasons


def failure_facts(error: BaseException, begun: bool = False) -> dict[str, JSON]:
    """The facts of a party that has failed before it could begin; its hello says only this.

    With ``begun`` it is one whose run was under way, and has lost its peer for good: who comes instead is told.
    The peer learns the type of the error, and the text of one of efl's own (the texts of others may quote data).
    """
    text = encodable(str(error)) if isinstance(error, EflError) else ""
    return {FAILED: {"type": type(error).__name__, "text": text[:MAX_TEXT], "begun": begun}}


def _failure(hello: Hello) -> str:
    told = hello.facts[FAILED]
    kind, text = (told.get("type"), told.get("text")) if isinstance(told, dict) else (None, None)
    kind = plain(kind, _NAME_LENGTH) if isinstance(kind, str) and kind else "an error"
    text = plain(text) if isinstance(text, str) and text else "its own log says why"
    verb = "go on" if isinstance(told, dict) and told.get("begun") is True else "begin"
    return f"the {hello.role} could not {verb}: {kind}: {text}"


def sorted_pair(what: str, mine: Hello, peer: Hello, my_value: object, peer_value: object) -> list[str]:
    """One sentence ``what: the leader has ..., the follower has ...``."""
    pairs = sorted(((mine.role, my_value), (peer.role, peer_value)), key=lambda p: str(p[0]), reverse=True)
    return [f"{what}: " + ", ".join(f"the {role} has {value!r}" for role, value in pairs)]


class _Found(NamedTuple):
    """What is wrong with the tensor that ``sender`` sends, or should, under ``name``."""

    sender: str
    name: str
    text: str


def _part_of(found: _Found, parts: set[str]) -> str | None:
    """Of which of some parts of a program a tensor is: ``train/hetero/dw`` of ``encrypted/hetero``."""
    within = found.name.split("/")[1:-1]
    return next((part for part in sorted(parts) if within and part.rpartition("/")[2] == within[-1]), None)


def _told(found: list[_Found], common: set[str]) -> list[str]:
    """A sentence each, but one for all tensors of a part of a program (a layer) of which the same is wrong.

    Args:
      found: What is wrong.
      common: Parts that both parties have.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for each in found:
        alike.setdefault((each.name.rpartition("/")[0], each.text), []).append(each.name.rpartition("/")[2])
    sentences: dict[str, None] = {}
    for each in found:
        part, own = each.name.rpartition("/")[0], alike[each.name.rpartition("/")[0], each.text]
        several = part.count("/") and len(own) >= _MANY
        name = f"tensors {part + '/'!r} ({', '.join(own)})" if several else f"tensor {each.name!r}"
        made = _part_of(each, common) if several and _LACKS in each.text else None
        why = f" ({made} is made there; is it called in this task and mode?)" if made else ""
        sentences.setdefault(f"{name}: {each.text}{why}")
    return list(sentences)


def _causes(found: list[_Found], terms: list[str], hellos: tuple[Hello, Hello]) -> list[_Found]:
    """Those that do not follow from others; never none of them where there are no terms."""
    wrong = {(f.sender, f.name) for f in found}
    covered = set()
    stated: dict[str, list[TensorSpec]] = {}
    for hello in hellos:
        for t in hello.tensors:
            stated.setdefault(t.name, []).append(t)
            sender = hello.role if t.direction == "send" else PARTNERS[hello.role]
            if t.require_grad and (sender, t.name) in wrong:
                covered.add((PARTNERS[sender], f"{t.name}/grad"))
    named = [f for f in found if (f.sender, f.name) not in covered]
    own = [f for f in named if not all(map(_is_token, stated[f.name]))]
    return own if own or terms else named


def _is_token(spec: TensorSpec) -> bool:
    return spec.name.endswith(f"/{TOKEN}") and (spec.dtype, spec.shape, spec.require_grad) == ("int8", (), False)


def _tensor_disagreements(first: Hello, second: Hello) -> list[_Found]:
    found = []

    def note(sender: Hello, name: str, text: str) -> None:
        found.append(_Found(sender.role, name, text))

    for sender, receiver in ((first, second), (second, first)):
        sent = {t.name: t for t in sender.tensors if t.direction == "send"}
        received = {t.name: t for t in receiver.tensors if t.direction == "recv"}
        for name in sorted(sent.keys() | received.keys()):
            if name not in received:
                note(sender, name, f"the {sender.role} sends it, the {receiver.role} {_LACKS} recv of that name")
                continue
            if name not in sent:
                note(sender, name, f"the {receiver.role} receives it, the {sender.role} {_LACKS} send of that name")
                continue
            a, b = sent[name], received[name]
            for what in ("dtype", "require_grad", "mode", "task"):
                if getattr(a, what) != getattr(b, what):
                    note(
                        sender,
                        name,
                        f"the {sender.role} sends it with {what}={getattr(a, what)!r}, "
                        f"the {receiver.role} receives it with {what}={getattr(b, what)!r}",
                    )
            if _contradict(a.shape, b.shape):
                note(
                    sender,
                    name,
                    f"the {sender.role} sends shape {a.shape}, the {receiver.role} receives shape {b.shape}",
                )
    return found


def _term_disagreements(first: Hello, second: Hello) -> list[str]:
    mine, theirs = _normal(first.terms), _normal(second.terms)
    found = []
    for part in sorted(_parts(mine) ^ _parts(theirs)):
        has, lacks = (first, second) if part in _parts(mine) else (second, first)
        found.append(f"{part:.{_MAX_VALUE}}: the {has.role} has it, the {lacks.role} has none of that name")
    lacking = tuple(f"{part}/" for part in _parts(mine) ^ _parts(theirs))
    for key in sorted(mine.keys() | theirs.keys()):
        what = f"{key:.{_MAX_VALUE}}"
        if key.startswith(lacking):
            continue
        if key not in mine or key not in theirs:
            has, lacks = (first, second) if key in mine else (second, first)
            value = (mine if key in mine else theirs)[key]
            found.append(f"{what}: the {has.role} has {_short(value)}, the {lacks.role} does not state it")
        elif json.dumps(mine[key], sort_keys=True) != json.dumps(theirs[key], sort_keys=True):
            # compared as text: 1, 1.0 and True are three settings
            one, other = _short(mine[key]), _short(theirs[key])
            found.append(f"{what}: the {first.role} has {one}, the {second.role} has {other}")
    return found


def _parts(terms: Mapping[str, JSON]) -> set[str]:
    """Parts of a program that state terms of their own: ``encrypted/hetero`` of ``encrypted/hetero/key``."""
    counts = Counter(key.rpartition("/")[0] for key in terms if key.count("/") > 1)
    return {part for part, count in counts.items() if count >= _MANY}


def _short(value: JSON) -> str:
    return f"{value!r:.{_MAX_VALUE}}"


def _normal(terms: Mapping[str, JSON]) -> dict[str, JSON]:
    return dict(json.loads(json.dumps(dict(terms))))


# ---- on the wire


def to_bytes(hello: Hello, limits: Limits) -> bytes:
    """A hello as JSON.

    Args:
      hello: What to say.
      limits: This side's limits; those that bind the sender travel along.

    Returns:
      UTF-8 JSON.

    Raises:
      ConfigError: A role, tensor, term or fact that no peer could accept.
    """
    if hello.role not in PARTNERS:
        raise ConfigError(f"role {hello.role!r} is unknown; expected one of {sorted(PARTNERS)}")
    body = {
        "role": hello.role,
        "instance": hello.instance,
        "version": hello.version,
        "tensors": [
            [
                t.name,
                t.dtype,
                None if t.shape is None else list(t.shape),
                t.direction,
                t.require_grad,
                t.mode,
                t.task,
            ]
            for t in hello.tensors
        ],
        "terms": dict(hello.terms),
        "facts": dict(hello.facts),
        "limits": {name: getattr(limits, name) for name in _SHARED_LIMITS},
    }
    try:
        text = json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the terms and facts of a handshake must be JSON values: {error}") from error
    for t in hello.tensors:
        if codec.code_of(t.dtype) is None:
            raise ConfigError(
                f"tensor {t.name!r}: dtype {t.dtype!r} cannot travel; expected one of {codec.dtype_names()}"
            )
    try:
        parse(text, limits)  # what we would refuse we do not say
    except ProtocolError as error:
        raise ConfigError(f"the {hello.role}'s own hello is not valid: {error}") from error
    return text


_SHARED_LIMITS = ("window_steps", "max_outstanding_bytes", "max_message_bytes", "max_control_bytes")


def parse(text: bytes | memoryview, limits: Limits) -> tuple[Hello, dict[str, int]]:
    """Reads a hello, believing nothing.

    Args:
      text: What arrived.
      limits: This side's limits.

    Returns:
      The hello, and the peer's limits by name.

    Raises:
      ProtocolError: It is not a well-formed hello within the limits.
    """
    if len(text) > MAX_HELLO_BYTES:
        raise ProtocolError(f"a hello of {len(text)} bytes; at most {MAX_HELLO_BYTES} are accepted")
    body = read_json(text, "hello")
    _need(isinstance(body, dict), "it is not a JSON object")
    role, instance, version = body.get("role"), body.get("instance"), body.get("version")
    _need(_is_int(version) and 0 <= version < 1 << 32, f"version {version!r}")
    # It is printed as it is.
    _need(isinstance(role, str) and 0 < len(role) <= 64 and role.isprintable(), f"role {role!r:.80}")
    _need(isinstance(instance, str) and 0 < len(instance) <= 64, f"instance {instance!r:.80}")
    if version != PROTOCOL_VERSION:  # another version may have another form: only say so
        return Hello(role, instance=instance, version=version), {}
    terms, facts, listed = body.get("terms"), body.get("facts"), body.get("tensors")
    _need(isinstance(terms, dict) and isinstance(facts, dict), "terms and facts must be JSON objects")
    _need(len(terms) <= _MAX_TERMS and len(facts) <= _MAX_TERMS, f"more than {_MAX_TERMS} terms or facts")
    _need(isinstance(listed, list), "no list of tensors")
    _need(len(listed) <= limits.max_tensors, f"{len(listed)} tensors; at most {limits.max_tensors} are accepted")
    tensors = tuple(_parse_tensor(entry, limits) for entry in listed)
    seen = {(t.name, t.direction) for t in tensors}
    _need(len(seen) == len(tensors), "a tensor is listed twice in one direction")
    given = body.get("limits")
    _need(isinstance(given, dict), "no limits")
    shared = {name: given.get(name) for name in _SHARED_LIMITS}
    _need(all(_is_int(v) and 0 < v < 1 << 62 for v in shared.values()), f"limits {shared!r:.200}")
    return Hello(role, tensors, terms, facts, instance, version), shared


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ProtocolError(f"malformed hello: {what}")


def _parse_tensor(entry: JSON, limits: Limits) -> TensorSpec:
    _need(isinstance(entry, list) and len(entry) == 7, f"tensor entry {entry!r:.80}")
    name, dtype, shape, direction, require_grad, mode, task = entry
    _need(isinstance(name, str) and 0 < len(name.encode("utf-8", "replace")) <= limits.max_name_bytes,
          f"tensor name {name!r:.80} (at most {limits.max_name_bytes} bytes)")  # fmt: skip
    # A dtype that we do not have is a disagreement, not a malformed hello: our own list cannot contain it.
    _need(isinstance(dtype, str) and 0 < len(dtype) <= 32, f"tensor {name!r}: dtype {dtype!r:.40}")
    _need(direction in ("send", "recv"), f"tensor {name!r}: direction {direction!r:.40}")
    _need(isinstance(require_grad, bool), f"tensor {name!r}: require_grad {require_grad!r:.40}")
    _need(all(isinstance(s, str) and len(s) <= limits.max_name_bytes for s in (mode, task)),
          f"tensor {name!r}: mode {mode!r:.40}, task {task!r:.40}")  # fmt: skip
    if shape is not None:
        _need(isinstance(shape, list) and len(shape) <= MAX_NDIM, f"tensor {name!r}: shape {shape!r:.80}")
        _need(all(d is None or (_is_int(d) and 0 <= d <= _MAX_DIMENSION) for d in shape),
              f"tensor {name!r}: shape {shape!r:.80}")  # fmt: skip
    return TensorSpec(name, dtype, None if shape is None else tuple(shape), direction, require_grad, mode, task)
