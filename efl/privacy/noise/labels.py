"""Labels randomised once each, by a keyed function of the secret seed and the sample id, and counted.

The 64 random bits of a row are AES-256, under a key that follows from the seed and from what is released, of the row's
sample id: the same in every epoch and after every restart, and for whoever does not know the seed as good as
independent draws (a permutation of 128 bits cannot be told from a function by a table of fewer than some 2**60 rows).

Why the id may have one label and one prior only. The answer is a function of (label, allowed answers, word), and the
word does not change. Two answers to different questions with one word are not two independent answers: with three
labels, "not i but the first of the others" under two of them can name the label. So an id that comes again must come
with the same label and the same allowed answers, which a ``Register`` sees to; and the word is keyed by the allowed
answers too, so that releases under different priors, where they are meant, are independent and their ε add up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from efl.errors import ConfigError, DataError
from efl.privacy.noise import response
from efl.privacy.noise.ledger import Ledger
from efl.privacy.noise.phase import Phase
from efl.privacy.noise.register import Register
from efl.privacy.noise.seed import Seed

_log = logging.getLogger("efl")
LABEL = "label"  # what kind of a release it is
_SHOWN = 5


@dataclass(frozen=True)
class Question:
    """What is asked about each row's label; the same for a name, for ever.

    Attributes:
      name: Of the label.
      epsilon: ε of one answer.
      classes: Labels are 0 to ``classes`` - 1.
    """

    name: str
    epsilon: float
    classes: int


class Labels:
    """Randomises labels. May be called from any thread.

    Args:
      seed: The secret.
      ledger: Where it is entered that labels of a name are released.
      folder: Where the register lies; None keeps it in memory.

    Raises:
      CheckpointError: The register is damaged.
    """

    def __init__(self, seed: Seed, ledger: Ledger, folder: Path | None) -> None:
        self._seed, self._ledger = seed, ledger
        self._register = Register(None if folder is None else folder / "labels")
        self._where = "this process" if folder is None else str(folder)
        self._lock = threading.Lock()
        self._keys: dict[tuple[Question, str], _Keys] = {}

    def randomised(
        self,
        question: Question,
        ids: np.ndarray,
        labels: np.ndarray,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        """The labels to tell.

        Args:
          question: What is asked.
          ids: Sample ids ``[B]``: integers, or ``object`` of bytes.
          labels: int64 ``[B]`` of 0 to K - 1.
          prior: float64 ``[B, K]`` or ``[K]``: RRWithPrior; None: randomised response among all labels.

        Returns:
          int64 ``[B]``.

        Raises:
          ConfigError: Labels of this name were released with another ε or number of classes, or by ids of another
            kind.
          DataError: A sample id came before with another label or with a prior that allows other answers.
          CheckpointError: Ledger or register cannot be written; nothing may leave then.
        """
        kind = "string" if ids.dtype == object else "integer"
        with self._lock:
            keys = self._keys.get((question, kind))
            if keys is None:
                self._enter(question, kind, len(labels))
                keys = self._keys[question, kind] = _Keys(self._seed, question, kind)
            blocks = keys.blocks(ids)
            allowed, masks = None, np.zeros_like(blocks)
            if prior is not None:
                allowed = response.best_answers(prior, question.epsilon)
                allowed = np.broadcast_to(allowed, (len(labels), question.classes))
                masks = keys.masks(allowed)
            tags = _encrypted(keys.tag, blocks)
            marked = np.stack([tags, labels.astype(_NUMBER)], 1) ^ masks
            wrong = self._register.contradicts(tags, _encrypted(keys.mark, marked))
        if wrong.any():
            _refuse(question, ids[wrong])
        words = _encrypted(keys.word, blocks ^ masks)
        if allowed is None:
            return response.respond(labels, words, question.epsilon, question.classes)
        return response.respond_among(labels, words, question.epsilon, allowed)

    def close(self) -> None:
        """Closes the register."""
        self._register.close()

    def _enter(self, question: Question, kind: str, rows: int) -> None:
        """Enters it in the ledger, once for each seed: that is how often labels are randomised."""
        terms = {"epsilon": question.epsilon, "num_classes": question.classes, "ids": kind}
        before = [p.terms for p in self._ledger.phases() if _is_of(p.terms, question.name)]
        for held in before:
            if any(held[key] != value for key, value in terms.items()):
                told = ", ".join(f"{key}={held[key]}" for key in terms)
                asked = ", ".join(f"{key}={value}" for key, value in terms.items())
                raise ConfigError(
                    f"LabelDP {question.name!r}: labels of this name were randomised before with {told} "
                    f"({self._where}), now with {asked}. Each label is randomised once; to release labels a second "
                    "time give it another name, and privacy_spent adds up what the names spend. (Another "
                    "checkpoint_dir has another secret seed, so it is a further release that nobody adds up)"
                )
        seed = self._seed.key(b"efl label seed", question.name.encode())[:8].hex()
        if any(held["seed"] == seed for held in before):
            return
        if before:
            _log.warning(
                "LabelDP %r: labels were randomised before, with a secret seed that is gone (%s). Now they are "
                "randomised anew, which is a further release: epsilon is %g for each of %d, %g in all",
                question.name,
                self._where,
                question.epsilon,
                len(before) + 1,
                question.epsilon * (len(before) + 1),
            )
        terms = {"kind": LABEL, "group": f"labels/{question.name}", **terms, "seed": seed}
        digest = self._seed.key(b"efl ledger", json.dumps(terms, sort_keys=True).encode())[:16]
        self._ledger.enter(terms, 0, rows, digest, (bytes(16), 0))


def label_epsilon(phases: Iterable[Phase]) -> float | None:
    """What randomised labels have spent, of all names and seeds together; None where there were none.

    A phase stands for one seed: how many releases the ledger has counted in it makes no difference.
    """
    spent = [float(phase.terms["epsilon"]) for phase in phases if phase.terms.get("kind") == LABEL]
    return sum(spent) if spent else None


def carry(phases: Iterable[Phase], ledger: Ledger) -> None:
    """Enters labels that were released elsewhere in another ledger, unless they stand there."""
    there = [phase.terms for phase in ledger.phases()]
    for number, phase in enumerate(phases):
        if phase.terms.get("kind") == LABEL and phase.terms not in there:
            ledger.enter(phase.terms, 0, phase.rows, secrets.token_bytes(16), (bytes(16), number))


def _is_of(terms: Mapping[str, Any], name: str) -> bool:
    return terms.get("kind") == LABEL and terms["group"] == f"labels/{name}"


def _refuse(question: Question, ids: np.ndarray) -> None:
    # Which ids, stays in this party's log: the text of an error is told to the peer.
    _log.error("LabelDP %r: sample ids that contradict: %s", question.name, ", ".join(map(repr, ids[:_SHOWN])))
    raise DataError(
        f"LabelDP {question.name!r}: a sample id came before with another label, or with a prior that allows other "
        "answers (which ids, stands in the log of the party that has the labels). Each label is randomised once: an "
        "id has one label, in all rows, epochs and runs, and one prior. Is the id that of a row, and not of a user or "
        "of a place in the batch? Are priors computed once and kept with the data? What has to be released a second "
        "time needs another name, and privacy_spent adds it up"
    )


_NUMBER = np.dtype("<u8")


class _Keys:
    """The keyed functions of one question."""

    def __init__(self, seed: Seed, question: Question, kind: str) -> None:
        # Tags do not depend on how the label is asked for, the words do.
        name = json.dumps([question.name, kind]).encode()
        asked = json.dumps([question.name, kind, question.epsilon, question.classes]).encode()
        self.tag, self.mark = seed.key(b"efl label tag", name), seed.key(b"efl label mark", name)
        self.word = seed.key(b"efl label word", asked)
        self._id = hashlib.blake2b(key=seed.key(b"efl label id", name), digest_size=16)
        self._set = hashlib.blake2b(key=seed.key(b"efl label set", name), digest_size=16)

    def blocks(self, ids: np.ndarray) -> np.ndarray:
        """uint64 ``[B, 2]``: 16 bytes for each id, different ones for different ids."""
        if ids.dtype == object:
            return np.frombuffer(b"".join(_digest(self._id, value) for value in ids), _NUMBER).reshape(-1, 2)
        blocks = np.zeros((len(ids), 2), _NUMBER)
        blocks[:, 0] = ids.astype(np.int64).view(np.uint64)
        return blocks

    def masks(self, allowed: np.ndarray) -> np.ndarray:
        """uint64 ``[B, 2]``: what changes an id's block where not all answers are allowed; 0 where they are."""
        packed = np.packbits(allowed, axis=1)
        masks = np.frombuffer(b"".join(_digest(self._set, row.tobytes()) for row in packed), _NUMBER).reshape(-1, 2)
        return np.where(allowed.all(1)[:, np.newaxis], np.zeros((), _NUMBER), masks)


def _digest(begun: Any, value: bytes) -> bytes:
    digest = begun.copy()
    digest.update(value)
    return digest.digest()


def _encrypted(key: bytes, blocks: np.ndarray) -> np.ndarray:
    """uint64 ``[B]``: half of AES-256 of each block of 16 bytes."""
    # Each block by itself, which is what ECB means: here it is a function of an id, and hides no message.
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return np.frombuffer(cipher.update(blocks.tobytes()), _NUMBER).reshape(-1, 2)[:, 0]
