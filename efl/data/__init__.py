"""Reading data: TFRecord files into tensors, alone or in step with a peer."""

from __future__ import annotations

from efl.data.dataio import DataIO
from efl.data.federal_dataio import FederalDataIO
from efl.data.federal_dataset import FederalDataset

__all__ = ["DataIO", "FederalDataIO", "FederalDataset"]
