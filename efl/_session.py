"""A session with hooks that never recovers by itself.

``tf.train.MonitoredSession`` recreates itself after some errors and ends *as if successful* after others; in a
federation either one hangs or misleads the peer. This one runs the same ``SessionRunHook`` protocol over a plain
``tf.Session`` and lets every error through. A set of fetches that is run again and again (a training step) becomes one
cached callable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf
from tensorflow.core.protobuf import config_pb2

from efl import _closing
from efl.errors import ModelError


def compile_call(
    session: tf.Session, fetches: Sequence[Any], feeds: Sequence[tf.Tensor] = (), here: bool = False
) -> Callable[..., list[Any]]:
    """A callable that runs fixed fetches with arrays for fixed feeds, in order.

    Its result has one value per fetch, None for an op. With ``here`` it runs on the thread that calls it and needs none
    of the pool, whose threads may all be busy, or even wait for what this call brings.

    ``Session.make_callable`` takes the slow way through ``run`` as soon as there are feeds (0.2 ms for one array); the
    callable that both stand on has no public name.
    """
    options = config_pb2.CallableOptions()
    if here:
        options.run_options.inter_op_thread_pool = -1
    options.feed.extend(feed.name for feed in feeds)
    is_tensor = [not isinstance(fetch, tf.Operation) for fetch in fetches]
    options.fetch.extend(fetch.name for fetch, tensor in zip(fetches, is_tensor, strict=True) if tensor)
    options.target.extend(fetch.name for fetch, tensor in zip(fetches, is_tensor, strict=True) if not tensor)
    run = session._make_callable_from_options(options)
    if all(is_tensor):
        return run

    def call(*values: np.ndarray) -> list[Any]:
        results = iter(run(*values))
        return [next(results) if tensor else None for tensor in is_tensor]

    return call


def default_config() -> tf.ConfigProto:
    """Session options where the user gives none.

    TensorFlow's idle pool threads spin before they sleep. A party that waits for its peer in the middle of every step
    would spend a core on that, which the peer, the transport or its own reader could use.
    """
    config = tf.ConfigProto()
    config.experimental.disable_thread_spinning = True
    return config


class HookedSession:
    """A ``tf.Session`` whose runs call the active hooks.

    Args:
      graph: The graph to run.
      config: Session options of the user, or None.
      before_run: Called before ``run``, which may look at anything.
    """

    def __init__(
        self,
        graph: tf.Graph,
        config: tf.ConfigProto | None = None,
        before_run: Callable[[], None] = lambda: None,
    ) -> None:
        self._before_run = before_run
        self._session = tf.Session(graph=graph, config=default_config() if config is None else config)
        self._closing = _closing.look_after(self, self._session)
        self._coordinator = tf.train.Coordinator()
        self._callables: dict[tuple[int, ...], tuple[tuple[Any, ...], Callable[..., Any]]] = {}
        self._hooks: tuple[tf.train.SessionRunHook, ...] = ()
        self._stop = False

    @property
    def graph(self) -> tf.Graph:
        """The graph of this session."""
        return self._session.graph

    def raw_session(self) -> tf.Session:
        """The plain session; its runs call no hooks."""
        return self._session

    def start(self, hooks: Sequence[tf.train.SessionRunHook]) -> None:
        """Starts queue runners and tells every hook that the session exists (variables are initialised by now)."""
        with self._session.graph.as_default():
            if tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS):
                tf.train.start_queue_runners(self._session, self._coordinator)
            for hook in hooks:
                hook.after_create_session(self._session, self._coordinator)

    def activate(self, hooks: Sequence[tf.train.SessionRunHook]) -> None:
        """The hooks that the following runs call."""
        self._hooks = tuple(hooks)
        self._stop = False

    def run(self, fetches: Any, feed_dict: dict[Any, Any] | None = None) -> Any:
        """Runs any fetches, with the active hooks; arguments and result as of ``tf.Session.run``."""
        self._before_run()
        if not self._hooks:
            return self._session.run(fetches, feed_dict)
        return self._run_hooked(fetches, feed_dict or {}, lambda: self._session.run(fetches, feed_dict))

    def run_step(
        self, fetches: tuple[Any, ...], feeds: tuple[Any, ...] = (), values: tuple[Any, ...] = ()
    ) -> list[Any]:
        """Runs a fixed tuple of fetches with values for a fixed tuple of feeds; made for many calls."""
        key = tuple(map(id, fetches)) + tuple(map(id, feeds))
        cached = self._callables.get(key)
        if cached is None:
            # The fetches are kept beside the callable: a key made of ids is only good while the objects live.
            try:
                cached = ((fetches, feeds), compile_call(self._session, fetches, feeds))
            except tf.errors.OpError as error:  # not the step's: an OutOfRangeError of it would read as the end of data
                raise ModelError(f"{', '.join(f.name for f in fetches)}: cannot be run: {error.message}") from None
            self._callables[key] = cached
        if not self._hooks:
            return cached[1](*values)
        return self._run_hooked(list(fetches), dict(zip(feeds, values)), lambda: cached[1](*values))

    def _run_hooked(self, fetches: Any, feed: dict[Any, Any], plain: Callable[[], Any]) -> Any:
        context = tf.train.SessionRunContext(tf.train.SessionRunArgs(fetches, feed), self._session)
        requests = [(hook, hook.before_run(context)) for hook in self._hooks]
        asked = {f"hook{i}": args.fetches for i, (_, args) in enumerate(requests) if args and args.fetches is not None}
        extra = {key: value for _, args in requests if args and args.feed_dict for key, value in args.feed_dict.items()}
        options = next((args.options for _, args in requests if args and args.options), None)
        if not asked and not extra and options is None:
            result, answers, metadata = plain(), {}, None
        else:
            metadata = tf.RunMetadata() if options is not None else None
            answers = self._session.run({"caller": fetches, **asked}, {**feed, **extra}, options, metadata)
            result = answers["caller"]
        for i, (hook, _) in enumerate(requests):
            hook.after_run(context, tf.train.SessionRunValues(answers.get(f"hook{i}"), options, metadata))
        self._stop = self._stop or context.stop_requested
        return result

    def should_stop(self) -> bool:
        """Whether a hook asked for the end of training."""
        return self._stop

    def end(self, hooks: Sequence[tf.train.SessionRunHook]) -> None:
        """Tells every hook that the run ended well; the session stays usable."""
        self._hooks = ()
        with self._session.graph.as_default():
            for hook in hooks:
                hook.end(self._session)

    def close(self) -> None:
        """Stops the queue runners and closes the session, or has it closed where that takes long."""
        self._coordinator.request_stop()
        self._closing()
        self._callables.clear()
