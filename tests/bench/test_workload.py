"""Problems count their work exactly, and captured input is read or refused clearly."""

from __future__ import annotations

import pickle

import pytest
import torch

from manyheads.bench.workload import Problem, read_captured
from manyheads.mask import Causal, Document, Window


def test_operations_are_counted_as_the_field_counts_them():
    forward = Problem(Causal(), 64, heads=2, width=16, value_width=24)
    both = Problem(Causal(), 64, heads=2, width=16, value_width=24, phase="forward+backward")
    assert forward.flops(100) == 100 * 2 * (16 + 24)
    assert both.flops(100) == 3.5 * forward.flops(100)
    assert Problem(Causal(), 64, width=16).flops(100) == 4 * 100 * 16


def test_bytes_are_those_of_the_tensors():
    problem = Problem(Causal(), 10, 20, batch=2, heads=4, kv_heads=2, width=8, value_width=6, dtype="bfloat16")
    tensors = problem.tensors()
    assert problem.bytes() == sum(t.nbytes for t in tensors) + 2 * 4 * 10 * 6 * 2


def test_inputs_have_the_deviation_that_was_asked_for():
    for deviation in (1.0, 8.0):
        q, k, _ = Problem(Causal(), 512, deviation=deviation).tensors()
        logits = q @ k.mT * 64**-0.5
        assert abs(logits.std() / deviation - 1) < 0.05


def test_the_same_seed_draws_the_same_inputs_in_every_dtype():
    single = Problem(Causal(), 8, dtype="float32").tensors()
    half = Problem(Causal(), 8, dtype="bfloat16").tensors()
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(single, half, strict=True))


def test_a_problem_travels_to_another_process():
    problem = Problem(Causal() & (Window(5) | Document([7, 9])), 16, kv_heads=2)
    assert pickle.loads(pickle.dumps(problem)) == problem


def test_captured_layers_come_in_their_order_with_their_scale(captured):
    found = read_captured(captured)
    assert [layer.name for layer in found] == ["layer1", "layer2", "layer10"]
    assert found[0].source == "tiny"
    problem = found[0].problem(Causal(), 20, "bfloat16", 7)
    assert (problem.shape, problem.scale) == ("1x4:2x20x8:6", 0.25)
    assert [tuple(t.shape) for t in found[0].tensors(20, torch.bfloat16)] == [
        (1, 4, 20, 8),
        (1, 2, 20, 8),
        (1, 2, 20, 6),
    ]


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_an_error_that_names_it(captured, keep):
    whole = captured.read_bytes()
    captured.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"input: .*captured\.safetensors is truncated"):
        read_captured(captured)


def test_other_files_are_errors(tmp_path):
    torch_file = pytest.importorskip("safetensors.torch")
    with pytest.raises(ValueError, match="input: there is no file"):
        read_captured(tmp_path / "none")
    torch_file.save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not written by manyheads capture"):
        read_captured(tmp_path / "model.safetensors")


def test_padding_is_no_part_of_captured_input(tmp_path, write_capture):
    q = torch.arange(2 * 6.0).view(2, 1, 6, 1).expand(2, 3, 6, 4).contiguous()
    real = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]).bool()
    path = write_capture(tmp_path / "c.safetensors", {0: (q, q, q)}, attention_mask=real)
    (layer,) = read_captured(path)
    assert layer.q.shape == (1, 3, 4, 4)
    assert layer.q[0, 0, :, 0].tolist() == [7, 8, 9, 10]


def test_cross_attention_is_no_captured_input(tmp_path, write_capture):
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 9, 4)
    path = write_capture(tmp_path / "c.safetensors", {0: (q, k, k)})
    with pytest.raises(ValueError, match="no layer with as many queries as keys"):
        read_captured(path)
