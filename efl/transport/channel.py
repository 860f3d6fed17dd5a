"""A conversation with one peer: tensors by (name, step), control messages by topic, over one gRPC stream.

channel = Channel(Endpoint("leader", "localhost:50051", listen=True), hello)
channel.connect(timeout=60)
channel.send("train/fc1/grad", step, array)
fc1 = channel.recv("train/fc1", step, timeout=10)
channel.close()
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from efl.errors import ConfigError, DeadlineError, EflError, ProtocolError
from efl.transport import codec, handshake, rendezvous, watch
from efl.transport.conversation import ControlCallback, Conversation, TensorCallback, describe, logger
from efl.transport.handshake import Hello
from efl.transport.limits import DEFAULT_LIMITS, Endpoint, Limits
from efl.transport.link import Link
from efl.transport.mailbox import Mailbox, Slot
from efl.transport.stats import Stats

_T = TypeVar("_T")


class Channel:
    """One party's end of a conversation with one peer. All methods may be called from any thread.

    The peer learns everything in the hello, and every tensor and control message sent to it.
    """

    def __init__(self, endpoint: Endpoint, hello: Hello, limits: Limits = DEFAULT_LIMITS) -> None:
        """Checks the hello; opens nothing.

        Args:
          endpoint: Where the parties meet.
          hello: What this party is about to run.
          limits: What this party is willing to hold.

        Raises:
          ConfigError: The hello is not one that a peer could accept.
        """
        if endpoint.role != hello.role:
            raise ConfigError(
                f"the endpoint's role is {endpoint.role!r}, the hello's {hello.role!r}; expected the same"
            )
        handshake.to_bytes(hello, limits)
        codec.keep_freed_memory()
        self._talk = Conversation(endpoint, hello, limits)
        self._begun = False
        self._receives = {t.name for t in hello.tensors if t.direction == "recv"}

    # ---- before connect

    def subscribe(self, name: str, callback: TensorCallback) -> None:
        """Has the tensors of ``name`` handed to a callback in place of ``recv``.

        Args:
          name: A tensor of the hello with direction "recv".
          callback: Called as ``callback(step, array, digest)``, in order, from the thread that reads the stream: it
            must not wait for the peer. ``array`` may be read-only. The message counts against the window, which bounds
            how far the peer is ahead, until the callback returns; where it returns False, until ``consumed``.
            If it raises, this party fails (see ``abort``).

        Raises:
          ConfigError: After ``connect``, for an unknown name, or twice for one.
        """
        self._before_connect("subscribe")
        if name not in self._receives:
            raise ConfigError(
                f"subscribe({name!r}): not in this party's hello, which receives {sorted(self._receives)}"
            )
        if name in self._talk.tensor_callbacks:
            raise ConfigError(f"subscribe({name!r}): there is a callback for it already")
        self._talk.tensor_callbacks[name] = callback

    def consumed(self, keys: Iterable[tuple[str, int]]) -> None:
        """Takes messages for which a callback returned False: the peer may send as much again.

        Args:
          keys: (name, step) of each; one that is taken already is passed over.
        """
        self._talk.consumed(keys)

    def on_control(self, topic: str, callback: ControlCallback) -> None:
        """Has the control messages of ``topic`` handed to a callback in place of ``recv_control``.

        Args:
          topic: The address.
          callback: Called with the body, in order with the tensors' callbacks, from the thread that reads
          the stream.

        Raises:
          ConfigError: After ``connect``, or twice for one topic.
        """
        self._before_connect("on_control")
        if topic in self._talk.control_callbacks:
            raise ConfigError(f"on_control({topic!r}): there is a callback for it already")
        self._talk.control_callbacks[topic] = callback

    def on_failure(self, callback: Callable[[EflError], None]) -> None:
        """Has ``callback`` called once, from any thread, when the conversation fails after it began.

        Not when this party itself calls ``abort`` or ``close``. At once, when it has failed already.
        """
        with self._talk.lock:
            error = self._talk.error
            if error is None:
                self._talk.on_failure.append(callback)
        if error is not None:
            callback(error)

    def on_peer_closed(self, callback: Callable[[str], None]) -> None:
        """Has ``callback(peer)`` called when the peer says goodbye, after everything it has sent."""
        self._before_connect("on_peer_closed")
        self._talk.on_peer_closed.append(callback)

    def on_away(self, callback: Callable[[str], None]) -> None:
        """Has ``callback(what)`` called, from any thread, when the connection is lost and is looked for anew.

        ``what`` says in words who lost whom, and why.
        """
        self._before_connect("on_away")
        self._talk.on_away.append(callback)

    def on_back(self, callback: Callable[[float], None]) -> None:
        """Has ``callback(seconds)`` called when there is a connection again after so many seconds.

        Nothing was lost: what was sent meanwhile, or had not arrived, follows.
        """
        self._before_connect("on_back")
        self._talk.on_back.append(callback)

    def _before_connect(self, what: str) -> None:
        if self._begun:
            raise ConfigError(f"{what}(): call it before connect(); a message may have arrived already")

    def judge(self, judge: Callable[[Hello], list[str]]) -> None:
        """Has ``judge(hello)`` give further reasons to refuse a peer, or one that comes in place of a lost one.

        It is called from the thread that reads a stream. An empty list accepts.
        """
        self._before_connect("judge")
        self._talk.judge = judge

    def connect(self, timeout: float, stubborn: bool = False) -> Hello:
        """Finds the peer and shakes hands; which party starts first does not matter.

        Args:
          timeout: Seconds to wait for the peer.
          stubborn: Whether to refuse who disagrees and to wait on; otherwise a disagreement ends both.

        Returns:
          The peer's hello.

        Raises:
          PeerLost: No peer in time; the message says what to check.
          ConfigError: The port is taken, or connect() was called before.
          HandshakeError: The parties disagree (and not ``stubborn``); the message lists every disagreement.
        """
        if self._begun:
            raise ConfigError("connect(): this channel was connected before; make a new one")
        self._begun = True
        atexit.register(self._talk.left_open)
        threading.Thread(target=watch.keep_time, args=[self._talk], name="efl-time", daemon=True).start()
        try:
            return rendezvous.meet(self._talk, timeout, stubborn)
        except BaseException:  # undone, and raised again
            self._talk.over = True
            self._talk.tear_down()
            raise

    # ---- state

    @property
    def error(self) -> EflError | None:
        """Why the conversation failed, or None."""
        return self._talk.error

    @property
    def peer(self) -> Hello | None:
        """The peer's hello, or None before ``connect``."""
        return self._talk.link.peer if self._talk.met and self._talk.link is not None else None

    @property
    def peer_closed(self) -> bool:
        """Whether the peer has said goodbye."""
        link = self._talk.link
        return link is not None and link.peer_goodbye

    @property
    def away(self) -> bool:
        """Whether the connection is lost and looked for anew."""
        return self._talk.away_since is not None

    @property
    def stats(self) -> Stats:
        """A copy of the counters."""
        with self._talk.lock:
            return Stats(**self._talk.counts)

    def _link(self, what: str) -> Link:
        if not self._talk.met or self._talk.link is None:
            raise ConfigError(f"{what}: connect() first")
        return self._talk.link

    # ---- tensors

    def send(self, name: str, step: int, array: np.ndarray, digest: bytes = b"", timeout: float | None = None) -> None:
        """Sends a tensor. Returns when it is queued (the array may then be changed); waits only for flow
        control.

        Args:
          name: A tensor of the hello with direction "send".
          step: Larger than any step of that name before.
          array: Of the agreed dtype and shape.
          digest: Empty, or 16 bytes that travel beside it.
          timeout: Seconds to wait for flow control, None for ever (the conversation's end ends the wait).

        Raises:
          ConfigError: The tensor is not as agreed, or called from a callback while the peer's window is full.
          DeadlineError: The peer is alive but has not taken enough of what was sent before (the time while the
            connection is lost does not count). After a part of a large
            tensor has left, nothing else can be sent under its name.
          LinkError: The conversation has ended; PeerLost, PeerClosed, PeerFailed, ProtocolError say how.
        """
        talk = self._talk
        link = talk.link
        if link is None or not talk.met:
            raise ConfigError(f"send({name!r}, step={step}): connect() first")
        out = link.prepare(name, int(step), np.asarray(array), digest)
        since: float | None = None
        while not out.done:
            with talk.lock:
                if talk.ended:
                    raise talk.end_error(f"send({name!r}, step={step})")
                if link.ready(out):
                    link.transmit(out)
                    talk.flush()
                    if out.done:
                        talk.counts["messages_sent"] += 1
                        talk.notify()
                    continue
                if talk.reading():
                    raise ConfigError(
                        f"send({name!r}, step={step}) from a callback of the channel: the peer's window is "
                        "full, and "
                        "waiting here would stop the thread that reads the peer's credit. Send from another "
                        "thread"
                    )
                now = time.monotonic()
                since = now if since is None or talk.away_since is not None else max(since, talk.back_at)
                limit = None if timeout is None else since + timeout
                if limit is not None and now >= limit:
                    raise DeadlineError(
                        f"send({name!r}, step={step}): {link.peer_label} has not taken what was sent before within "
                        f"{timeout:g} s, but is alive: {link.last_heard(now)}. Does it run the same steps?"
                    )
                link.starve()
                talk.flush()
                talk.wait(None if limit is None else limit - now)

    def recv(self, name: str, step: int, timeout: float | None = None) -> np.ndarray:
        """Waits for the tensor ``(name, step)`` and takes it.

        Args:
          name: A tensor of the hello with direction "recv", not subscribed.
          step: Which.
          timeout: Seconds, None for ever (the conversation's end ends the wait).

        Returns:
          The array, possibly read-only.

        Raises:
          DeadlineError: It did not come in time although the peer is alive.
          ProtocolError: The peer is at a later step already: it will never come.
          PeerClosed: The peer said goodbye without sending it.
          LinkError: The conversation has ended.
          ConfigError: An unknown or subscribed name.
        """
        talk, key = self._talk, (name, int(step))
        link = talk.link
        if link is None or not talk.met:
            raise ConfigError(f"{describe(key)}: connect() first")
        if name not in self._receives:
            raise ConfigError(f"{describe(key)}: not in this party's hello, which receives {sorted(self._receives)}")
        if name in talk.tensor_callbacks:
            raise ConfigError(f"{describe(key)}: this tensor is subscribed; its callback takes it")
        with talk.lock:
            message = talk.tensors.take(key)
            if message is not None:
                link.consumed(message.nbytes)
                if link.pending:
                    talk.flush()
                return message.array
            if talk.ended:
                raise talk.end_error(describe(key))
            newest = link.newest_step(name)
            if newest > step:
                raise ProtocolError(
                    f"{describe(key)}: {link.peer_label} has sent step {newest} already, so step {step} was "
                    "taken or "
                    "will never come. Do both parties count the same steps?"
                )
            slot = talk.tensors.wait_for(key)
        item = self._wait(talk.tensors, slot, key, timeout)
        return item.array

    def _wait(self, box: Mailbox[_T], slot: Slot[_T], key: tuple[str, int] | str, timeout: float | None) -> _T:
        """What is put into a slot; time while the connection is lost does not count."""
        talk = self._talk
        since = time.monotonic()
        item = slot.wait(timeout)
        while item is None:
            assert timeout is not None
            with talk.lock:
                now = time.monotonic()
                since = now if talk.away_since is not None else max(since, talk.back_at)
                left = since + timeout - now
                if left <= 0 and box.leave(slot):
                    raise self._late(key, timeout)
            item = slot.wait(left if left > 0 else None)
        if isinstance(item, EflError):
            raise item
        return item

    def _late(self, key: tuple[str, int] | str, timeout: float | None) -> DeadlineError:
        link = self._link(describe(key))
        return DeadlineError(
            f"{describe(key)}: {link.peer_label} did not send it within {timeout:g} s, but is alive: "
            f"{link.last_heard(time.monotonic())}. Is it slower than the timeout, or does it not run this "
            "step?"
        )

    # ---- control messages

    def send_control(self, topic: str, body: Mapping[str, Any]) -> None:
        """Sends a small JSON object; never waits. Ordered with the tensors.

        Args:
          topic: Its address, any text of up to ``max_name_bytes``.
          body: A JSON object of up to ``max_control_bytes``.

        Raises:
          ConfigError: It is not JSON, or too large.
          LinkError: The conversation has ended.
        """
        what = f"send_control({topic!r})"
        link = self._link(what)
        with self._talk.lock:
            if self._talk.ended:
                raise self._talk.end_error(what)
            link.send_control(topic, body)
            self._talk.counts["messages_sent"] += 1
            self._talk.flush()

    def recv_control(self, topic: str, timeout: float | None = None) -> dict[str, Any]:
        """Waits for the next control message of ``topic``.

        Args:
          topic: The address, without a callback.
          timeout: Seconds, None for ever (the conversation's end ends the wait).

        Returns:
          The body.

        Raises:
          DeadlineError: None came in time although the peer is alive.
          LinkError: The conversation has ended.
          ConfigError: The topic has a callback.
        """
        talk = self._talk
        self._link(describe(topic))
        if topic in talk.control_callbacks:
            raise ConfigError(f"{describe(topic)}: this topic has a callback, which takes its messages")
        with talk.lock:
            body = talk.controls.take(topic)
            if body is not None:
                return body
            if talk.ended:
                raise talk.end_error(describe(topic))
            slot = talk.controls.wait_for(topic)
        return self._wait(talk.controls, slot, topic, timeout)

    # ---- ends

    def close(self, timeout: float = 10.0, firm: bool = False) -> None:
        """Sends what is queued, says goodbye, waits for the peer's goodbye, frees the port. May be called
        again.

        Args:
          timeout: Seconds to wait for the peer, at most; after that it is left with a warning. While the connection is
            lost, the peer may still need what was sent last: then up to ``peer_timeout``.
          firm: ``timeout`` holds in any case: the peer needs nothing more.
        """
        talk = self._talk
        began = time.monotonic()
        with talk.lock:
            if talk.over:
                return
            talk.closing = True
            link = talk.link
            if link is not None and talk.met and talk.error is None:
                link.goodbye()
                talk.flush()
                while not self._settled(link) and not (talk.gone and talk.worked_off) and talk.error is None:
                    left = began + timeout - time.monotonic()
                    if talk.away_since is not None and not link.peer_goodbye and not firm:
                        began, left = time.monotonic(), 1.0
                    if left <= 0 or talk.reading():
                        break
                    talk.wait(left)
                if talk.error is None and not self._settled(link):
                    logger.warning("%s: closed without a goodbye of %s: %s", talk.hello.role, link.peer_label,
                                   link.last_heard(time.monotonic()))  # fmt: skip
            talk.over = True
            talk.wake_takers()
        talk.outcomes.put((None, None))
        talk.tear_down()

    def _settled(self, link: Link) -> bool:
        """Whether both have said goodbye, and everything before it has been taken."""
        return link.flushed and link.peer_goodbye and self._talk.worked_off

    def abandon(self) -> None:
        """Closes at once and says nothing: the peer's process is another one now."""
        with self._talk.lock:
            self._talk.over = self._talk.mute = True
            self._talk.wake_takers()
        self._talk.tear_down()

    def abort(self, error: BaseException, where: str = "", share_text: bool = False) -> None:
        """This party's program failed: tells the peer and closes at once.

        The peer raises PeerFailed with the type of ``error``, and its text only when it is one of efl's own
        errors
        (the texts of others may quote data).

        Args:
          error: What happened.
          where: In which step, in words.
          share_text: Whether the text of any error is told.
        """
        self._talk.abort(error, where=where, share_text=share_text)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.abort(error)
