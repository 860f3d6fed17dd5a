"""What gRPC would lock at the interpreter's end is gone before it.

gRPC's calls and channels ask for a lock when they are deleted. If a garbage collection at the interpreter's end has to
find them, one of gRPC's threads may have been stopped while it held that lock, and the program does not end: seen in
one of 400 programs.
"""

from __future__ import annotations

import contextlib
import gc
import time

import grpc
import pytest

from efl.errors import EflError
from efl.transport import Channel, Endpoint, Hello
from efl.transport.stream import Dialled, say_that_tls_is_wanted
from tests.transport.peers import both, connected, follower, free_address, leader, receives, sends


def _held():
    """Objects of gRPC's dialling side that do something when they are deleted: calls and channels."""
    return [each for each in gc.get_objects() if type(each).__module__ == "grpc._channel" and hasattr(each, "__del__")]


@contextlib.contextmanager
def _no_collection():
    gc.collect()
    assert not _held()
    gc.disable()
    try:
        yield
        limit = time.monotonic() + 10
        while _held() and time.monotonic() < limit:
            time.sleep(0.02)
        assert not _held()
    finally:
        gc.enable()


def test_a_call_and_its_channel_are_seen_while_they_last():
    with _no_collection(), connected(sends("x")):
        assert any(isinstance(each, grpc.RpcError) for each in _held())
        assert any(isinstance(each, grpc.Channel) for each in _held())


def test_after_a_goodbye():
    with _no_collection(), connected(sends("x")) as (one, two):
        both(one.close, two.close)


def test_a_stream_that_is_closed_before_it_is_dialled():
    with _no_collection():
        connection = Dialled(Endpoint("follower", free_address(), listen=False), handler=None)
        connection.close()
        connection.start()
        assert connection.wait(0)
        assert connection.reader is None


@pytest.mark.parametrize("failing", [0, 1])
def test_after_an_abort(failing):
    with _no_collection(), connected(sends("x")) as channels:
        channels[failing].abort(ValueError())


def test_after_a_line_that_broke():
    with _no_collection(), connected(sends("x")) as (one, two):
        one.abandon()
        two.abandon()


def test_after_a_handshake_that_was_refused():
    address = free_address()
    one, two = leader(address, receives("x")), follower(address, sends("y"))
    with _no_collection():
        results = both(lambda: one.connect(10), lambda: two.connect(10))
        assert all(isinstance(each, EflError) for each in results)
        one.close()
        two.close()


def test_where_nobody_is():
    with _no_collection():
        channel = Channel(Endpoint("follower", free_address(), listen=False), Hello("follower", ()))
        with pytest.raises(EflError):
            channel.connect(0.5)
        channel.close()
        say_that_tls_is_wanted(Endpoint("follower", free_address(), listen=False), 0.5)
