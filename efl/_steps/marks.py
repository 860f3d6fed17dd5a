"""What the parties do together after a step, because one of them alone has a reason.

A time limit, the seconds between two checkpoints and a signal to end are known to one party only. The leader makes a
mark of them, before it begins the step after which both act: the link is ordered and every step is mutual, so the
follower knows of the mark before it could begin the step after it.
"""

from __future__ import annotations

LAST = "last"  # the step is the last of its stage
SAVE = "save"  # both save a checkpoint after it
PART = "part:"  # both save, then the party whose role follows goes; its peer waits for it

#: Why a party ends a stage before its time. No mark: it is told with the end itself.
STOP_ASKED = "a hook asked to stop"


def parting(role: str) -> str:
    """The mark after which a party goes."""
    return PART + role


def who_parts(marks: set[str]) -> set[str]:
    """The roles of the parties that go after a step with these marks."""
    return {mark[len(PART) :] for mark in marks if mark.startswith(PART)}


class Parted(Exception):
    """Ends an attempt at a mark after which a party goes, or both.

    Attributes:
      roles: Who goes.
    """

    def __init__(self, roles: set[str]) -> None:
        super().__init__(roles)
        self.roles = roles


def is_mark(what: object) -> bool:
    """Whether a peer may say so."""
    return what in (LAST, SAVE, PART + "leader", PART + "follower")
