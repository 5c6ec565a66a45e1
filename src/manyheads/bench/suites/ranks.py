"""What every process of the suite ``parallel`` does: the same calls on its share of the tokens, timed together."""

from __future__ import annotations

import contextlib
import functools
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import manyheads as mh
from manyheads import parallel
from manyheads.bench import oracle
from manyheads.bench.measure import brief
from manyheads.bench.workload import Problem
from manyheads.common.errors import UnsupportedError
from manyheads.mask.build import build
from manyheads.parallel.steps import Call

ROUNDS = (3, 30)
PEERS = ("yunchang", "torch-context-parallel")


@dataclass(frozen=True)
class Job:
    """What all processes run.

    Attributes:
        problem: The call over the whole sequence.
        world: Processes.
        pairs: Schemes with the deal of each.
        peers: Other packages, by name in ``PEERS``; they run forward only.
        seconds: Time for the rounds of one pair.
        delay: Whether to time with links as slow as a step computes, for what the ring hides.
        device: ``"cpu"`` over gloo, or ``"cuda"`` over NCCL, a GPU for each process.
    """

    problem: Problem
    world: int
    pairs: tuple[tuple[str, str], ...]
    peers: tuple[str, ...] = ()
    seconds: float = 0.5
    delay: bool = False
    device: str = "cpu"

    def tensors(self) -> list[Tensor]:
        """The whole sequence, where this process computes."""
        return [t.to(self.device) for t in self.problem.tensors()]


@dataclass
class Found:
    """What one scheme did.

    Attributes:
        reason: Why it did not run.
        failed: Whether it broke, rather than refused.
        ms: Milliseconds of each round, of the slowest process.
        verdict: Fields of a row that judge the result against float64.
        areas: Visible pairs that each rank computed.
        sent: Bytes that each rank sent, forward and backward.
        alone_ms, slow_ms, delay_ms: Times without and with injected delay, and the delay, where it was asked for.
    """

    reason: str | None = None
    failed: bool = False
    ms: tuple[float, ...] = ()
    verdict: dict[str, Any] = field(default_factory=dict)
    areas: tuple[int, ...] = ()
    sent: tuple[tuple[int, int], ...] = ()
    alone_ms: float = 0.0
    slow_ms: float = 0.0
    delay_ms: float = 0.0


def run(job: Job, *, timeout: float = 300.0) -> dict[tuple[str, str], Found]:
    """Runs a job in new processes over gloo and waits for them.

    Args:
        job: What to run.
        timeout: Seconds after which the processes are ended.

    Returns:
        What was found, by scheme and deal; peers have no deal (``""``).

    Raises:
        RuntimeError: A process broke or all of them took too long.
    """
    # one process imports what takes seconds, the ranks of all cases are its forks
    torch.multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    spawn: Any = torch.multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [spawn.Process(target=work, args=(rank, job, folder), daemon=True) for rank in range(job.world)]
        for process in ranks:
            process.start()
        end = time.monotonic() + timeout
        try:
            for process in ranks:
                process.join(max(0.1, end - time.monotonic()))
            broken = [i for i, process in enumerate(ranks) if process.exitcode != 0]
        finally:
            for process in ranks:
                process.kill()
        problem = Path(folder, "problem")
        if broken:
            said = problem.read_text(encoding="utf-8") if problem.exists() else "it took too long or was killed"
            raise RuntimeError(f"rank {broken[0]} of {job.world}: {said}")
        found: dict[tuple[str, str], Found] = pickle.loads(Path(folder, "found").read_bytes())
    return found


def work(rank: int, job: Job, folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if job.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=job.world)
    try:
        known = oracle.truth(job.problem, *job.problem.tensors()) if rank == 0 else None
        found = {pair: _ours(job, pair, known) for pair in job.pairs}
        found |= {(peer, ""): _peer(job, peer, known) for peer in job.peers}
        if rank == 0:
            Path(folder, "found").write_bytes(pickle.dumps(found))
    except BaseException as error:
        Path(folder, "problem").write_text(brief(error), encoding="utf-8")
        raise
    dist.destroy_process_group()


def _ours(job: Job, pair: tuple[str, str], known: oracle.Truth | None) -> Found:
    problem = job.problem
    shared: list[Any] = [known.dout if known is not None else None]
    dist.broadcast_object_list(shared)
    cp = parallel.context(dist.group.WORLD, scheme=pair[0], shard=pair[1], mask=problem.mask, tokens=problem.queries)
    leaves = [cp.shard(t, 2).requires_grad_(problem.backward) for t in job.tensors()]
    dout = None if shared[0] is None else cp.shard(shared[0].to(job.device, problem.torch_dtype), 2)

    def call() -> list[Tensor]:
        with cp, torch.set_grad_enabled(problem.backward):
            out = mh.attention(*leaves, mask=problem.mask, scale=problem.scale)
        grads = torch.autograd.grad(out, leaves, dout) if problem.backward else ()
        return [out.detach(), *grads]

    try:
        with parallel.counted() as sent, _counting() as areas:
            parts = call()
    except UnsupportedError as error:
        return Found(reason=brief(error, kind=False))
    whole = [cp.unshard(part, 2) for part in parts]
    facts: list[Any] = [None] * job.world
    dist.all_gather_object(facts, (areas[0], (sent["forward"], sent["backward"])))
    verdict = _judged(whole, known)
    times: list[Any] = [timed(call, job.seconds)]
    dist.broadcast_object_list(times)  # the clock of one rank, so that all agree on what follows
    found = Found(None, False, times[0], verdict, tuple(a for a, _ in facts), tuple(s for _, s in facts))
    return _with_delay(job, call, found) if job.delay else found


def _with_delay(job: Job, call: Callable[[], object], found: Found) -> Found:
    """Times again, in turns with every message late by what a step computes: compute and messages take equally long."""
    step = statistics.median(found.ms) / job.world
    found.delay_ms = step * (job.world - 1)
    alone, slow = [], []
    for _ in found.ms:
        alone.append(_round(call))
        with parallel.slow_links(latency=step * 1e-3):
            slow.append(_round(call))
    found.alone_ms, found.slow_ms = statistics.median(alone), statistics.median(slow)
    return found


def _peer(job: Job, name: str, known: oracle.Truth | None) -> Found:
    parts = [t.chunk(job.world, 2)[dist.get_rank()] for t in job.tensors()]
    try:
        call = {"yunchang": _yunchang, "torch-context-parallel": _torch}[name](job, parts)
        with torch.no_grad():
            part = call()
            gathered = [torch.empty_like(part) for _ in range(job.world)]
            dist.all_gather(gathered, part.contiguous())
            verdict = _judged([torch.cat(gathered, 2)], known)
            return Found(ms=timed(call, job.seconds), verdict=verdict)
    except ImportError as error:
        return Found(reason=f"{name}: {brief(error, kind=False)}")
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        return Found(reason=f"does not run on a {'GPU' if job.device == 'cuda' else 'CPU'}: {brief(error)}")


def _yunchang(job: Job, parts: list[Tensor]) -> Callable[[], Tensor]:
    """Its Ulysses exchange around torch's attention: its own attention functions need a GPU."""
    from yunchang import UlyssesAttention
    from yunchang.kernels import AttnType

    layer = UlyssesAttention(sequence_process_group=dist.group.WORLD, attn_type=AttnType.TORCH_MATH)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float, **rest: object) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)

    layer.attn_fn = attend
    q, k, v = (t.transpose(1, 2).contiguous() for t in parts)
    causal = job.problem.mask.text == "causal"
    return lambda: layer(q, k, v, causal=causal).transpose(1, 2)


def _torch(job: Job, parts: list[Tensor]) -> Callable[[], Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh(job.device, (dist.get_world_size(),))

    def call() -> Tensor:
        q, k, v = job.tensors()
        with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=job.problem.mask.text == "causal")

    return call


def timed(call: Callable[[], object], seconds: float) -> tuple[float, ...]:
    """Milliseconds of rounds that all processes begin together and that end with the last of them."""
    call()
    first: list[Any] = [_round(call)]
    dist.broadcast_object_list(first)
    least, most = ROUNDS
    return tuple(_round(call) for _ in range(int(min(most, max(least, seconds * 1e3 / max(first[0], 1e-3))))))


def _round(call: Callable[[], object]) -> float:
    _together()
    start = time.perf_counter()
    call()
    _together()
    return (time.perf_counter() - start) * 1e3


def _together() -> None:
    """Waits for this process's GPU, where it has one, and for the other processes."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.barrier()


def _judged(whole: list[Tensor], known: oracle.Truth | None) -> dict[str, Any]:
    if known is None:
        return {}
    sampled = tuple((t[:, :, known.rows] if i < 2 else t).cpu() for i, t in enumerate(whole))
    return oracle.judge(sampled, known).fields()


@contextlib.contextmanager
def _counting() -> Iterator[list[int]]:
    """Counts the visible pairs of the steps that this process computes forward, over batch entries and heads."""
    plain, total = Call.forward, [0]

    @functools.wraps(plain)
    def forward(self: Call, q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, *rest: Any) -> Any:
        if len(q_index) and len(k_index):
            at, nq, nk = (q_index, k_index), len(q_index), len(k_index)
            total[0] += build(self.mask, nq, nk, positions=at, batch=q.shape[0], heads=q.shape[1]).pairs
        return plain(self, q, k, v, q_index, k_index, *rest)

    Call.forward = forward  # type: ignore[method-assign]
    try:
        yield total
    finally:
        Call.forward = plain  # type: ignore[method-assign]
