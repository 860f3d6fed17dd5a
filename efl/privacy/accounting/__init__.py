"""What a run's releases tell, to whom: ε and δ. No TensorFlow; dp-accounting is imported when it is needed.

``dp_sgd`` computes from hyperparameters, ``events`` from what was released, and ``adversaries`` says for whom the
figures are guarantees.
"""

from efl.privacy.accounting.adversaries import (
    AdversaryRow,
    AdversaryTable,
    Party,
    Releases,
    adversary_table,
    unknown_party,
)
from efl.privacy.accounting.dp_sgd import compute_dp_sgd_privacy, compute_noise, max_steps
from efl.privacy.accounting.events import (
    Mechanism,
    Privacy,
    PureMechanism,
    compute_epsilon,
    jointly,
    overflow_probability,
)

__all__ = [
    "AdversaryRow",
    "AdversaryTable",
    "Mechanism",
    "Party",
    "Privacy",
    "PureMechanism",
    "Releases",
    "adversary_table",
    "compute_dp_sgd_privacy",
    "compute_epsilon",
    "compute_noise",
    "jointly",
    "max_steps",
    "overflow_probability",
    "unknown_party",
]
