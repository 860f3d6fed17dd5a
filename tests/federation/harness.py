"""Runs the two parties of a test, and the same model in one process."""

import os
import textwrap
from pathlib import Path

import numpy as np

from tests.parties import run_parties

_ROOT = Path(__file__).resolve().parents[2]
_PROLOGUE = """
import efl
import numpy as np
import tensorflow.compat.v1 as tf
from tests.federation.problem import *

ROLE = own_argument("federal_role")
"""
_EPILOGUE = """
import json
save(model, ROLE + ".npz")
json.dump(model.history, open(ROLE + ".json", "w"))
"""


def script(body, end=_EPILOGUE):
    return _PROLOGUE + textwrap.dedent(body) + end


def run_both(tmp_path, leader, follower, args=(), timeout=120, end=_EPILOGUE, expect=(0, 0)):
    """Runs both parties' bodies; returns role -> result. Fails where an exit code is not the expected one."""
    env = {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    results = run_parties(
        {"leader": script(leader, end), "follower": script(follower, end)},
        args=list(args), cwd=tmp_path, timeout=timeout, env=env,
    )  # fmt: skip
    codes = (results["leader"].returncode, results["follower"].returncode)
    if expect is not None:
        told = "\n".join(f"--- {role}: {result.returncode}\n{result.output}" for role, result in results.items())
        assert codes == expect, told
    return results


def assert_same_weights(got, expected, rtol=1e-5):
    """Every weight agrees to float32 rounding, relative to the largest of its variable."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        scale = np.abs(value).max() or 1.0
        np.testing.assert_allclose(got[name] / scale, value / scale, atol=rtol, rtol=0, err_msg=name)
