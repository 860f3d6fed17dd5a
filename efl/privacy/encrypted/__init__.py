"""Layers in which the parties' embeddings meet without the leader seeing the follower's."""

from __future__ import annotations

from efl.privacy.encrypted.active import EncryptActiveDense, EncryptActiveLayer
from efl.privacy.encrypted.passive import EncryptPassiveDense, EncryptPassiveLayer
from efl.privacy.encrypted.warned import PrivacyWarning

__all__ = ["EncryptActiveDense", "EncryptActiveLayer", "EncryptPassiveDense", "EncryptPassiveLayer", "PrivacyWarning"]
