"""The wire: one bidirectional gRPC stream, ``/efl.Link/Stream``, of opaque byte messages.

The leader listens, the follower dials. This module moves messages and knows nothing of what is in them. With
certificates, nothing of a peer that is not the expected one is handed on.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import functools
import logging
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Protocol

import grpc

from efl._ports import check_free
from efl.errors import ConfigError
from efl.transport import operations
from efl.transport.limits import MAX_WIRE_BYTES, Endpoint
from efl.transport.outbox import Outbox

logger = logging.getLogger("efl")

_SERVICE, _METHOD = "efl.Link", "Stream"
_OPTIONS = [
    ("grpc.max_send_message_length", MAX_WIRE_BYTES),
    ("grpc.max_receive_message_length", MAX_WIRE_BYTES),
    ("grpc.so_reuseport", 0),  # else a forgotten leader goes on taking connections beside the new one
    ("grpc.use_local_subchannel_pool", 1),  # channels of one process share nothing
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]
_MAX_CONNECTIONS = 12  # each may hold one message of a stranger in memory
_MAX_NAMELESS = 8  # that have said nothing yet; the oldest goes when one more comes, or strangers could fill the port
_FIRST_MESSAGE_SECONDS = 10.0
_TLS_SECONDS = 10.0  # for a TLS handshake; gRPC's default is two minutes
_CALL = f"/{_SERVICE}/{_METHOD}"
#: Said, in clear text, to a listener that has no certificates, by a dialler that has: it would never know otherwise.
_WANTS_TLS = ("efl-wants", "tls")


class Connection(abc.ABC):
    """One stream. ``peer`` names the other end as gRPC sees it."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.outbox = Outbox()
        self.reader: threading.Thread | None = None
        self.over = threading.Event()
        self.given_up = False  # nothing that it still brings is taken

    def wait(self, timeout: float) -> bool:
        """Waits until the stream has ended in both directions."""
        return self.over.wait(timeout)

    def read(self, messages: Iterator[bytes], call: operations.Operations | None, handler: Handler) -> None:
        """Hands on what arrives until the stream ends; how it ends is for ``messages`` to say.

        A stranger's messages are read one at a time, however the call could be read.
        """
        for message in messages:
            work = handler.on_message(self, message)
            if work is not None:
                work()
            if call is not None and handler.carries(self):
                for work in call.read(functools.partial(handler.on_message, self)):
                    work()
                call = None

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the stream now, whatever is queued."""


class Handler(Protocol):
    """Who is told what arrives."""

    def on_message(self, connection: Connection, message: bytes) -> operations.Work | None:
        """A message arrived. Called in the order of messages, and from gRPC's own thread: it must not wait.

        Returns:
          What is left to do, by the connection's reading thread; see ``finish``.
        """

    def carries(self, connection: Connection) -> bool:
        """Whether the connection carries the conversation."""

    def finish(self) -> None:
        """Does what messages have left to do, where the stream ended before; after ``on_end``."""

    def on_end(self, connection: Connection, why: str) -> None:
        """Nothing more will arrive; ``why`` is empty when the peer ended the stream properly."""

    def on_stranger(self, peer: str, why: str) -> None:
        """Somebody was turned away before anything that they said was read."""


def _reason(error: grpc.RpcError) -> str:
    code = getattr(error, "code", lambda: None)()
    details = getattr(error, "details", lambda: "")() or ""
    return f"{code.name}: {details[:300]}" if code is not None else "the connection was reset"


class Dialled(Connection):
    """The follower's side of a stream.

    Attributes:
      why: Why it ended, where it did not end properly.
      turned_away: Why the listener does not take this party's certificate.
    """

    def __init__(self, endpoint: Endpoint, handler: Handler) -> None:
        """Prepares the stream; nothing is dialled before ``start``.

        Args:
          endpoint: Whom to dial.
          handler: Who is told what arrives.
        """
        super().__init__(endpoint.address)
        self._handler = handler
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._closed = False
        self._channel: grpc.Channel | None = None
        self._call: Any = None
        self.why = self.turned_away = ""

    def start(self) -> None:
        """Dials; what is in the outbox goes first. Does nothing after ``close``.

        Raises:
          ConfigError: The certificates cannot be used.
        """
        channel = _channel(self._endpoint)
        with self._lock:
            if self._closed:
                channel.close()
                self.over.set()
                return
            self._channel, self._call = channel, channel.stream_stream(_CALL)(self.outbox)
            call = operations.of_dialled(self._call)
            self.outbox.write_to(call)
            self.reader = threading.Thread(target=self._read, args=[self._call, call], name="efl-read", daemon=True)
        self.reader.start()

    def _read(self, messages: Any, call: operations.Operations | None) -> None:
        why = ""
        try:
            self.read(messages, call, self._handler)
        except grpc.RpcError as error:
            why = self.why = _reason(error)
            if self._endpoint.tls is not None and error.code() is grpc.StatusCode.UNAUTHENTICATED:
                self.turned_away = str(error.details())[:500]
            _let_go(error)
        finally:
            messages.cancel()  # where it is this side that cannot go on
            self.outbox.end()  # gRPC's thread that draws from it would wait for the next frame for ever
            self.over.set()
            self._handler.on_end(self, why)
            self._handler.finish()
            self.close()

    def close(self) -> None:
        """Ends the stream now."""
        self.outbox.end()
        with self._lock:
            self._closed = True
            call, channel = self._call, self._channel
            self._call = self._channel = None  # see _let_go
        if call is not None and channel is not None:
            call.cancel()
            channel.close()


def _channel(endpoint: Endpoint) -> grpc.Channel:
    if endpoint.tls is None:
        return grpc.insecure_channel(endpoint.address, options=_OPTIONS)
    from efl.transport import tls  # takes 80 ms, which clear text need not pay

    name = ("grpc.ssl_target_name_override", endpoint.tls.peer_name)
    return grpc.secure_channel(endpoint.address, tls.channel_credentials(endpoint.tls), options=[*_OPTIONS, name])


def _let_go(error: grpc.RpcError) -> None:
    """Lets a call that ended in an error go as soon as nobody needs it.

    The error is the call itself, and its traceback leads back to it: only a garbage collection would find it. The last
    one runs when the interpreter is taken down. Calls and channels then ask for a lock that one of gRPC's threads may
    have held when it was stopped, and the program would never end.
    """
    error.__traceback__ = None


def say_that_tls_is_wanted(endpoint: Endpoint, seconds: float) -> None:
    """Tells a listener without certificates, in clear text, why this party will not talk to it, and nothing else."""
    with grpc.insecure_channel(endpoint.address, options=_OPTIONS) as channel:
        try:
            next(channel.stream_stream(_CALL)(iter(()), timeout=seconds, metadata=[_WANTS_TLS]), None)
        except grpc.RpcError as error:
            _let_go(error)


class _Served(Connection):
    """The leader's side of a stream."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        super().__init__(urllib.parse.unquote(context.peer()))
        self.context = context

    def ended(self) -> None:
        """The call is over: its last message has left, or never will. Leaves nobody waiting in the outbox."""
        self.outbox.end()
        self.over.set()

    def close(self) -> None:
        self.outbox.end()
        with contextlib.suppress(Exception):  # an RPC that is over already cannot be cancelled
            self.context.cancel()


class _DaemonPool(futures.ThreadPoolExecutor):
    """A thread per call, and the interpreter waits for none at exit: a stream lasts as long as the run."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        future: futures.Future[Any] = futures.Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="efl-serve", daemon=True).start()
        return future


class Listener:
    """The leader's open port. Streams that arrive are told to the handler."""

    def __init__(self, endpoint: Endpoint, handler: Handler) -> None:
        """Opens the port.

        Args:
          endpoint: Where to listen.
          handler: Who is told what arrives.

        Raises:
          ConfigError: The address is taken or is not one of this machine's, or the certificates cannot be used.
        """
        self._handler, self._endpoint = handler, endpoint
        self._lock = threading.Lock()
        self._nameless: collections.deque[_Served] = collections.deque()
        self._handshakes: collections.deque[float] = collections.deque(maxlen=64)  # begun, and no call yet
        credentials = None
        if endpoint.tls is not None:
            from efl.transport import tls  # see _channel

            credentials = tls.server_credentials(
                endpoint, endpoint.tls, lambda: self._handshakes.append(time.monotonic())
            )
        self._server = grpc.server(
            _DaemonPool(max_workers=_MAX_CONNECTIONS),
            options=[*_OPTIONS, ("grpc.server_handshake_timeout_ms", int(1000 * _TLS_SECONDS))],
            maximum_concurrent_rpcs=_MAX_CONNECTIONS,
        )
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method}),))
        try:
            check_free(endpoint.address)
            if credentials is None:
                port = self._server.add_insecure_port(endpoint.address)
            else:
                port = self._server.add_secure_port(endpoint.address, credentials)
        except (RuntimeError, OSError):
            port = 0
        if not port:
            self._server.stop(None)
            raise ConfigError(
                f"the {endpoint.role} cannot listen on {endpoint.address!r}: another program holds the port, or the "
                "host is not this machine's. Stop the other program or choose another address (--local_addr)"
            )
        self._server.start()

    def failed_handshakes(self, patience: float = _TLS_SECONDS) -> int:
        """How many TLS handshakes seem to have failed since this was last asked. gRPC says nothing of these.

        Args:
          patience: After how many seconds one that has brought no call has failed.
        """
        soon, failed = time.monotonic() - patience, 0
        with contextlib.suppress(IndexError):  # a call takes one away in another thread
            while self._handshakes[0] < soon:
                self._handshakes.popleft()
                failed += 1
        return failed

    def _stranger(self, context: grpc.ServicerContext) -> str:
        """Why this is nobody to talk to; '' where it is the peer (or where there is no telling)."""
        if self._endpoint.tls is None:
            wants_tls = _WANTS_TLS in [tuple(item)[:2] for item in context.invocation_metadata()]
            return "it expects TLS, and this party has no certificates (my_certs)" if wants_tls else ""
        from efl.transport import tls  # see _channel

        with contextlib.suppress(IndexError):
            self._handshakes.popleft()
        return tls.stranger(context, self._endpoint.tls)

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        why = self._stranger(context)
        if why:
            self._handler.on_stranger(urllib.parse.unquote(context.peer()), why)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, why)  # raises
        connection = _Served(context)
        with self._lock:
            self._nameless.append(connection)
            surplus = self._nameless.popleft() if len(self._nameless) > _MAX_NAMELESS else None
        if surplus is not None:
            surplus.close()
        if not context.add_callback(connection.ended):
            connection.ended()
        call = operations.of_served(context)
        connection.outbox.write_to(call)
        connection.reader = threading.Thread(
            target=self._read, args=(connection, requests, call), name="efl-read", daemon=True
        )
        connection.reader.start()
        return iter(connection.outbox)

    def _read(self, connection: _Served, requests: Iterator[bytes], call: operations.Operations | None) -> None:
        why = ""
        silent = threading.Timer(_FIRST_MESSAGE_SECONDS, connection.close)
        silent.daemon = True
        silent.start()
        try:
            messages = self._from_the_first(requests, connection, silent)
            connection.read(messages, call, self._handler)
        except grpc.RpcError as error:
            why = _reason(error)
        except Exception as error:
            why = "the connection was reset"
            if type(error) is not Exception:  # gRPC raises bare ones where a call breaks; this is a fault of ours
                logger.exception("what %s sent could not be taken", connection.peer)
            connection.close()  # where it is this side that cannot go on
        finally:
            silent.cancel()
            self._named(connection)
            self._handler.on_end(connection, why)
            self._handler.finish()

    def _from_the_first(
        self, requests: Iterator[bytes], connection: _Served, silent: threading.Timer
    ) -> Iterator[bytes]:
        for first in requests:
            silent.cancel()
            self._named(connection)
            yield first
            break
        yield from requests

    def _named(self, connection: _Served) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._nameless.remove(connection)

    def close(self, grace: float) -> None:
        """Closes the port; streams get ``grace`` seconds to end. The port is free when this returns."""
        self._server.stop(grace).wait(grace + 5.0)
