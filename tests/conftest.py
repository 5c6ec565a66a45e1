"""What all tests share: the seed of the day, the device, and a repair of a third-party import."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys

# kernels run in Triton's interpreter unless the tests have a GPU; read when triton is first imported, and inherited
# by the processes of a parallel run
if "PYTEST_XDIST_WORKER" not in os.environ and "cuda" not in " ".join(sys.argv):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from manyheads.testing import SEED_VARIABLE, seed_for, seed_of_the_day

if importlib.util.find_spec("torchvision"):
    # beside a CPU build of torch, torchvision's operators do not load, and importing transformers or timm
    # dies of it; declaring two schemas is enough
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):
            _torchvision.define(_schema)


def pytest_addoption(parser):
    """Adds ``--device``."""
    parser.addoption("--device", default="cpu", help="where to run the suites that run anywhere: cpu or cuda")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Hands the seed of the day to hypothesis, before its plugin reads its own option."""
    if getattr(config.option, "hypothesis_seed", 0) is None:
        config.option.hypothesis_seed = str(seed_of_the_day())
    with contextlib.suppress(ImportError):
        from hypothesis import settings

        settings.register_profile("manyheads", max_examples=25, deadline=None)
        settings.load_profile("manyheads")
    torch.set_num_threads(1)


def pytest_report_header(config):
    """Prints the seed and how to replay it."""
    seed = seed_of_the_day()
    return f"manyheads: device {config.getoption('--device')}, replay with {SEED_VARIABLE}={seed}"


def pytest_collection_modifyitems(config, items):
    """Leaves out GPU tests where there is no GPU."""
    if config.getoption("--device") != "cpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --device cuda"))


@pytest.fixture(scope="session")
def device(request):
    """The device that ``--device`` names."""
    return request.config.getoption("--device")


@pytest.fixture
def seed(request):
    """A seed of the day that belongs to this test alone."""
    return seed_for(request.node.nodeid)


@pytest.fixture
def generator(seed):
    """A random generator on the CPU with the seed of this test."""
    return torch.Generator().manual_seed(seed)
