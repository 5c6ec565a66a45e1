"""The shapes in signatures are true: calls under jaxtyping's import hook, and the library's own errors beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manyheads.spec import registry

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found():
    """What the calls of shape_calls.py gave, in a process whose imports are rewritten by the hook."""
    pytest.importorskip("beartype")
    code = "from tests.shape_calls import main; main()"
    options = {"env": {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}, "cwd": ROOT, "timeout": 300}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_calls_keep_to_the_shapes_in_signatures_and_the_library_refuses_what_they_forbid(found):
    assert not found["failures"], "\n".join(found["failures"])


def test_every_function_that_names_shapes_is_called(found):
    assert len(found["annotated"]) > 10
    assert not set(found["annotated"]) - set(found["called"])


def test_every_mechanism_names_its_shapes(found):
    functions = {f"{spec.fn.__module__}.{spec.fn.__qualname__}" for spec in registry().values()}
    assert not functions - set(found["annotated"])
