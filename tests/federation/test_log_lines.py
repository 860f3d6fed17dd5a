"""What a party's log line, history and curves say of a step with a peer."""

import re

import numpy as np

import efl  # noqa: F401  (puts TensorFlow into graph mode)

import tensorflow.compat.v1 as tf  # isort: skip
from tests.federation.harness import run_both
from tests.federation.test_ends import both, history


def test_a_step_with_a_peer_says_how_long_it_waited(tmp_path):
    code = both("train(max_step=4)", fit="log_step=2, log_dir='logs'")
    results = run_both(tmp_path, code, code)
    # What a party needs may be there before it asks, in every step of one; hardly in all of both.
    assert any(row["wait_ms"] > 0 for role in results for row in history(tmp_path, role))
    for role, result in results.items():
        rows = history(tmp_path, role)
        assert len(rows) == 2
        for row in rows:
            assert row["wait_ms"] >= 0
            assert re.search(rf"role={role} mode=train step={row['step']} .* wait_ms=\d", result.output), result.output
        (file,) = (tmp_path / "logs" / role / "train").iterdir()
        values = [value for event in tf.train.summary_iterator(str(file)) for value in event.summary.value]
        drawn = [value.simple_value for value in values if value.tag == "wait_ms"]
        np.testing.assert_allclose(drawn, [row["wait_ms"] for row in rows], rtol=1e-5)
