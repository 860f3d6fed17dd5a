"""Reads TFRecord files into a graph, and knows at every step where it stands.

    dataio = efl.data.DataIO("./train", batch_size=256, worker_idx=0, worker_num=1)
    dataio.fixedlen_feature("feature", 392)
    dataio.fixedlen_feature("label", 1, dtype=tf.float32)
    features = dataio.read()  # {"feature": [batch, 392], "label": [batch, 1]}
    model.add_hooks([dataio.get_hook()])

The dict goes into ``efl.Sample``.
"""

from __future__ import annotations

import re
import secrets
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import tensorflow.compat.v1 as tf

from efl._task_scope import TaskScope, current_task_scope
from efl.data import _pipeline
from efl.data._explain import came_from, explain
from efl.data._features import Features, FeatureTable, Origin
from efl.data._files import Block, find_blocks, share_of
from efl.data._poisson import SECRET_BYTES, PoissonSampler
from efl.data._reader_graph import ReaderGraph
from efl.data._reader_state import ReaderState, fingerprint
from efl.data._whole import count_records
from efl.errors import ConfigError, DataError, ModelError

READERS = "efl_readers"
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


class DataIO:
    """Reader of the TFRecord files below a folder.

    All files in the folder and its sub-folders (or in those named with ``add_file_node``) are read in the order of
    their relative paths, whatever their suffix; hidden files (``.x``, ``_x``) and ``.json``, ``.txt``, ``.md``,
    ``.csv``, ``.crc``, ``.tmp``, ``.log`` files are passed over. Files may be compressed with gzip or zlib, which is
    told by their first bytes.

    A file that is damaged or cut off ends the run with its name, a compressed one at its end at the latest. One cut is
    seen by nobody: a file without compression that ends exactly between two records is a good, shorter file. (In a
    federation its rows are then missing at one party only, which the sample ids show.)

    The records of all epochs are one stream that is cut into batches: a batch may run across files and epochs,
    and only the very last may be short (as ``dataset.repeat(n).batch(b)``).

    The position of the reader is a graph variable that is assigned in the step that consumes a batch. Whoever
    saves and restores the weights saves and restores the reader with them.

    Args:
      data_base_dir: The folder.
      batch_size: Records in a batch.
      worker_idx: Number of this worker, from 0; it reads the files number ``worker_idx``,
        ``worker_idx + worker_num``, ...
      worker_num: How many workers share the files.
      prefetch: Batches that are read and parsed ahead, while steps run; 0 reads only when asked.
      num_epochs: How often to read everything.
      save_interval: Kept for compatibility. It used to be the number of steps between two records of the
        position; now the position is exact at every step.
      drop_remainder: Whether to leave out a last batch that is short.
      name: Name of the reader, unique in its task and mode: letters, digits, ``_ . -``.
      shuffle: Whether to read in a random order: blocks are permuted in every epoch, and the rows of a block
        among themselves (through a window of 65 536 rows in larger blocks, which takes their memory). No batch
        holds rows of two epochs then: the last one of each may be short, or is left out.
      seed: Seed of the random order. By default it follows from ``tf.set_random_seed`` where that was called,
        and otherwise is drawn from the operating system.
      sampling: None reads every record once in an epoch. ``"poisson"`` draws each record with probability
        ``batch_size / number of records`` in every step, by itself: batches of differing size, ``batch_size`` on
        average, in ``num_epochs * number of records / batch_size`` steps (an empty one is drawn again). That is what
        amplifies differential privacy, where who is drawn is hidden: draws follow from a secret, of the run's noise
        seed with a private optimizer; only with ``seed`` from that number, and then they are no secret. Needs files
        that can be mapped into memory; those that are compressed are held in it.

    Raises:
      ConfigError: An argument out of range.
    """

    def __init__(
        self,
        data_base_dir: str,
        batch_size: int,
        worker_idx: int,
        worker_num: int,
        prefetch: int = 1,
        num_epochs: int = 1,
        save_interval: int = 100,
        drop_remainder: bool = False,
        name: str = "dataio",
        shuffle: bool = False,
        seed: int | None = None,
        sampling: str | None = None,
    ) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"reader name={name!r}: expected 1 to 64 letters, digits, '_', '.' or '-'")
        self.name = name
        self._base_dir = str(data_base_dir)
        self._owner = f"{name} ({self._base_dir})"
        limits = {
            "batch_size": (batch_size, 1),
            "worker_num": (worker_num, 1),
            "worker_idx": (worker_idx, 0),
            "prefetch": (prefetch, 0),
            "num_epochs": (num_epochs, 1),
            "save_interval": (save_interval, 1),
        }
        for option, (value, least) in limits.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{self._owner}: {option}={value!r}: expected an integer of at least {least}")
        if worker_idx >= worker_num:
            raise ConfigError(
                f"{self._owner}: worker_idx={worker_idx}, worker_num={worker_num}: workers are numbered from 0 to "
                f"{worker_num - 1}"
            )
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
            raise ConfigError(f"{self._owner}: seed={seed!r}: expected None or an integer from 0 to 2**63 - 1")
        if sampling not in (None, "poisson"):
            raise ConfigError(f"{self._owner}: sampling={sampling!r}: expected None or 'poisson'")
        if sampling and (shuffle or drop_remainder):
            raise ConfigError(
                f"{self._owner}: sampling='poisson' with {'shuffle' if shuffle else 'drop_remainder'}=True: samples "
                "are drawn at random and differ in size; leave it out"
            )
        sampler = PoissonSampler(batch_size, num_epochs) if sampling else None
        self._plan = _pipeline.Plan(batch_size, num_epochs, bool(drop_remainder), bool(shuffle), prefetch, sampler)
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._worker = (worker_idx, worker_num)
        self._nodes: list[str] = []
        self._table = FeatureTable(self._owner)
        self._seed = seed
        self._graph: ReaderGraph | None = None
        self._session: weakref.ref[Any] | None = None
        self._blocks: list[Block] = []  # what the iterator reads, in base order
        self.scope = TaskScope()

    # ---- before read() -------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Records in a batch."""
        return self._plan.batch_size

    @property
    def drop_remainder(self) -> bool:
        """Whether a last batch that is short is left out."""
        return self._plan.drop_remainder

    @property
    def samples(self) -> bool:
        """Whether batches are Poisson samples."""
        return self._plan.sampler is not None

    @property
    def hides_batches(self) -> bool:
        """Whether batches are Poisson samples that only this party's secret tells."""
        return self.samples and self._seed is None

    def num_examples(self) -> int:
        """Records in what an epoch reads; counted by reading all of it once.

        Raises:
          DataError: A file is damaged, cut off or gone.
          ModelError: ``read`` was not called.
        """
        self._read_graph()
        return sum(count_records(block.path, block.compression) for block in self._blocks)

    def use_secret(self, secret: bytes) -> None:
        """Makes Poisson samples follow from a secret of 32 bytes, so that a restarted run draws the same again."""
        self._secret = secret

    def add_file_node(self, node: str) -> None:
        """Reads a sub-folder of the base folder; without any, all of it is read.

        Raises:
          ConfigError: Not a relative path that stays inside the base folder, or added before.
          ModelError: ``read`` was called.
        """
        self._check_open()
        parts = str(node).replace("\\", "/").split("/")
        if not node or node[0] in "/\\" or ".." in parts:
            raise ConfigError(f"{self._owner}: file node {node!r}: expected a sub-folder of the base folder")
        node = "/".join(part for part in parts if part not in ("", "."))
        if node in self._nodes:
            raise ConfigError(f"{self._owner}: file node {node!r} is added twice")
        self._nodes.append(node)

    def add_file_nodes(self, nodes: Iterable[str]) -> None:
        """Reads several sub-folders; see ``add_file_node``."""
        if isinstance(nodes, str):
            raise ConfigError(f"{self._owner}: add_file_nodes({nodes!r}): expected a list; use add_file_node for one")
        for node in nodes:
            self.add_file_node(node)

    def fixedlen_feature(self, name: str, dim: int, dtype: tf.DType = tf.float32) -> None:
        """Declares a feature of ``dim`` values in every record, read as a ``[batch, dim]`` tensor.

        Args:
          name: Its name in the records.
          dim: Values per record.
          dtype: What it becomes. Records store int64, float32 and strings; other integer, bool and floating
            dtypes are cast from these.

        Raises:
          ConfigError: A repeated name, a bad ``dim`` or ``dtype``.
          ModelError: ``read`` was called.
        """
        self._check_open()
        if dim is None:
            raise ConfigError(f"{self._owner}: feature {name!r} has dim=None: use varlen_feature")
        self._table.add(name, dim, dtype)

    def varlen_feature(self, name: str, dtype: tf.DType = tf.int64) -> None:
        """Declares a feature of any number of values in a record, read as a SparseTensor.

        Args:
          name: Its name in the records; a record without it has no values.
          dtype: As in ``fixedlen_feature``.

        Raises:
          ConfigError: A repeated name or a bad ``dtype``.
          ModelError: ``read`` was called.
        """
        self._check_open()
        self._table.add(name, None, dtype)

    # ---- reading -------------------------------------------------------------------------------------------------

    def read(self) -> Features:
        """Makes the tensors of the next batch, in the current task scope.

        Every step that uses any of them consumes a batch, and moves the position with it.

        Returns:
          A dict from feature name to tensor (with ``origin``, where the rows come from).

        Raises:
          DataError: The folder is missing or holds no file for this worker.
          ConfigError: No feature was declared, or the scope has another reader of this name.
          ModelError: Called a second time.
        """
        self._check_open()
        self._check_features()
        self.scope = current_task_scope()
        self._blocks = self._find()
        prefix = f"efl_reader/{self.scope.wire.replace(':', '-')}/{self.name}"
        for other in tf.get_collection(READERS):
            if (other.scope, other.name) == (self.scope, self.name):
                raise ConfigError(
                    f"{self._owner}: {self.scope.wire!r} has another reader named {self.name!r} "
                    f"({other._base_dir}); give each its own name=..."
                )
        self._owner = f"{self.scope.wire}/{self.name} ({self._base_dir})"
        self._graph = ReaderGraph(prefix, self._plan, self._table)
        tf.add_to_collection(READERS, self)
        tensors, block, row = self._graph.next
        return Features(tensors, Origin(block, row, tuple(b.name for b in self._blocks)))

    def init_dataset(self) -> tf.data.Dataset:
        """Makes a dataset of the same batches, for iterators of your own.

        It begins at the first record and has no part in checkpoints; ``read`` has.

        Returns:
          A dataset of dicts from feature name to tensor.

        Raises:
          DataError: The folder is missing or holds no file for this worker.
          ConfigError: No feature was declared.
        """
        self._check_features()
        blocks = self._find()
        state = ReaderState(seed=self._draw_seed())
        plan = self._plan
        if plan.sampler is not None:  # the dataset may be read beside the reader
            plan = replace(plan, sampler=PoissonSampler(plan.batch_size, plan.num_epochs))
            self._start_sampling(plan.sampler, blocks, state)
        source = _pipeline.Source(
            tf.constant([b.path for b in blocks]), tf.constant([b.compression for b in blocks]),
            tf.constant(state.vector()),
        )  # fmt: skip
        dataset = _pipeline.build(source, plan, self._table)
        return dataset.map(lambda features, *_: features)

    # ---- in a session --------------------------------------------------------------------------------------------

    def initialize_iter(self, sess: tf.Session) -> None:
        """Starts reading where the position variable says: at the start, or where a checkpoint left off.

        The second call for one session does nothing. Call it after the variables are initialised and restored;
        the hook does.

        Raises:
          DataError: The files are not those that the restored position counts in.
          ModelError: ``read`` was not called.
        """
        if not self._read_graph().started(sess):
            self._begin(sess, again=False)

    def forget(self, sess: tf.Session) -> None:
        """Forgets a restored position: the next ``initialize_iter`` or ``resume`` begins at the start."""
        self._read_graph().forget(sess)

    def resume(self, sess: tf.Session) -> None:
        """Goes on where the position variable says, also in a session that read before: weights were restored."""
        self._read_graph().prepare(sess)
        self._begin(sess, again=False)

    def restart(self, sess: tf.Session) -> None:
        """Begins again at the first record, in the same random order (an evaluation reader at its end)."""
        self._read_graph().prepare(sess)
        self._begin(sess, again=True)

    def reader_state(self, sess: tf.Session) -> str:
        """Returns the position as a string (JSON), for ``restore_from_reader_state_op``."""
        return self._read_graph().state(sess).to_json()

    def restore_from_reader_state_op(self, reader_state: str | bytes) -> tf.Operation:
        """Makes an op that sets the position. Reading goes on there after the next ``initialize_iter``.

        Args:
          reader_state: What ``reader_state`` returned.

        Raises:
          DataError: ``reader_state`` is not such a string.
          ModelError: ``read`` was not called.
        """
        return self._read_graph().restore_op(ReaderState.from_json(reader_state))

    def get_hook(self) -> tf.train.SessionRunHook:
        """Returns a hook that calls ``initialize_iter`` when a session was created."""
        return _ReaderHook(self)

    def explain(self, error: Exception) -> DataError | None:
        """Says in clear words why reading failed.

        Args:
          error: What ``session.run`` raised: an ``OpError``, or the ``UnicodeDecodeError`` that TensorFlow raises where
            its message quotes a record that is no text.

        Returns:
          The error to raise instead, with file and record; ``None`` if this reader did not cause ``error`` or only
          came to its end.
        """
        if self._graph is None or isinstance(error, tf.errors.OutOfRangeError):
            return None
        if not came_from(error, self._graph.next_name):
            return None
        return explain(error, self._owner, self._table, self._blocks, self._last_block())

    # ---- private -------------------------------------------------------------------------------------------------

    def _find(self) -> list[Block]:
        blocks = share_of(find_blocks(self._base_dir, self._nodes), *self._worker, self._base_dir)
        self._check_slots(len(blocks))
        return blocks

    def _begin(self, sess: tf.Session, again: bool) -> None:
        self._start(sess, self._next_state(sess, again))

    def _next_state(self, sess: tf.Session, again: bool) -> ReaderState:
        """Returns where to begin: at the start, or at the position in the session's variable."""
        state, blocks = self._read_graph().state(sess), fingerprint([block.name for block in self._blocks])
        if not state.blocks:
            return ReaderState(seed=self._draw_seed(), blocks=blocks)
        if again:
            return ReaderState(seed=self._draw_seed(state.seed) if self.samples else state.seed, blocks=blocks)
        if state.blocks != blocks:
            raise DataError(
                f"{self._owner}: the restored position (epoch {state.epoch}, file {state.position}, row {state.row}) "
                f"counts in other files than the {len(self._blocks)} found now. Put the files back as they were, or "
                f"do not restore the variable {self._read_graph().variable_name!r}, to begin at the start"
            )
        return state

    def _start(self, sess: tf.Session, state: ReaderState) -> None:
        self._start_sampling(self._plan.sampler, self._blocks, state)
        self._read_graph().start(sess, self._blocks, state)
        self._session = weakref.ref(sess)

    def _start_sampling(self, sampler: PoissonSampler | None, blocks: list[Block], state: ReaderState) -> None:
        if sampler is not None:
            sampler.load(blocks, self._owner)
            sampler.start(self._sampling_secret(), state.seed)

    def _sampling_secret(self) -> bytes:
        return bytes(SECRET_BYTES) if self._seed is not None else self._secret

    def _draw_seed(self, before: int | None = None) -> int:
        """A number for the random order; for samples one that differs from that of the pass before."""
        if self.samples:
            if self._seed is None:
                return secrets.randbits(62)
            return self._seed if before is None else (before + 1) % 2**63
        if not self._plan.shuffle:
            return 0
        if self._seed is not None:
            return self._seed
        run_seed = tf.get_default_graph().seed if self._graph is None else self._graph.run_seed
        if run_seed is None:
            return secrets.randbits(62)
        return fingerprint([str(run_seed), self.scope.wire, self.name])

    def _last_block(self) -> int:
        session = None if self._session is None else self._session()
        if session is None or self._plan.shuffle or self.samples:
            return 0
        try:
            return self._read_graph().state(session).position % len(self._blocks)
        except (tf.errors.OpError, RuntimeError):  # the session is closed
            return 0

    def _read_graph(self) -> ReaderGraph:
        if self._graph is None:
            raise ModelError(f"{self._owner}: call read() first")
        return self._graph

    def _check_open(self) -> None:
        if self._graph is not None:
            raise ModelError(f"{self._owner}: read() was called already; a reader is read once, make another DataIO")

    def _check_features(self) -> None:
        if not len(self._table):
            raise ConfigError(f"{self._owner}: no feature is declared; call fixedlen_feature or varlen_feature first")

    def _check_slots(self, blocks: int) -> None:
        if blocks * self._plan.num_epochs > _pipeline.MAX_SLOTS:
            raise ConfigError(
                f"{self._owner}: {blocks} file(s) times num_epochs={self._plan.num_epochs} is more than "
                f"{_pipeline.MAX_SLOTS}; use fewer epochs or larger files"
            )


class _ReaderHook(tf.train.SessionRunHook):
    """Starts a reader when a session was created."""

    def __init__(self, reader: DataIO) -> None:
        self.reader = reader

    def after_create_session(self, session: tf.Session, coord: Any) -> None:
        self.reader.initialize_iter(session)
