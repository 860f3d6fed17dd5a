"""The interface of a stage."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

from efl.errors import ModelError

if TYPE_CHECKING:
    from efl._session import HookedSession
    from efl.model import Model


class Stage(abc.ABC):
    """A part of a model's run. Subclasses implement ``run``; ``model.run_stage(name, stage)`` calls it.

    A restarted run skips the stages that were finished and goes on in the one it was in.
    """

    _model: Model | None = None

    @property
    def sess(self) -> HookedSession:
        """The session that runs this stage.

        Raises:
          ModelError: The stage is not being run by a model.
        """
        return self.model.session

    @property
    def model(self) -> Model:
        """The model that runs this stage.

        Raises:
          ModelError: The stage is not being run by a model.
        """
        if self._model is None:
            raise ModelError(f"{type(self).__name__} is not bound to a model: run it with model.run_stage(name, stage)")
        return self._model

    def bind(self, model: Model) -> None:
        """Called by ``model.run_stage`` before ``run``."""
        self._model = model

    @abc.abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Does the stage's work."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``run``."""
        return self.run(*args, **kwargs)
