"""The ``tf.data`` pipeline of a reader: blocks in order, rows in order, whole batches parsed at once.

Every record travels with one int64 *place*, ``slot << 34 | row``: a slot is a block of an epoch
(``epoch * blocks + position``). The last place of a batch says where the next batch starts, so however far the pipeline
reads ahead, the position of a batch arrives with the batch.

Nothing is done record by record in Python or in a traced function: places are made by ``Dataset.range`` and arithmetic
on batches, which costs a tenth of the reading itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow.compat.v1 as tf

from efl.data._features import FeatureTable
from efl.data._poisson import PoissonSampler
from efl.data._whole import with_end

ROW_BITS = 34
MAX_SLOTS = 2 ** (63 - ROW_BITS)
# Rows are permuted uniformly inside a block of up to so many; in a larger one they are shuffled through a window of
# this size, which bounds the memory.
SHUFFLED_ROWS = 1 << 16
_FAR = 2**63 - 1


@dataclass(frozen=True)
class Source:
    """What the pipeline reads; the tensors may be placeholders, fed when the iterator is initialised.

    Attributes:
      paths: ``[blocks]`` strings, in base order.
      compressions: ``[blocks]`` strings: ``""``, ``"GZIP"`` or ``"ZLIB"``.
      state: ``[5]`` int64, see ``ReaderState``.
    """

    paths: tf.Tensor
    compressions: tf.Tensor
    state: tf.Tensor

    @property
    def blocks(self) -> tf.Tensor:
        return tf.size(self.paths, out_type=tf.int64)


@dataclass(frozen=True)
class Plan:
    """How the pipeline reads: the settings of a reader that shape its graph."""

    batch_size: int
    num_epochs: int
    drop_remainder: bool
    shuffle: bool
    prefetch: int
    sampler: PoissonSampler | None = None


def build(source: Source, plan: Plan, table: FeatureTable) -> tf.data.Dataset:
    """Returns the dataset of ``(features, state after the batch, block of each row, row of each row)``."""

    def parsed(serialised: tf.Tensor, progress: list[tf.Tensor], origin: tf.Tensor) -> tuple[Any, ...]:
        state = tf.concat([source.state[:1], tf.stack(progress), source.state[4:]], 0)
        block, row = _unpack(origin)
        return table.parse(serialised, tf.as_string(origin)), state, block % source.blocks, row

    def parse(serialised: tf.Tensor, place: tf.Tensor, origin: tf.Tensor) -> tuple[Any, ...]:
        slot, row = _unpack(place[-1])
        return parsed(serialised, [slot // source.blocks, slot % source.blocks, row + 1], origin)

    def parse_sample(serialised: tf.Tensor, step: tf.Tensor, origin: tf.Tensor) -> tuple[Any, ...]:
        none = tf.zeros([], tf.int64)
        return parsed(serialised, [none, none, step + 1], origin)

    if plan.sampler is not None:
        batches = _sampled(source, plan.sampler).map(parse_sample)
    else:
        made = _shuffled(source, plan) if plan.shuffle else _in_order(source, plan)
        batches = made.map(parse)
    if plan.prefetch:
        batches = batches.prefetch(plan.prefetch)
    options = tf.data.Options()
    options.deterministic = True
    # The pipeline has one producer and a fixed look-ahead: there is nothing to tune, and the tuner costs a thread.
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    return batches.with_options(options)


def _in_order(source: Source, plan: Plan) -> tf.data.Dataset:
    """Batches of (records, places, origins) of all epochs, one after the other; a place is its own origin."""
    blocks = source.blocks
    first = source.state[1] * blocks + source.state[2]

    def read(slot: tf.Tensor) -> tf.data.Dataset:
        skip = tf.where(tf.equal(slot, first), source.state[3], 0)
        records = _records(source, slot % blocks).skip(skip).batch(plan.batch_size)
        chunks = tf.data.Dataset.zip((records, _count(_pack(slot, skip), plan.batch_size)))
        return chunks.map(lambda serialised, place: (serialised, *[_run(place, serialised)] * 2))

    chunks = tf.data.Dataset.range(first, plan.num_epochs * blocks).flat_map(read)
    return chunks.rebatch(plan.batch_size, drop_remainder=plan.drop_remainder)


def _shuffled(source: Source, plan: Plan) -> tf.data.Dataset:
    """As ``_in_order``; order of blocks and rows are functions of (seed, epoch) and (seed, epoch, block).

    No batch holds rows of two epochs: in two orders a row could be last in one and first in the next, twice in a batch.
    """
    blocks, seed = source.blocks, source.state[0]
    first_epoch = source.state[1]

    def read_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        done = tf.where(tf.equal(epoch, first_epoch), source.state[2], 0)

        def read(position: tf.Tensor, block: tf.Tensor) -> tf.data.Dataset:
            resumed = tf.equal(epoch, first_epoch) & tf.equal(position, source.state[2])
            skip = tf.where(resumed, source.state[3], 0)
            rows = tf.data.Dataset.zip((_records(source, block), _count(_pack(block, 0), 1)))
            rows = _shuffle(rows, SHUFFLED_ROWS, seed, epoch, block).skip(skip).batch(plan.batch_size)
            chunks = tf.data.Dataset.zip((rows, _count(_pack(epoch * blocks + position, skip), plan.batch_size)))
            return chunks.map(lambda row, place: (row[0], _run(place, row[0]), row[1]))

        order = _shuffle(tf.data.Dataset.range(blocks), blocks, seed, epoch, tf.constant(-1, tf.int64))
        chunks = order.enumerate().skip(done).flat_map(read)
        return chunks.rebatch(plan.batch_size, drop_remainder=plan.drop_remainder)

    return tf.data.Dataset.range(first_epoch, plan.num_epochs).flat_map(read_epoch)


def _sampled(source: Source, sampler: PoissonSampler) -> tf.data.Dataset:
    """Batches of (records, step, origins); the position's row counts the steps."""

    def draw(step: tf.Tensor) -> tuple[tf.Tensor, ...]:
        records, block, row, more = tf.numpy_function(sampler.draw, [step], [tf.string, tf.int64, tf.int64, tf.bool])
        records, block, row = (tf.ensure_shape(part, [None]) for part in (records, block, row))
        return records, step, _pack(block, row), tf.ensure_shape(more, [])

    steps = tf.data.Dataset.range(source.state[3], _FAR).map(draw).take_while(lambda *drawn: drawn[3])
    return steps.map(lambda records, step, origin, more: (records, step, origin))


def _records(source: Source, block: tf.Tensor) -> tf.data.Dataset:
    path, compression = source.paths[block], source.compressions[block]
    return with_end(tf.data.TFRecordDataset(path, compression), path, compression)


def _shuffle(dataset: tf.data.Dataset, size: Any, *key: tf.Tensor) -> tf.data.Dataset:
    """Shuffles by a seed derived from ``key`` alone."""
    # Inside a function of the pipeline this sets the seed of that function's graph, not the user's: without it
    # tf.set_random_seed would take part, and two parties that call it with different numbers would part ways.
    tf.set_random_seed(0)
    text = tf.strings.join([tf.as_string(part) for part in key], separator="/")
    seed = tf.strings.to_hash_bucket_fast(text, 2**31 - 1)  # FarmHash: the same in every version
    return dataset.shuffle(size, seed=seed, reshuffle_each_iteration=False)


def _count(start: tf.Tensor, step: int) -> tf.data.Dataset:
    return tf.data.Dataset.range(start, _FAR, step)


def _run(place: tf.Tensor, records: tf.Tensor) -> tf.Tensor:
    """Places of a chunk of consecutive records, of which the first has ``place``."""
    return place + tf.range(tf.size(records, out_type=tf.int64))


def _pack(slot: tf.Tensor, row: Any) -> tf.Tensor:
    return slot * 2**ROW_BITS + row


def _unpack(place: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return place // 2**ROW_BITS, place % 2**ROW_BITS
