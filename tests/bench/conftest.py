"""Files like those that ``manyheads capture`` writes."""

from __future__ import annotations

import json

import pytest
import torch


@pytest.fixture
def write_capture():
    """A function that writes layers into a file: ``{index: (q, k, v)}``."""
    torch_file = pytest.importorskip("safetensors.torch")
    from manyheads.integration.capture import FORMAT

    def write(path, layers, **more):
        tensors = {f"layers.{i}.{x}": t.clone() for i, qkv in layers.items() for x, t in zip("qkv", qkv, strict=True)}
        about = [{"index": i, "module": f"m{i}", "scaling": 0.25, "causal": True} for i in layers]
        metadata = {"format": FORMAT, "model": "tiny", "layers": json.dumps(about)}
        torch_file.save_file({**tensors, **more}, path, metadata=metadata)
        return path

    return write


@pytest.fixture
def captured(tmp_path, write_capture):
    """Three layers of a tiny model, heads grouped, values narrower than keys."""
    shapes = ((1, 4, 30, 8), (1, 2, 30, 8), (1, 2, 30, 6))
    layers = {i: tuple(torch.randn(shape) for shape in shapes) for i in (1, 2, 10)}
    return write_capture(tmp_path / "captured.safetensors", layers)
