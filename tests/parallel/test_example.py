"""The training example under torchrun: two processes train as one, and a resumed run as one that never stopped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "long_documents_on_many_ranks.py"


def losses(ranks, *arguments):
    """What the example prints, by step."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(EXAMPLE),
         *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", found.stdout)}


def test_it_trains_and_resumes(tmp_path):
    whole = losses(1, tmp_path / "whole.pt", 12)
    assert list(whole) == list(range(12)) and whole[11] < 0.9 * whole[0]
    first = losses(2, tmp_path / "parts.pt", 7)
    second = losses(2, tmp_path / "parts.pt", 12)
    assert list(first) == list(range(7)) and list(second) == list(range(7, 12))
    resumed = first | second
    assert max(abs(resumed[step] - whole[step]) for step in whole) < 2e-3
