"""The limits of a machine are rates with a method each, and files of every version are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from manyheads.bench import limits
from manyheads.bench.limits import Limits

RESULTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.jsonl"))


@pytest.fixture(scope="module")
def found():
    return limits.measure(("float32", "bfloat16"), size=128)


def test_every_rate_is_measured_and_says_how(found):
    assert set(found.matrix) == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in (*found.matrix.values(), found.copy, found.exp_rate, found.exp_memory))
    assert set(found.method) == {"float32", "bfloat16", "exp", "exp memory"}
    assert "in cache" in found.method["exp"]
    assert (found.device, found.threads) == ("cpu", torch.get_num_threads())


def test_limits_survive_the_header(found):
    assert Limits.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_limits_are_read(path):
    with open(path, encoding="utf-8") as file:
        header = json.loads(file.readline())
    read = Limits.from_dict(header["limits"])
    assert read.matrix == header["limits"]["matrix"] and read.exp_rate is not None


def test_an_array_beyond_the_cache_is_larger_than_it_and_leaves_room(monkeypatch):
    monkeypatch.setattr(limits, "cache_bytes", lambda device: 2**28)
    monkeypatch.setattr(limits, "memory_gib", lambda: 64.0)
    assert 4 * limits._beyond_cache("cpu") == 2**29
    monkeypatch.setattr(limits, "memory_gib", lambda: 1.0)
    assert 4 * limits._beyond_cache("cpu") == 2**27


@pytest.mark.gpu
def test_a_gpu_is_measured_in_its_own_arithmetic(device):
    found = limits.measure(("bfloat16",), size=4096, device=device)
    assert found.matrix["bfloat16"] > 10_000 and found.copy > 100
    assert found.exp_rate > found.exp_memory
