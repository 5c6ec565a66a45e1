"""Runs cases in several processes of one gloo group, once for all workers of a parallel test run."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import time
import traceback

import pytest
import torch
from torch import multiprocessing


class Ranks:
    """What a case gets: this process among the others, and what the parent prepared."""

    def __init__(self, rank, world, folder):
        self.rank, self.world, self.folder = rank, world, folder
        self._prepared = None

    @property
    def group(self):
        """The group of all processes."""
        return torch.distributed.group.WORLD

    @property
    def prepared(self):
        """What the parent saved before the processes began."""
        if self._prepared is None:
            self._prepared = torch.load(self.folder / "prepared.pt", weights_only=False)
        return self._prepared


def work(rank, world, folder, module):
    """One process: runs every case with the others and writes down how each went."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    ranks, outcome = Ranks(rank, world, folder), {}
    broken = ""
    for name, function in importlib.import_module(module).cases(world).items():
        started = time.perf_counter()
        try:
            if broken:
                raise RuntimeError(f"not run: the ranks parted in {broken}")
            function(ranks)
            problem = ""
        except (Exception, pytest.fail.Exception):
            problem = traceback.format_exc()
        # a rank that failed alone would meet the others in another case
        failed = torch.tensor([float(bool(problem))])
        if not broken:
            try:
                torch.distributed.all_reduce(failed)
                if 0 < failed < world:
                    broken = name
            except RuntimeError:
                broken = name
        outcome[name] = [problem, time.perf_counter() - started]
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    if not broken:
        torch.distributed.destroy_process_group()


def outcomes(world, module, prepare, tmp_path_factory):
    """How every case went in every process, by name.

    Args:
        world: Processes.
        module: Name of the module whose ``cases(world)`` they run.
        prepare: ``prepare(world)``, saved for the processes to load.
        tmp_path_factory: Of pytest.

    Returns:
        For each rank a dict from the case's name to ``[traceback or "", seconds]``.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = shared / f"{module}-{world}"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        while not done.exists():
            time.sleep(0.2)
    else:
        try:
            if prepare is not None:
                torch.save(prepare(world), folder / "prepared.pt")
            # one process imports what takes seconds, the others are its forks
            multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "torch._dynamo", "manyheads.parallel"])
            multiprocessing.start_processes(work, (world, folder, module), nprocs=world, start_method="forkserver")
        finally:
            done.touch()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def judge(name, found):
    """Fails with the traceback of every rank on which a case failed."""
    said = [f"rank {rank}: {outcome[name][0]}" for rank, outcome in enumerate(found) if outcome[name][0]]
    # a rank that only waited in vain says less than the one that left
    assert not said, "\n".join(sorted(said, key=lambda text: "RankError" in text))
