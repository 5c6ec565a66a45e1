"""A rank that dies or hangs: the others end with a clear error in time, and no result that came out is wrong."""

from __future__ import annotations

import datetime
import json
import os
import random
import signal
import time

import pytest
import torch
from torch import multiprocessing

import manyheads as mh
import manyheads.parallel as parallel
from manyheads.parallel.collectives import Link
from manyheads.testing import seed_for

N, PATIENCE = 53, 5.0


def endless(rank, world, folder, scheme, victim, step, how):
    """One process: attends again and again; the victim leaves at its ``step``-th exchange."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 4, N, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = mh.attention(*leaves, mask="causal")
    want = [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]
    cp = parallel.context(torch.distributed.group.WORLD, scheme=scheme, tokens=N, timeout=PATIENCE)
    parts = [cp.shard(t, 2).requires_grad_() for t in tensors]
    if rank == victim:
        leave_at(step, how, folder / "left")
    said, right = "ended without an error", 0
    try:
        for _ in range(1000):
            with cp:
                out = mh.attention(*parts, mask="causal")
            for g, w in zip([out.detach(), *torch.autograd.grad(out.sin().sum(), parts)], want, strict=True):
                torch.testing.assert_close(g, cp.shard(w, 2))
            right += 1
    except parallel.RankError as error:
        said = f"RankError: {error}"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps([said, right, time.time()]))
    # as a program would that was ended by the error; what it leaves behind makes the others' exchanges fail too
    os._exit(1)


def leave_at(step, how, note):
    """Lets this process die or stop at an exchange."""
    left = [step]

    def counting(method):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                note.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
            return method(*args, **kwargs)

        return wrapped

    for name in ("move", "exchange", "everyone", "summed"):
        setattr(Link, name, counting(getattr(Link, name)))


def judged(folder, world, scheme, victim, step, how):
    """Runs one accident and checks what the survivors say."""
    multiprocessing.set_forkserver_preload(["manyheads.parallel"])
    start = multiprocessing.get_context("forkserver").Process
    ranks = [start(target=endless, args=(r, world, folder, scheme, victim, step, how)) for r in range(world)]
    for process in ranks:
        process.start()
    try:
        deadline = time.monotonic() + 120
        for r, process in enumerate(ranks):
            if r != victim:
                process.join(max(0.1, deadline - time.monotonic()))
                assert process.exitcode is not None, f"rank {r} hangs after rank {victim} {how} at {scheme} {step}"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    left = float((folder / "left").read_text())
    for r in range(world):
        if r != victim:
            said, _, at = json.loads((folder / f"{r}.json").read_text())
            assert said.startswith("RankError: parallel: rank") and "another rank has died, is stuck" in said, said
            # every survivor may have to wait for one that waits itself
            assert at - left < world * PATIENCE + 20, (scheme, r, at - left)


def test_the_others_say_so_when_a_rank_dies(tmp_path):
    judged(tmp_path, 2, "ring", 1, 7, "dies")


@pytest.mark.slow
@pytest.mark.parametrize("accident", range(20))
def test_no_rank_hangs_or_errs_when_one_is_killed_at_a_random_step(tmp_path, accident):
    chance = random.Random(seed_for(f"accident {accident}"))
    scheme = parallel.SCHEMES[accident % len(parallel.SCHEMES)]
    world = chance.choice((2, 3, 4)) if scheme not in ("ulysses", "hybrid") else chance.choice((2, 4))
    judged(tmp_path, world, scheme, chance.randrange(world), chance.randrange(60), "dies")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", parallel.SCHEMES)
def test_no_rank_waits_longer_than_its_patience_for_one_that_is_stuck(tmp_path, scheme):
    judged(tmp_path, 2, scheme, 0, 9, "stops")
