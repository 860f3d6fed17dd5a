"""Send and receive inside a TensorFlow graph.

A ``Communicator`` turns a channel to the peer into graph ops. A send is a non-blocking ``numpy_function``; a
receive is the dequeue of an ``Inbox``, which holds no thread while it waits.
``FederalModel`` owns one and drives it; used by itself, a session with ``Communicator.hook`` does:

    comm = efl.Communicator("leader", peer_addr="", local_addr="localhost:50051")
    x = tf.reshape(comm.recv("x"), [-1, 8])
    done = comm.send("y", tf.reduce_sum(x, axis=1))
    with tf.train.MonitoredSession(hooks=[comm.hook]) as sess:
        sess.run(done)

What a peer learns: every tensor that is sent to it, when each step happens, and the names, dtypes and static shapes of
the exchange (handshake).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tensorflow.compat.v1 as tf

from efl._ends import End
from efl._exchanged import Exchanged
from efl._graph import as_graph_tensor, call_python, op_name, raw_session
from efl._inbox import Inbox
from efl._reader_ops import ReaderOps
from efl._steps import Disputed, Exchange, Scope, sample_ids
from efl._task_scope import TaskScope, current_task_scope
from efl.errors import ConfigError, DataError, EflError, LinkError, ModelError, PeerClosed
from efl.settings import ROLES, check_certificates, check_clear_text
from efl.transport import Channel, Endpoint, Hello, Limits, Tls, handshake

if TYPE_CHECKING:
    from efl.hooks.communicator_hook import CommunicatorHook

_log = logging.getLogger("efl")
_PEER = {"leader": "follower", "follower": "leader"}
_SETTLE_SECONDS = 2.0
_TELL_SECONDS = 5.0  # both parties are usually started together


def _certificates(my_certs: str | None, my_key: str | None, peer_certs: str | None, peer_name: str) -> Tls | None:
    """Which files, where they are given; reads them, so that a wrong one is told before the data is read."""
    given = {"my_certs": my_certs, "my_key": my_key, "peer_certs": peer_certs}
    if not check_certificates(given):
        return None
    from efl.transport import tls  # takes 80 ms, which clear text need not pay

    files = Tls(os.fspath(my_certs or ""), os.fspath(my_key or ""), os.fspath(peer_certs or ""), peer_name)
    tls.load(files)
    return files


class Communicator:
    """Channel of this party to its peer, as ops of the current graph.

    Args:
      federal_role: ``"leader"`` (listens) or ``"follower"`` (dials).
      peer_addr: ``host:port`` that a follower dials; a leader may leave it empty.
      local_addr: ``host:port`` that a leader listens on; a follower may leave it empty.
      client_thread_num: Accepted for compatibility: one stream per pair of parties needs no pool.
      server_thread_num: As ``client_thread_num``.
      scanning_interval_milliseconds: How often waiting receives are looked at; default 30 000.
      default_timeout_milliseconds: How long a receive may wait while the peer is alive; default 600 000.
      connect_timeout: Seconds to wait for the peer at the start.
      limits: Bounds on what a peer may send.
      share_error_text: Whether the peer is told the text of an error that is not efl's own; it may hold data.
      insecure: Allows clear text beyond this machine. Everybody on the way can then read and change what is sent.
      my_certs: File of this party's certificate (PEM); with ``my_key`` and ``peer_certs`` the connection is encrypted.
      my_key: File of its private key.
      peer_certs: File of the authorities by which the peer is recognised.
      peer_name: Name that the peer's certificate must carry; the peer's role by default.

    Raises:
      ConfigError: Unknown role, the address that the role needs is missing, it is beyond this machine in clear text, or
        certificates that cannot be used.
    """

    def __init__(
        self,
        federal_role: str,
        peer_addr: str,
        local_addr: str,
        client_thread_num: int | None = None,
        server_thread_num: int | None = None,
        scanning_interval_milliseconds: int | None = None,
        default_timeout_milliseconds: int | None = None,
        *,
        connect_timeout: float = 600.0,
        limits: Limits | None = None,
        insecure: bool = False,
        share_error_text: bool = False,
        my_certs: str | None = None,
        my_key: str | None = None,
        peer_certs: str | None = None,
        peer_name: str | None = None,
    ) -> None:
        if federal_role not in ROLES:
            raise ConfigError(f"federal_role={federal_role!r}: expected 'leader' or 'follower'")
        address, option = (local_addr, "local_addr") if federal_role == "leader" else (peer_addr, "peer_addr")
        if not address:
            raise ConfigError(f"a {federal_role} needs {option} (host:port); it is empty")
        for option_name, count in (
            ("client_thread_num", client_thread_num),
            ("server_thread_num", server_thread_num),
            ("scanning_interval_milliseconds", scanning_interval_milliseconds),
            ("default_timeout_milliseconds", default_timeout_milliseconds),
        ):
            if count is not None and count < 1:
                raise ConfigError(f"{option_name}={count}: expected a positive number or None")
        tls = _certificates(my_certs, my_key, peer_certs, peer_name or _PEER[federal_role])
        self._endpoint = Endpoint(federal_role, address, federal_role == "leader", tls)
        if tls is None:
            check_clear_text(federal_role, peer_addr, local_addr, insecure)
        self.federal_role = federal_role
        self.peer_role = _PEER[federal_role]
        self.exchange = Exchange(
            federal_role,
            self.peer_role,
            timeout=(600_000 if default_timeout_milliseconds is None else default_timeout_milliseconds) / 1000,
            scan_interval=(30_000 if scanning_interval_milliseconds is None else scanning_interval_milliseconds) / 1000,
        )
        self._connect_timeout = connect_timeout
        self._limits = limits or Limits()
        self._share_error_text = share_error_text
        self.ends: dict[TaskScope, list[End]] = {}  # of layers that both parties compute together
        self._exchanged = Exchanged()
        self._inboxes: list[Inbox] = []
        self._ids_noted: dict[TaskScope, tf.Operation] = {}
        self._batch_read: dict[TaskScope, tf.Operation] = {}
        self._channel: Channel | None = None
        self._hook: CommunicatorHook | None = None
        self._reader_ops = ReaderOps(self, self._register_reader, self._push_now)

    # ---- ops -------------------------------------------------------------------------------------------------------

    def send(
        self, name: str, tensor: tf.Tensor, *, scope: TaskScope | None = None, require_grad: bool = False
    ) -> tf.Operation:
        """Makes an op that sends ``tensor`` to the peer.

        Args:
          name: Identifies the tensor; the peer receives it under the same name and scope.
          tensor: Any dense tensor; its dtype and static shape are compared with the peer's at the handshake.
          scope: Mode and task it belongs to; the current task scope by default.
          require_grad: Told to the peer at the handshake: it must return the gradient.

        Returns:
          The sending op. It does not block; it must run at most once in a step.

        Raises:
          ModelError: Not a graph tensor, the name is taken in this scope, or the call is inside a branch or a loop.
        """
        scope = current_task_scope() if scope is None else scope
        graph = tf.get_default_graph()
        if graph.building_function or graph._get_control_flow_context() is not None:
            raise ModelError(
                f"send({name!r}) inside tf.cond, tf.while_loop or a tf.function: a message goes once in each "
                "step, and the peer would wait for ever for one that does not; send what the branch or the loop returns"
            )
        tensor = as_graph_tensor(tensor, f"send({name!r})")
        wire = self._exchanged.add("send", name, scope, tensor.dtype, tensor.shape, require_grad)
        state = self.exchange.scope(scope.wire)

        def push(array: np.ndarray) -> None:
            self._guarded(lambda: self.exchange.send(state, wire, np.asarray(array)))

        try:
            with tf.control_dependencies(self.before_sends(scope)):
                return call_python(push, [tensor], op_name("efl_send", wire))
        except BaseException:  # undone, and raised again
            self._exchanged.remove("send", wire)
            raise

    def recv(
        self,
        name: str,
        dtype: tf.DType = tf.float32,
        *,
        shape: Any = None,
        scope: TaskScope | None = None,
        require_grad: bool = False,
    ) -> tf.Tensor:
        """Makes a tensor whose value is what the peer sends under ``name``.

        Args:
          name: The peer's name for it.
          dtype: Its dtype, compared with the peer's at the handshake.
          shape: Its static shape where known; unknown by default, so reshape before use.
          scope: Mode and task it belongs to; the current task scope by default.
          require_grad: Told to the peer at the handshake: this side will return the gradient.

        Returns:
          The received tensor. Each step that runs it takes exactly one message.

        Raises:
          ModelError: The name is taken in this scope.
        """
        scope = current_task_scope() if scope is None else scope
        dtype = tf.as_dtype(dtype)
        static = tf.TensorShape(shape)
        wire = self._exchanged.add("recv", name, scope, dtype, static, require_grad)
        try:
            inbox = Inbox(wire, dtype, static, self._after_ids(scope))
        except BaseException:  # undone, and raised again
            self._exchanged.remove("recv", wire)
            raise
        self.exchange.scope(scope.wire).sinks.append(inbox)
        self._inboxes.append(inbox)
        return inbox.tensor

    # ---- for layers that talk to the peer by themselves (efl._rounds)

    def declare_message(
        self, direction: Literal["send", "recv"], name: str, scope: TaskScope, dtype: tf.DType, shape: tf.TensorShape
    ) -> str:
        """Declares a message that no op of the graph sends or receives; returns its name on the wire."""
        return self._exchanged.add(direction, name, scope, dtype, shape, False)

    def before_sends(self, scope: TaskScope) -> list[tf.Operation]:
        """What must have run before something of a scope is sent."""
        return [*self._after_ids(scope), *self._after_batch(scope)]

    def own_inboxes(self, state: Scope, inboxes: Sequence[Inbox]) -> None:
        """Binds inboxes that this party fills itself to each session."""
        state.own_sinks.extend(inboxes)
        self._inboxes.extend(inboxes)

    def watch_ids(self, ids: tf.Tensor, block: tf.Tensor | None = None, row: tf.Tensor | None = None) -> None:
        """Compares the sample ids of the current scope's batches with the peer's, in every step.

        Args:
          ids: [batch] or [batch, 1], integers or strings. What a peer learns of them:
            [Sample ids](../privacy.md#sample-ids).
          block: [batch] int64, index of each row's block (see ``name_blocks``), or None.
          row: [batch] int64, row within that block, or None.

        Raises:
          ModelError: The scope has ids already.
          DataError: ``ids`` are neither integers nor strings.
        """
        scope = current_task_scope()
        if f"{scope.wire}/sample_id" in self._exchanged.terms:
            raise ModelError(
                f"{scope.wire}: sample ids are verified already; one FederalSample per task and mode may do it"
            )
        if not (ids.dtype.is_integer or ids.dtype == tf.string):
            raise DataError(f"sample ids of {scope.wire} are {ids.dtype.name}: expected integers or strings")
        self.declare(f"{scope.wire}/sample_id", "string" if ids.dtype == tf.string else "int")
        state = self.exchange.scope(scope.wire)
        # A reader of both parties, made before its sample, has declared its batch size.
        state.ids.size_agreed = any(
            term.startswith(f"{scope.wire}/") and term.endswith("/batch_size") for term in self._exchanged.terms
        )

        def note(*columns: np.ndarray) -> None:
            batch = sample_ids.Batch(*(np.asarray(column) for column in columns))
            self._guarded(lambda: self.exchange.note_batch(state, batch))

        columns = [ids] if block is None or row is None else [ids, block, row]
        self._ids_noted[scope] = call_python(note, columns, op_name("efl_sample_ids", scope.wire))

    def send_after(self, scope: TaskScope, read: Sequence[tf.Tensor]) -> list[tf.Operation]:
        """Makes all further sends of a scope wait for its batch; returns the ops that they wait for.

        A message of step n is what tells the peer that this party has data for step n, and which rows.
        """
        self._batch_read[scope] = tf.group(*read)
        return self.before_sends(scope)

    def name_blocks(self, names: Sequence[str]) -> None:
        """Gives names to the block indices of the current scope's ids, for error messages."""
        self.exchange.scope(current_task_scope().wire).ids.blocks = tuple(names)

    def send_reader_state(self, name: str, block_id: Any, sample_index: Any) -> tf.Operation:
        """Makes an op that tells the peer where a reader of that name reads next (usually the leader's).

        Args:
          name: The reader's name; both parties use the same.
          block_id: Scalar string (or tensor): the block to read.
          sample_index: Scalar integer (or tensor): the row in it to begin at.
        """
        return self._reader_ops.send(name, block_id, sample_index)

    def terminate_reader(self, name: str) -> tf.Operation:
        """Makes an op that tells the peer that the reader of that name is done."""
        return self._reader_ops.terminate(name)

    def recv_reader_state(self, name: str) -> tuple[tf.Tensor, tf.Tensor]:
        """Makes the pair (block_id, sample_index), scalar string and int64, that the peer's reader announced.

        Running it raises ``tf.errors.OutOfRangeError`` after the peer terminated the reader.
        """
        return self._reader_ops.recv(name)

    def add_step(self) -> tf.Operation:
        """Makes an op that ends the current step of the communicator's own scope and begins the next.

        Only for sessions that run without ``hook`` (which does the same after each run); ``initialize`` begins
        the first step. Messages are matched by step, so both parties must count the same steps.
        """

        def advance() -> None:
            scope = self.exchange.scope(TaskScope().wire)
            self.exchange.complete(scope)
            with contextlib.suppress(PeerClosed):  # no failure of the step that was done; the next message raises it
                self.exchange.begin(scope)

        return call_python(advance, [], "efl_add_step")

    @property
    def hook(self) -> CommunicatorHook:
        """A ``SessionRunHook`` that connects, counts steps and shuts down. ``FederalModel`` needs none."""
        if self._hook is None:
            from efl.hooks.communicator_hook import CommunicatorHook  # which imports this module

            self._hook = CommunicatorHook(self)
        return self._hook

    # ---- the conversation around the steps ----------------------------------------------------------------------

    def complete(self) -> None:
        """Accepts no further sends and receives. ``FederalModel.compile`` calls it."""
        self._exchanged.complete()

    def declare(self, term: str, value: Any) -> None:
        """Adds a term (a JSON value) that must be equal on both sides; the handshake compares and names it.

        Raises:
          ModelError: The term was declared with another value, or the handshake is over.
        """
        self._exchanged.declare(term, value)

    def connect(
        self,
        terms: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        judge: Callable[[Mapping[str, Any], bool], list[str]] | None = None,
        stubborn: bool = False,
    ) -> Mapping[str, Any]:
        """Connects and shakes hands.

        Args:
          terms: Further terms that must be equal on both sides.
          facts: What this side tells the other (JSON values).
          timeout: Seconds to wait for the peer; ``connect_timeout`` by default.
          judge: Reasons why somebody with such facts cannot be the peer; with True, that cannot take the place of one
            that was lost.
          stubborn: Whether to refuse who disagrees, and to wait on.

        Returns:
          The peer's facts.

        Raises:
          ConfigError: An address that cannot be used, or a port that is taken.
          HandshakeError: The parties disagree; lists every disagreement.
          PeerLost: No peer came in time.
        """
        nonce = secrets.token_hex(16)
        hello = Hello(
            self.federal_role,
            self._exchanged.specs,
            {**self._exchanged.terms, **(terms or {})},
            {**(facts or {}), "nonce": nonce},
        )
        channel = Channel(self._endpoint, hello, self._limits)
        self.exchange.attach(channel)
        self._use(channel)
        self._reader_ops.clear()
        if judge is not None:
            ask = judge
            channel.judge(lambda hello: ask(hello.facts, stubborn or channel.away))
        try:
            peer = channel.connect(self._connect_timeout if timeout is None else timeout, stubborn)
        except BaseException:  # undone, and raised again
            self._use(None)
            channel.close(0.0)
            raise
        peer_nonce = peer.facts.get("nonce")
        if not isinstance(peer_nonce, str):
            raise LinkError(f"{self.peer_role} sent no nonce in its handshake: not an efl of this version")
        self.exchange.start(sample_ids.derive_key([nonce.encode(), peer_nonce.encode()]))
        return peer.facts

    def tell_failure(self, error: BaseException, begun: bool = False) -> None:
        """Tells the peer that this party failed before it could begin, if the peer is there within a few seconds.

        Otherwise it would wait for somebody who will never come. It learns what ``abort`` would tell it.

        Args:
          error: What happened.
          begun: Whether a run was under way, whose peer has died: the process started in its place is told.
        """
        what = "go on" if begun else "begin"
        _log.error("%s could not %s: %s: %s", self.federal_role, what, type(error).__name__, error)
        _log.info("%s: looking for the %s, to tell it", self.federal_role, self.peer_role)
        facts = handshake.failure_facts(error, begun)
        channel = Channel(self._endpoint, Hello(self.federal_role, facts=facts), self._limits)
        # Told, the handshake is refused; or there is nobody to tell. Whatever it is, ``error`` matters more.
        with contextlib.suppress(Exception):
            channel.connect(min(_TELL_SECONDS, self._connect_timeout))
        channel.close(0.0)

    def initialize(self, sess: tf.Session) -> None:
        """Connects if that was not done yet, binds the receiving ends to a session, and begins the first step.

        Call it after all ops are made.
        """
        steps = self.exchange.scope(TaskScope().wire)
        if self._channel is None:
            steps.step = 0  # both parties count from the start of their conversation
            self.connect()
            atexit.register(self._program_ends)
        self.bind(sess)
        try:
            self.exchange.begin(steps)
        except PeerClosed:
            # What a reader was told before the goodbye is still there to be taken; no step of tensors is.
            if not self.exchange.untaken(besides=steps):
                raise

    def bind(self, sess: tf.Session) -> None:
        """Binds the receiving ends to a session: what arrives is handed to it from now on."""
        session = raw_session(sess)
        for inbox in self._inboxes:
            inbox.bind(session)
        self.exchange.bind()

    def shutdown(self, sess: tf.Session | None = None, timeout: float = 10.0, *, firm: bool = False) -> EflError | None:
        """Says goodbye and closes the channel; a later ``connect`` starts anew.

        Args:
          sess: Accepted for compatibility.
          timeout: Seconds to wait for the peer's goodbye; while the connection is lost, up to ``peer_timeout``.
          firm: Waits no longer than ``timeout`` in any case.

        Returns:
          Why the peer's goodbye did not come, where the conversation failed before it; else None.
        """
        self.exchange.closing()
        failure = None
        if self._channel is not None:
            channel = self._channel
            channel.close(timeout, firm)
            if channel.error is None:
                self.exchange.settle(_SETTLE_SECONDS)
            failure = None if channel.peer_closed else channel.error
            self._use(None)
        self.exchange.unbind()
        return failure

    def abandon(self) -> None:
        """Closes the channel and says nothing: the peer's process is another one now."""
        self.exchange.closing()
        if self._channel is not None:
            self._channel.abandon()
            self._use(None)
        self.exchange.unbind()

    def abort(self, error: BaseException, where: str = "") -> None:
        """Tells the peer that this party failed, and why, and closes the channel at once.

        Args:
          error: Its type is told; its text only where it is efl's own, or with ``share_error_text``.
          where: In which step, in words.
        """
        self.exchange.closing()
        if self._channel is not None:
            if isinstance(error, EflError) and error is self._channel.error:
                self._channel.close(0.0)
            else:
                self._channel.abort(error, where, self._share_error_text)
            self._use(None)
        self.exchange.unbind()

    def check(self) -> None:
        """Raises why the conversation failed, if it did; a session of your own does not know.

        Raises:
          EflError: The reason.
        """
        self.exchange.check()

    def send_ckpt_version(self, sess: tf.Session, version: str) -> None:
        """Tells the peer which checkpoint this party restored (usually the leader's to call)."""
        self._connected().send_control("ckpt", {"version": str(version)})

    def recv_ckpt_version(self, sess: tf.Session) -> str:
        """Waits for the peer's ``send_ckpt_version`` and returns its version."""
        return str(self._connected().recv_control("ckpt", self._connect_timeout).get("version", ""))

    def send_plan(self, name: str, plan: Mapping[str, Any]) -> None:
        """Sends a reader's plan (JSON, at most 1 MiB) to the peer. Outside the graph."""
        self._connected().send_control(f"plan/{name}", dict(plan))

    def recv_plan(self, name: str) -> dict[str, Any]:
        """Waits for the peer's plan of that name.

        Raises:
          LinkError: The conversation failed, or nothing came in time.
        """
        return self._connected().recv_control(f"plan/{name}", self._connect_timeout)

    @property
    def connected(self) -> bool:
        """Whether the parties have shaken hands and neither has closed."""
        return self._channel is not None and self._channel.error is None

    @property
    def away(self) -> bool:
        """Whether the connection to the peer is lost, and looked for anew."""
        return self._channel is not None and self._channel.away

    @property
    def channel(self) -> Channel:
        """The channel of the running session. Raises LinkError where there is none."""
        return self._connected()

    def names(self, direction: str, scope: TaskScope) -> list[str]:
        """Wire names of what this party sends or receives in a scope. ``direction`` is ``"send"`` or ``"recv"``."""
        return self._exchanged.names(direction, scope)

    def verifies_ids(self, scope: TaskScope) -> bool:
        """Whether the sample ids of a scope are compared with the peer's."""
        return scope in self._ids_noted

    def arrived_shapes(self, scope: TaskScope) -> dict[str, tuple[int, ...]]:
        """Shapes of what has come in a scope's running (or failed) step, by the names of ``recv``."""
        state, start = self.exchange.scope(scope.wire), f"{scope.wire}/"
        return {
            inbox.name[len(start) :]: inbox.last_shape
            for inbox in self._inboxes
            if inbox.name.startswith(start) and state.running and state.arrived.get(inbox.name) == state.running
        }

    def scope_state(self, scope: TaskScope) -> Scope:
        """The conversation's state of a scope, for the step loop."""
        return self.exchange.scope(scope.wire)

    # ---- private ---------------------------------------------------------------------------------------------------

    def _register_reader(self, name: str, scope: TaskScope) -> str:
        wire = f"{scope.wire}/{name}"
        if ("send", wire) in self._exchanged:
            return wire
        return self._exchanged.add("send", name, scope, tf.string, tf.TensorShape([3]), False)

    def _push_now(self, wire: str, step: int, array: np.ndarray) -> None:
        self._guarded(lambda: self._connected().send(wire, step, array, timeout=self.exchange.timeout))

    def _program_ends(self) -> None:
        # Without a shutdown(). The peer would take it for a party that died, and wait.
        error = getattr(sys, "last_value", None)  # what ended the program
        if isinstance(error, Exception) and not hasattr(sys, "ps1"):
            self.abort(error)
        else:
            self.shutdown(timeout=_SETTLE_SECONDS)

    def _use(self, channel: Channel | None) -> None:
        if channel is None:
            atexit.unregister(self._program_ends)
        self._channel = channel
        self._exchanged.seal(channel is not None)

    def _connected(self) -> Channel:
        if self._channel is None:
            raise LinkError(f"{self.federal_role} is not connected to {self.peer_role}; call initialize(sess) first")
        return self._channel

    def _after_ids(self, scope: TaskScope) -> list[tf.Operation]:
        # Sent and received after the batch's ids are known here: no batch out of line goes into a computation.
        noted = self._ids_noted.get(scope)
        return [] if noted is None else [noted]

    def _after_batch(self, scope: TaskScope) -> list[tf.Operation]:
        read = self._batch_read.get(scope)
        return [] if read is None else [read]

    def _guarded(self, action: Callable[[], None]) -> None:
        # TensorFlow turns whatever a numpy_function raises into UnknownError; the step loop asks the conversation.
        try:
            action()
        except Disputed:
            raise  # the parties are finding out which row differs; the conversation fails with the result
        except EflError as error:
            self.exchange.fail(error, abort=False)
            raise
