"""Where a tensor keeps its examples.

Every tensor between the input and the loss has one of these layouts. They speak of positions, not of values: ``Rows``
says that what lies at a place belongs to one example and depends on no other.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TypeAlias

import tensorflow.compat.v1 as tf


@dataclass(frozen=True)
class Shared:
    """No example in it: weights, constants, random numbers, sizes."""


@dataclass(frozen=True)
class Sizes(Shared):
    """Numbers that may say how large something is, and nothing else: they follow from rows.

    Attributes:
      what: They are, for messages.
    """

    what: str


@dataclass(frozen=True)
class Sized(Shared):
    """No example in it, but one place for each: its first axis is as long as a number that nobody may compute with.

    Attributes:
      what: Says that number.
    """

    what: str


@dataclass(frozen=True)
class Rows:
    """Axis ``axis`` holds the examples: its index is ``(before_index * B + example) * within + within_index``.

    Attributes:
      axis: From the left, 0 or more.
      before: How many positions vary more slowly than the example, on the same axis.
      within: How many vary faster; None where only the running program knows.
      elements: Where ``within`` is not known: ``within`` times the sizes of the axes after this one, if that is known.
    """

    axis: int
    before: int = 1
    within: int | None = 1
    elements: int | None = field(default=None, compare=False)

    @property
    def plain(self) -> bool:
        """Whether the axis holds nothing but the examples."""
        return self.before == 1 and self.within == 1


@dataclass(frozen=True, eq=False)
class Partition:
    """How the entries of sparse features belong to examples.

    Attributes:
      owner: int64 ``[entries]``, the example of each entry.
    """

    owner: tf.Tensor


class Role(enum.Enum):
    """What the rows of a ragged tensor are."""

    DATA = "anything that belongs to the entry"
    INDICES = "places in a sparse tensor, of which the first column is the example"
    OWNER = "the example's number itself"


@dataclass(frozen=True)
class Ragged:
    """Row r of axis 0 belongs to example ``part.owner[r]``."""

    part: Partition
    role: Role = Role.DATA


@dataclass(frozen=True)
class Chosen:
    """Numbers of entries of a partition, which a condition on each entry alone has chosen: ``[n]`` or ``[n, 1]``."""

    part: Partition
    numbers: tf.Tensor


@dataclass(frozen=True)
class Places:
    """Which of the distinct ids each entry has (``tf.unique``): a number that depends on what came before it.

    Attributes:
      unique: The op that gave the numbers.
    """

    unique: tf.Operation


@dataclass(frozen=True)
class Pooled:
    """Something for each distinct id of a batch (``tf.unique``): no example's, but only on its way to ``entries``.

    Attributes:
      entries: The layout of the ids that were made distinct.
      unique: The op that did it.
    """

    entries: Ragged | Rows
    unique: tf.Operation = field(compare=True)


@dataclass(frozen=True)
class Mixed:
    """Depends on several examples.

    Attributes:
      op: The op that mixed them.
      why: In words.
    """

    op: tf.Operation
    why: str


Layout: TypeAlias = Shared | Rows | Ragged | Chosen | Pooled | Places | Mixed

SHARED = Shared()
EXAMPLES = Rows(0)
