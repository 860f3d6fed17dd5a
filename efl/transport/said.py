"""JSON and text of a peer: read with bounds, and without what Python or a terminal would stumble over."""

from __future__ import annotations

import json
import math
from typing import Any

from efl.errors import ProtocolError

JSON = Any  # None, bool, int, float, str, lists and dicts (with str keys) of these
MAX_TEXT = 4000  # characters of a reason or an error of the peer
# Python's objects take more memory than the text they are made of, lists and dicts most of all.
_MAX_CONTAINERS, _MAX_DEPTH = 1 << 16, 64


def encodable(text: str) -> str:
    """``text`` without halves of surrogate pairs, as names of files may have; no peer accepts these."""
    return text.encode("utf-8", "replace").decode()


def plain(text: str, length: int = MAX_TEXT) -> str:
    """The beginning of a peer's text, without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[:length])


def read_json(text: bytes | memoryview, what: str) -> JSON:
    """Parses JSON of a peer.

    Args:
      text: UTF-8 JSON, its length already checked.
      what: What it should be, for the message.

    Returns:
      The value.

    Raises:
      ProtocolError: It is not JSON, nested too deeply, of too many lists and objects, or holds NaN, an infinity or half
        of a surrogate pair (which Python can neither print nor encode).
    """
    try:
        words = str(text, "utf-8")
        containers = words.count("[") + words.count("{")
        if containers > _MAX_CONTAINERS:
            raise ProtocolError(f"a {what} of {containers} lists and objects; at most {_MAX_CONTAINERS} are accepted")
        value = json.loads(words, parse_constant=_refuse_constant, parse_float=_finite)
        if containers > _MAX_DEPTH and _is_deep(value):
            raise ProtocolError(f"a {what} that is nested more than {_MAX_DEPTH} deep")
        if "\\u" in words:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise ProtocolError(f"a {what} that is not JSON ({type(error).__name__})") from None
    return value


def _is_deep(value: JSON) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # 1e999
        raise ValueError(text)
    return value
