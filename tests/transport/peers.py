"""Two parties on this machine, for tests of the transport."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from efl.transport import Channel, Endpoint, Hello, Limits, TensorSpec
from efl.transport.limits import DEFAULT_LIMITS
from tests.parties import free_address as free_address


def host_port(address: str) -> tuple[str, int]:
    host, port = address.split(":")
    return host, int(port)


def sends(name: str, dtype: str = "float32", shape: Any = None, **more: Any) -> TensorSpec:
    return TensorSpec(name, dtype, shape, "send", **more)


def receives(name: str, dtype: str = "float32", shape: Any = None, **more: Any) -> TensorSpec:
    return TensorSpec(name, dtype, shape, "recv", **more)


def mirrored(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    other = {"send": "recv", "recv": "send"}
    return tuple(
        TensorSpec(t.name, t.dtype, t.shape, other[t.direction], t.require_grad, t.mode, t.task)  # type: ignore[arg-type]
        for t in tensors
    )


def leader(address: str, *tensors: TensorSpec, limits: Limits = DEFAULT_LIMITS, **hello: Any) -> Channel:
    return Channel(Endpoint("leader", address, listen=True), Hello("leader", tensors, **hello), limits)


def follower(address: str, *tensors: TensorSpec, limits: Limits = DEFAULT_LIMITS, **hello: Any) -> Channel:
    return Channel(Endpoint("follower", address, listen=False), Hello("follower", tensors, **hello), limits)


def both(*actions: Callable[[], Any], timeout: float = 60.0) -> list[Any]:
    """Runs the actions at the same time; returns each one's result, or the exception that it raised."""
    results: list[Any] = [None] * len(actions)

    def run(position: int, action: Callable[[], Any]) -> None:
        try:
            results[position] = action()
        except BaseException as error:
            results[position] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a party hangs"
    return results


def meet(*channels: Channel, timeout: float = 20.0) -> None:
    for result in both(*(lambda c=c: c.connect(timeout) for c in channels)):
        if isinstance(result, BaseException):
            raise result


@contextlib.contextmanager
def connected(
    *leader_tensors: TensorSpec,
    limits: Limits = DEFAULT_LIMITS,
    prepare: Callable[[Channel, Channel], None] | None = None,
) -> Iterator[tuple[Channel, Channel]]:
    """A leader with these tensors and the follower that mirrors it, connected; both closed afterwards."""
    address = free_address()
    one = leader(address, *leader_tensors, limits=limits)
    two = follower(address, *mirrored(leader_tensors), limits=limits)
    if prepare is not None:
        prepare(one, two)
    meet(one, two)
    try:
        yield one, two
    finally:
        both(lambda: one.close(2), lambda: two.close(2))
