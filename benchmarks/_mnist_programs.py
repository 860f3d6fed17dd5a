"""The programs that ``mnist_split.py`` measures; each runs in a process of its own and is told what to do by it."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 256
HALF = 14 * 28
RATE = 1e-4  # grey values are up to 255: at 1e-3 some thousand steps on few images end in infinity
EPOCHS = 100_000  # more than any run reads
SIZES = ("small", "memory", "large")
_ANSWERS = 9  # where a program answers: what is printed must not mix with the answers


def serve(run: Callable[[int], dict[str, float]]) -> None:
    """Answers every line ``N`` of standard input with N steps and a line of JSON."""
    with os.fdopen(_ANSWERS, "w", buffering=1) as answers:
        answers.write("ready\n")
        for line in sys.stdin:
            answers.write(json.dumps(run(int(line))) + "\n")


def timed(run_steps: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run_steps()
    return time.perf_counter() - started


def dense(inputs: Any, units: int, seed: int, scale: float = 0.001) -> Any:
    import tensorflow.compat.v1 as tf

    return tf.layers.dense(inputs, units, kernel_initializer=tf.truncated_normal_initializer(stddev=scale, seed=seed))


def bottom(pixels: Any, size: str, seed: int) -> Any:
    """A party's own layers: pixels ``[b, 392]`` to what is sent, ``[b, 128]``."""
    import tensorflow.compat.v1 as tf

    if size == "large":
        pixels = tf.nn.relu(dense(pixels, 2048, seed + 10))
    return dense(pixels, 128, seed)


def head(hidden: Any, label: Any, seed: int, each: bool = False) -> tuple[Any, Any]:
    """Returns loss (of ``each`` row, or the mean) and accuracy, as ``(value, update_op)``."""
    import tensorflow.compat.v1 as tf

    label = tf.reshape(tf.cast(label, tf.int32), [-1])
    y = dense(hidden, 10, seed)
    reduction = tf.losses.Reduction.NONE if each else tf.losses.Reduction.SUM_BY_NONZERO_WEIGHTS
    loss = tf.losses.softmax_cross_entropy(tf.one_hot(label, 10), y, reduction=reduction)
    return loss, tf.metrics.accuracy(label, tf.argmax(y, axis=-1))


def memory_batches(data: Path, role: str, one_shot: bool = True, shuffle: int | None = None) -> dict[str, Any]:
    """A party's columns from memory, constants of the graph, with ``tf.data`` alone."""
    import tensorflow.compat.v1 as tf

    dataset = tf.data.Dataset.from_tensor_slices(dict(np.load(data / f"{role}.npz")))
    if shuffle:
        dataset = dataset.shuffle(shuffle, seed=1)
    dataset = dataset.repeat(EPOCHS).batch(BATCH, drop_remainder=True).prefetch(1)
    make = tf.data.make_one_shot_iterator if one_shot else tf.data.make_initializable_iterator
    return dict(make(dataset).get_next())


def record_batches(data: Path, role: str) -> dict[str, Any]:
    """A party's columns from its records, with ``tf.data`` alone."""
    import tensorflow.compat.v1 as tf

    kinds = {"sample_id": (1, tf.int64), "feature": (HALF, tf.float32), "label": (1, tf.float32)}
    spec = {name: tf.io.FixedLenFeature([count], dtype) for name, (count, dtype) in kinds.items()}
    files = sorted(str(path) for path in (data / f"{role}_train").glob("*.tfrecord"))
    dataset = tf.data.TFRecordDataset(files).repeat(EPOCHS).batch(BATCH, drop_remainder=True)
    dataset = dataset.map(lambda records: tf.io.parse_example(records, spec)).prefetch(1)
    return dict(tf.data.make_one_shot_iterator(dataset).get_next())


def both_parties(left: Any, right: Any, label: Any, size: str) -> tuple[list[Any], list[Any]]:
    """The network of both parties: losses and accuracies of leader and follower."""
    import tensorflow.compat.v1 as tf

    fc1, f_fc1 = bottom(left, size, 1), bottom(right, size, 3)
    heads = [head(tf.concat([fc1, f_fc1], axis=-1), label, 2), head(f_fc1, label, 4)]
    return [loss for loss, _ in heads], [accuracy for _, accuracy in heads]


def run_bare(data: Path, size: str) -> None:
    """Plain TensorFlow."""
    import tensorflow.compat.v1 as tf

    import efl  # noqa: F401 - graph mode and legacy Keras, nothing else of it is used

    batches = memory_batches if size == "memory" else record_batches
    left, right = batches(data, "leader"), batches(data, "follower")
    losses, accuracies = both_parties(left["feature"], right["feature"], left["label"], size)
    step = tf.train.get_or_create_global_step()
    train = tf.train.GradientDescentOptimizer(RATE).minimize(tf.add_n(losses), step)
    fetches = [train, *losses, *(update for _, update in accuracies)]
    config = tf.ConfigProto()
    with tf.train.MonitoredSession(tf.train.ChiefSessionCreator(config=config)) as session:

        def run(steps: int) -> dict[str, float]:
            return {"seconds": timed(lambda: [session.run(fetches) for _ in range(steps)])}

        serve(run)


def serve_model(model: Any, **options: Any) -> None:
    """Trains a compiled efl model by turns. ``options`` are of ``fit``."""
    from efl.stage import LoopStage

    def procedure(model: Any) -> None:
        rounds = iter(range(10**6))

        def run(steps: int) -> dict[str, float]:
            seen = len(model.history)
            stage = LoopStage(model.train_op(), True, steps)
            seconds = timed(lambda: model.run_stage(f"round{next(rounds)}", stage))
            waits = [entry["wait_ms"] for entry in model.history[seen:] if "wait_ms" in entry]  # none without a peer
            return {"seconds": seconds, **({"wait_ms": statistics.fmean(waits)} if waits else {})}

        serve(run)

    model.fit(procedure, log_step=100, project_name="mnist_split", **options)


def watch_model(model: Any, imported: float, **options: Any) -> None:
    """Trains a compiled efl model to the end of time, and answers with the times of what happened on the way."""
    import tensorflow.compat.v1 as tf

    import efl

    answers = os.fdopen(_ANSWERS, "w", buffering=1)

    def end_with_the_benchmark() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_the_benchmark, daemon=True).start()

    def tell(what: str, when: float | None = None) -> None:
        answers.write(json.dumps({"what": what, "time": when or time.time(), "step": model.steps_trained}) + "\n")

    class Watch(tf.train.SessionRunHook):
        told = 0

        def after_run(self, context: Any, values: Any) -> None:
            self.told += 1
            if self.told == 1 or self.told % 100 == 0:
                tell("step")

    model.add_hooks([Watch()])
    tell("imported", imported)
    tell("fit")
    model.fit(efl.procedure_fn.train(max_step=10**9), log_step=100, project_name="mnist_split", **options)


def run_model(data: Path, size: str) -> None:
    """efl.Model."""
    import tensorflow.compat.v1 as tf

    import efl

    def input_fn(model: Any, mode: Any) -> Any:
        features: dict[str, Any] = {}
        columns = {"label": [tf.feature_column.numeric_column("label", 1)]}
        for role in ("leader", "follower"):
            dataio = efl.data.DataIO(
                f"{data}/{role}_train", BATCH, 0, 1, num_epochs=EPOCHS, name=role, drop_remainder=True
            )
            dataio.fixedlen_feature("sample_id", 1, dtype=tf.int64)
            dataio.fixedlen_feature("feature", HALF, dtype=tf.float32)
            dataio.fixedlen_feature("label", 1, dtype=tf.float32)
            batch = dataio.read()
            model.add_hooks([dataio.get_hook()])
            features |= {role: batch["feature"], "label": batch["label"]}
            columns[role] = [tf.feature_column.numeric_column(role, HALF)]
        return efl.Sample(features, columns)

    def loss_fn(model: Any, sample: Any) -> Any:
        losses, accuracies = both_parties(sample["leader"], sample["follower"], sample["label"], size)
        for name, accuracy in zip(("accuracy", "f_accuracy"), accuracies, strict=True):
            model.add_metric(name, accuracy)
        return tf.add_n(losses)

    model = efl.Model()
    model.input_fn(input_fn).loss_fn(loss_fn)
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(RATE)))
    model.compile()
    serve_model(model)


def run_party(role: str, options: argparse.Namespace) -> None:
    """One party of the federated run."""
    import tensorflow.compat.v1 as tf

    import efl

    imported = time.time()
    data, size = options.data, options.size
    if options.bare_channel:
        import _bare_channel

        import efl.communicator

        setattr(efl.communicator, "Channel", _bare_channel.BareChannel)  # noqa: B010 - no name that it exports

    def federal_batches(model: Any) -> Any:
        dataio = efl.data.FederalDataIO(
            f"{data}/{role}_train", BATCH, model.communicator, model.federal_role, 0, 1,
            num_epochs=EPOCHS, data_mode="local", drop_remainder=True,
        )  # fmt: skip
        dataio.fixedlen_feature("sample_id", 1, dtype=tf.int64)
        dataio.fixedlen_feature("feature", HALF, dtype=tf.float32)
        dataio.fixedlen_feature("label", 1, dtype=tf.float32)
        features = dataio.read()
        model.add_hooks([dataio.get_hook()])
        return features

    def input_fn(model: Any, mode: Any) -> Any:
        if size == "memory":
            features = memory_batches(data, role, not options.initializable, options.shuffle)
        else:
            features = federal_batches(model)
        columns = {
            "label": [tf.feature_column.numeric_column("label", 1)],
            "emb": [tf.feature_column.numeric_column("feature", HALF)],
        }
        return efl.FederalSample(features, columns, model.federal_role, model.communicator, sample_id_name="sample_id")

    def loss_fn(model: Any, sample: Any) -> Any:
        hidden = fc1 = bottom(sample["emb"], size, 1 if role == "leader" else 3)
        if role == "leader":
            f_fc1 = model.recv("fc1", dtype=tf.float32, require_grad=True)
            hidden = tf.concat([fc1, tf.reshape(f_fc1, [-1, 128])], axis=-1)
        else:
            model.send("fc1", fc1, require_grad=True)
        loss, accuracy = head(hidden, sample["label"], 2 if role == "leader" else 4, options.private is not None)
        model.add_metric("accuracy", accuracy)
        return loss

    address = f"localhost:{options.port}"
    tls: dict[str, Any] = {}
    if options.certs is not None:
        tls = {name: options.certs / role / f"{name}.pem" for name in ("my_certs", "my_key", "peer_certs")}
    model = efl.FederalModel(federal_role=role, local_addr=address, peer_addr=address, **tls)
    model.input_fn(input_fn).loss_fn(loss_fn)
    if options.private is None:
        model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(RATE)))
        model.compile()
    else:
        private = efl.DPGradientDescentGaussianOptimizer(1.0, 1.3, learning_rate=RATE)
        model.optimizer_fn(efl.optimizer_fn.optimizer_setter(private))
        model.compile(opt_config={"BACKEND_MODE": options.private})
    keep: dict[str, Any] = {}
    if options.checkpoint_dir:
        keep = {"checkpoint_dir": str(options.checkpoint_dir), "save_checkpoint_steps": options.save_steps}
    if options.watch:
        watch_model(model, imported, **keep)
    else:
        serve_model(model, **keep)


def run_stream(role: str, options: argparse.Namespace) -> None:
    """One party over a bare gRPC stream, in plain TensorFlow."""
    import _stream_programs

    _stream_programs.run_stream(role, options.data, options.size, options.port)


PROGRAMS: dict[str, Callable[[argparse.Namespace], None]] = {
    "bare": lambda options: run_bare(options.data, options.size),
    "model": lambda options: run_model(options.data, options.size),
    "leader": lambda options: run_party("leader", options),
    "follower": lambda options: run_party("follower", options),
    "stream_leader": lambda options: run_stream("leader", options),
    "stream_follower": lambda options: run_stream("follower", options),
}


def main() -> None:
    """Runs one program until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=list(PROGRAMS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--bare-channel", action="store_true", help="a bare gRPC stream in the place of efl's link")
    parser.add_argument("--private", choices=("noise", "unnoise"), help="a private optimizer, in that BACKEND_MODE")
    parser.add_argument("--certs", type=Path, help="folder that efl certs has written")
    parser.add_argument("--initializable", action="store_true", help="an iterator whose place a checkpoint holds")
    parser.add_argument("--shuffle", type=int, metavar="ROWS", help="shuffle rows in memory, so many at a time")
    parser.add_argument("--checkpoint-dir", type=Path)
    parser.add_argument("--save-steps", type=int, help="steps between checkpoints")
    parser.add_argument("--watch", action="store_true", help="train at once, and say when what happened")
    options = parser.parse_args()
    os.dup2(1, _ANSWERS)
    os.dup2(2, 1)
    PROGRAMS[options.program](options)


if __name__ == "__main__":
    main()
