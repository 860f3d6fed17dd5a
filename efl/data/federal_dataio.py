"""Reads the same rows on both sides: a ``DataIO`` whose order the leader decides.

When reading starts, the leader sends a plan (the blocks in order, where to begin, the seed of the random order), and
the follower reads by it. What the follower learns: names of the leader's blocks and the order of reading. What the
leader learns: nothing, except that an error at the follower names blocks that only one of them holds.
"""

from __future__ import annotations

from typing import Any, Protocol

import tensorflow.compat.v1 as tf

from efl._task_scope import task_scope
from efl.data._features import Features
from efl.data._files import Block, find_blocks, shorten
from efl.data._poisson import SECRET_BYTES
from efl.data._reader_state import ReaderState, fingerprint
from efl.data.dataio import DataIO
from efl.errors import ConfigError, DataError, ProtocolError

_MODES = ("data-join", "local")
_PART_BYTES = 1 << 18  # of block names in one message
# What the handshake compares, and shows where parties differ: whether draws are hidden, both have to count alike.
_SAMPLES_BY_SEED = "poisson, by a seed: give both readers one"
_SAMPLES_BY_SECRET = "poisson, by a secret: give neither reader a seed"


class _Communicator(Protocol):
    """What a reader needs of ``efl.Communicator``."""

    federal_role: str

    def declare(self, term: str, value: Any) -> None: ...
    def send_plan(self, name: str, plan: dict[str, Any]) -> None: ...
    def recv_plan(self, name: str) -> dict[str, Any]: ...
    def name_blocks(self, names: Any) -> None: ...


class FederalDataIO(DataIO):
    """Reader of one party's TFRecord files in an order that both parties share.

    Both parties make one with the same ``name``, batch size, epochs, ``drop_remainder``, ``data_mode``, ``shuffle`` and
    number of workers (the handshake compares them). Only the leader's position counts: after a restart the follower
    begins where the leader says.

    Args:
      data_base_dir: The folder of this party's files.
      batch_size: Records in a batch.
      communicator: The channel to the peer (``model.communicator``).
      role: ``"leader"`` or ``"follower"``; must be the communicator's (``model.federal_role``).
      worker_idx: As in ``DataIO``.
      worker_num: As in ``DataIO``.
      prefetch: As in ``DataIO``; may differ between the parties.
      num_epochs: As in ``DataIO``.
      save_interval: As in ``DataIO``: kept for compatibility.
      drop_remainder: As in ``DataIO``.
      data_mode: ``"data-join"``: the folders hold the blocks of a join, named alike on both sides; the follower
        looks up each block that the leader names and may hold more. ``"local"``: both parties hold files of the
        same names, and any difference is an error.
      name: As in ``DataIO``; the same on both sides.
      shuffle: As in ``DataIO``.
      seed: As in ``DataIO``; the leader's counts. With ``sampling="poisson"`` both parties give one, or neither does.
      sampling: As in ``DataIO``. The leader tells the follower the secret of the draws, so that both draw the same
        rows: they are hidden from others, not from the peer.

    Raises:
      ConfigError: An argument out of range, or a role that is not the communicator's.
    """

    def __init__(
        self,
        data_base_dir: str,
        batch_size: int,
        communicator: _Communicator,
        role: str,
        worker_idx: int,
        worker_num: int,
        prefetch: int = 1,
        num_epochs: int = 1,
        save_interval: int = 100,
        drop_remainder: bool = False,
        data_mode: str = "data-join",
        name: str = "dataio",
        shuffle: bool = False,
        seed: int | None = None,
        sampling: str | None = None,
    ) -> None:
        super().__init__(
            data_base_dir, batch_size, worker_idx, worker_num, prefetch, num_epochs, save_interval, drop_remainder,
            name, shuffle, seed, sampling,
        )  # fmt: skip
        if data_mode not in _MODES:
            raise ConfigError(f"{self._owner}: data_mode={data_mode!r}: expected 'data-join' or 'local'")
        actual = getattr(communicator, "federal_role", None)
        if actual is None:
            raise ConfigError(f"{self._owner}: communicator={communicator!r}: expected model.communicator")
        if role not in ("leader", "follower") or role != actual:
            raise ConfigError(f"{self._owner}: role={role!r}, but the communicator is the {actual}'s")
        self._communicator = communicator
        self._role = role
        self._data_mode = data_mode
        self._own: list[Block] = []  # what this party holds; the leader's plan says which of it is read

    def read(self) -> Features:
        """As ``DataIO.read``; also has the handshake compare the settings of both readers."""
        features = super().read()
        self._own = self._blocks
        settings = {
            "batch_size": self._plan.batch_size,
            "num_epochs": self._plan.num_epochs,
            "drop_remainder": self._plan.drop_remainder,
            "data_mode": self._data_mode,
            "shuffle": self._plan.shuffle,
            "sampling": None if not self.samples else _SAMPLES_BY_SECRET if self.hides_batches else _SAMPLES_BY_SEED,
            "worker_num": self._worker[1],
        }
        for setting, value in settings.items():
            self._communicator.declare(f"{self._plan_name}/{setting}", value)
        return features

    def init_dataset(self) -> tf.data.Dataset:
        """Makes a dataset of this party's batches in this party's order; see ``DataIO.init_dataset``.

        Raises:
          ConfigError: With ``shuffle`` but without ``seed``: the parties could not read in the same order.
        """
        if self._plan.shuffle and self._seed is None:
            raise ConfigError(f"{self._owner}: init_dataset with shuffle=True needs seed=..., the same on both sides")
        return super().init_dataset()

    # ---- private -------------------------------------------------------------------------------------------------

    @property
    def _plan_name(self) -> str:
        return f"{self.scope.wire}/{self.name}"

    def _find(self) -> list[Block]:
        if self._role == "follower" and self._data_mode == "data-join":
            # The leader deals the blocks out to the workers: any of them may come here.
            return find_blocks(self._base_dir, self._nodes)
        return super()._find()

    def _begin(self, sess: tf.Session, again: bool) -> None:
        if self._role == "leader":
            state = self._next_state(sess, again)
            self._send_plan(state)
        else:
            names, state, rows = self._recv_plan()
            self._blocks = self._look_up(names)
            self._check_slots(len(names))
            if self._plan.sampler is not None:
                self._check_rows(self._plan.sampler.load(self._blocks, self._owner).sizes.tolist(), rows)
        with task_scope(self.scope.mode, self.scope.task):
            self._communicator.name_blocks([block.name for block in self._blocks])
        self._start(sess, state)

    def _send_plan(self, state: ReaderState) -> None:
        parts = _split([block.name for block in self._blocks])
        start: dict[str, Any] = {
            "seed": state.seed, "epoch": state.epoch, "position": state.position, "row": state.row
        }  # fmt: skip
        sizes: list[int] = []
        if self._plan.sampler is not None:
            start["secret"] = self._sampling_secret().hex()
            sizes = self._plan.sampler.load(self._blocks, self._owner).sizes.tolist()
        done = 0
        for number, names in enumerate(parts):
            more = {"rows": sizes[done : done + len(names)]} if sizes else {}
            self._communicator.send_plan(
                self._plan_name, {**start, "part": number, "parts": len(parts), "blocks": names, **more}
            )
            done += len(names)

    def _recv_plan(self) -> tuple[list[str], ReaderState, list[Any]]:
        names: list[str] = []
        rows: list[Any] = []
        part, parts = 0, 1
        while part < parts:
            plan = self._communicator.recv_plan(self._plan_name)
            blocks, announced = plan.get("blocks"), plan.get("parts")
            if (
                not isinstance(blocks, list)
                or not all(isinstance(name, str) for name in blocks)
                or type(announced) is not int
                or plan.get("part") != part
            ):
                raise ProtocolError(f"{self._owner}: the leader's plan is malformed; do both parties run the same efl?")
            names += blocks
            rows += plan.get("rows") or []
            part, parts = part + 1, announced
        try:
            state = ReaderState(plan["seed"], plan["epoch"], plan["position"], plan["row"], fingerprint(names))
            if self.samples:
                self._take_secret(bytes.fromhex(plan["secret"]))
        except (KeyError, TypeError, ValueError, DataError) as error:
            raise ProtocolError(f"{self._owner}: the leader's plan is malformed ({error})") from error
        if not names or state.position > len(names) or state.epoch > self._plan.num_epochs:
            raise ProtocolError(f"{self._owner}: the leader's plan starts outside its {len(names)} block(s): {state}")
        return names, state, rows

    def _take_secret(self, secret: bytes) -> None:
        """Draws by what the leader says.

        Raises:
          ProtocolError: It is no secret, and this party's account would take the draws for hidden.
          ValueError: It is too short, or too long.
        """
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret of {len(secret)} bytes, expected {SECRET_BYTES}")
        if self.hides_batches and not any(secret):
            raise ProtocolError(
                f"{self._owner}: expected a secret from the leader, by which Poisson samples are drawn, for there is "
                "no seed here; what arrived is what a reader with a seed sends, and everybody knows. Give seed to both "
                "parties' readers, or (where draws are to be hidden) to neither"
            )
        self.use_secret(secret)

    def _check_rows(self, own: list[int], leaders: list[Any]) -> None:
        for block, here, there in zip(self._blocks, own, leaders, strict=False):
            if here != there:
                raise DataError(
                    f"{self._owner}: block {block.name!r} has {here} rows here and {there} at the leader, so samples "
                    "of it would not belong together; run the join again for both parties"
                )

    def _look_up(self, names: list[str]) -> list[Block]:
        """Returns this party's blocks of these names.

        Raises:
          DataError: One is missing here, or (``local``) at the leader.
        """
        own = {block.name: block for block in self._own}
        missing = [name for name in names if name not in own]
        if self._data_mode == "local":
            surplus = sorted(set(own) - set(names))
            if missing or surplus or len(names) != len(own):
                raise DataError(
                    f"{self._owner}: data_mode='local' needs files of the same names on both sides. "
                    f"Only the leader has: {shorten(missing) or 'none'}. "
                    f"Only the follower has: {shorten(surplus) or 'none'}"
                )
        elif missing:
            raise DataError(
                f"{self._owner}: the leader reads block {missing[0]!r}, which the follower does not hold in "
                f"{self._base_dir!r} ({len(missing)} of {len(names)} blocks are missing there). Copy the missing "
                "blocks there, or run the join again for both parties"
            )
        return [own[name] for name in names]


def _split(names: list[str]) -> list[list[str]]:
    """Cuts a list of names into parts that fit into one message each."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in names:
        size += 6 * len(name) + 4  # an escaped character takes up to six bytes of JSON
        if size > _PART_BYTES and parts[-1]:
            parts.append([])
            size = 6 * len(name) + 4
        parts[-1].append(name)
    return parts
