"""The split MNIST model over a bare gRPC stream: what ``mnist_split.py`` sets beside efl's exactly-once link.

The same networks, batches, losses and accuracies in plain TensorFlow, and of gRPC one bidirectional stream of the
tensors' bytes: no sequence numbers, acknowledgements, replay, checksums, windows, handshake or sample ids, and nothing
of efl's around the steps. What is left is done as well as we know how: messages go into a queue that feeds an
asynchronous dequeue, the step is one cached callable, and idle threads do not spin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from _bare_channel import Wire
from _mnist_programs import BATCH, RATE, bottom, head, memory_batches, record_batches, serve, timed

WIDTH = 128


def run_stream(role: str, data: Path, size: str, port: int) -> None:
    """One party over the bare stream."""
    import tensorflow.compat.v1 as tf

    import efl  # noqa: F401 - graph mode and legacy Keras, nothing of its model is used
    from efl._session import compile_call, default_config

    wire: list[Wire] = []

    def send(tensor: Any) -> tf.Operation:
        def push(array: np.ndarray) -> None:
            wire[0].send(array.tobytes())

        return tf.numpy_function(push, [tensor], [])

    inbox = tf.queue.FIFOQueue(-1, [tf.float32])
    arrived = tf.placeholder(tf.float32, [BATCH, WIDTH])
    enqueue = inbox.enqueue([arrived])
    received = tf.reshape(inbox.dequeue(), [BATCH, WIDTH])

    batch = memory_batches(data, role) if size == "memory" else record_batches(data, role)
    own = bottom(batch["feature"], size, 1 if role == "leader" else 3)
    variables = tf.trainable_variables
    if role == "leader":
        loss, accuracy = head(tf.concat([own, received], axis=-1), batch["label"], 2)
        *gradients, back = tf.gradients(loss, [*variables(), received])
        sent = send(back)
    else:
        sent = send(own)
        loss, accuracy = head(own, batch["label"], 4)
        gradients = tf.gradients([loss, own], variables(), [tf.ones_like(loss), received])
    with tf.control_dependencies([sent, *gradients]):  # an update must not race with the gradient that it feeds
        pairs = list(zip(gradients, variables(), strict=True))
        train = tf.train.GradientDescentOptimizer(RATE).apply_gradients(pairs, tf.train.get_or_create_global_step())
    session = tf.Session(config=default_config())
    session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
    put = compile_call(session, [enqueue], [arrived], here=True)
    step = compile_call(session, [train, loss, accuracy[1]])

    def receive(message: bytes) -> None:
        put(np.frombuffer(message, np.float32).reshape(BATCH, WIDTH))

    wire.append(Wire(role, f"localhost:{port}", receive))

    def run(steps: int) -> dict[str, float]:
        return {"seconds": timed(lambda: [step() for _ in range(steps)])}

    serve(run)
    wire[0].end()
