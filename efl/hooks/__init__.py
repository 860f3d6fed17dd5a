"""What happens around the steps: log lines, progress, TensorBoard summaries."""

from efl.hooks.reporter import Reporter, StageReport

__all__ = ["Reporter", "StageReport"]
