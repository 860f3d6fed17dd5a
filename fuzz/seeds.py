"""Where fuzzing begins: for every target, inputs that are valid or nearly so."""

from __future__ import annotations

import struct
from pathlib import Path

from efl.errors import DataError
from efl.transport import events, frame, handshake
from efl.transport.frame import Kind
from fuzz.targets import HELLO, LIMITS, PEER


def seeds() -> dict[str, list[bytes]]:
    """Target -> inputs."""
    hellos = [handshake.to_bytes(HELLO, LIMITS), handshake.to_bytes(PEER, LIMITS)]
    claim, refusal = events.claim(PEER.instance, HELLO.instance, 1), b'{"busy": true, "reasons": ["x"]}'
    frames = [
        frame.encode(Kind.HELLO, hellos[1]),
        frame.encode(Kind.RESUME, claim),
        frame.encode(Kind.DATA, bytes(24), dtype=11, shape=(2, 3), total=24, digest=bytes(16), seq=1),
        frame.encode(Kind.PING, flags=frame.FLAG_HUNGRY) + frame.encode(Kind.BYE, seq=2),
    ]
    tensors = [
        bytes([11, 1, 4]) + bytes(16),
        bytes([14, 1, 2]) + struct.pack("<2I", 1, 2) + b"abc",
        bytes([0, 2, 2, 2, 1, 0, 1, 0]),
        bytes([11, 2, 0, 255]) + b"\xff" * 8,
    ]
    links = [bytes([state, action, *tail]) for state in range(6) for action in (6, 7) for tail in
             ([3, 1, 0, 0, 0], [4, 5, 0, 0], [6, 0, 0, 0], [9, 4, 0, 0], [7, 0, 0, 0], [0, 3, 0, 0],
              [3, 1, 0, 0, 1, 7, 3, 0, 6, 3, 1, 0, 0])]  # fmt: skip
    return {
        "decode": frames,
        "hello": [*hellos, b'{"role": "\\ud800"}', b'{"version": 1e999}'],
        "hello_parts": [bytes([which % 2, part, which, 1]) for which in range(8) for part in range(8)],
        "tensor": tensors,
        "claims": [claim, refusal, events.abort(DataError("x"), "step 3", False), b'["\\ud800", "b", 1]', *frames[:2]],
        "link": links,
        "controls": [bytes([which, 1, part, value, 0]) for which in range(8) for part in range(3) for value in (3, 7)],
    }


def write(folder: Path) -> None:
    """Writes the inputs into a folder for each target."""
    for target, inputs in seeds().items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / target / f"seed-{number}").write_bytes(data)
