"""Stages: the parts of a run between which a restarted run can find its place."""

from efl.stage.loop_stage import LoopStage
from efl.stage.manager import StageManager
from efl.stage.model_bank import ModelBank
from efl.stage.stage import Stage

__all__ = ["LoopStage", "ModelBank", "Stage", "StageManager"]
