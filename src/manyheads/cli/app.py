"""The commands and their options; each hands over to the module that does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyheads import __version__
from manyheads.bench.suite import LEVELS, Options
from manyheads.cli import complain

_Click: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_SLOWER = "Fail if something of ours is slower by more than so many percent, beyond noise."
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}

app = typer.Typer(
    name="manyheads",
    help="Attention for PyTorch: measure it, look at masks, see what works here.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def run(arguments: list[str]) -> int:
    """Runs a command and turns every error of the caller's making into one message and status 2.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit status.
    """
    arguments = arguments or ["--help"]
    try:
        status: Any = app(args=arguments, standalone_mode=False, prog_name="manyheads", obj=tuple(arguments))
    except _Click as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        if not text:
            return 2
        return complain(text)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("manyheads"):
            raise
        return complain(str(error))
    except (ValueError, TypeError, ImportError) as error:
        return complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        return 0
    return status if isinstance(status, int) else 0


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Attention for PyTorch: measure it, look at masks, see what works here."""


@app.command()
def bench(
    context: typer.Context,
    suite: Annotated[list[str] | None, typer.Option(help="Only this suite; may be repeated.")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="Only this provider; may be repeated.")] = None,
    mask: Annotated[list[str] | None, typer.Option(help="A mask by name, or any mask as text.")] = None,
    case: Annotated[list[str] | None, typer.Option(help='Only this case, or a pattern, as "causal-*".')] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Tokens; may be repeated.")] = None,
    heads: Annotated[list[str] | None, typer.Option(help="Head layout, as 8 or 8:2; may be repeated.")] = None,
    width: Annotated[int, typer.Option(min=0, help="Head width; 0 for the suite's own.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of drawn input.")] = 1,
    phase: Annotated[list[str] | None, typer.Option(help="forward, backward or forward+backward.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    threads: Annotated[str, typer.Option(help="A number, or all; torch's own choice by default.")] = "",
    cache: Annotated[str, typer.Option(help="warm, or cold to empty the caches before each sample.")] = "warm",
    quick: Annotated[bool, typer.Option("--quick", help="A couple of minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Everything; hours.")] = False,
    input: Annotated[Path | None, typer.Option(help="Captured q, k, v (safetensors) for the masks suite.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results file; reports/bench-<time>.jsonl by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the file named by --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and how long.")] = False,
    no_verdict: Annotated[bool, typer.Option("--no-verdict", help="A missed bar is no failure.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of inputs and of the shapes that are drawn.")] = 42,
    budget: Annotated[float | None, typer.Option(min=0.0, help="Seconds of rounds a provider and case.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no HTML report beside the results.")] = False,
    against: Annotated[Path | None, typer.Option(help="Earlier results to compare with at the end.")] = None,
    fail_on_slower: Annotated[float | None, typer.Option(min=0.0, help=_SLOWER)] = None,
) -> int:
    """Measure: ours, torch and FlexAttention on the same inputs, interleaved."""
    from manyheads.cli import bench as command

    if quick and full:
        raise ValueError("--quick and --full exclude each other")
    options = Options(
        level=LEVELS[0] if quick else LEVELS[2] if full else LEVELS[1],
        providers=tuple(provider or ()),
        masks=tuple(mask or ()),
        dtypes=tuple(_SHORT.get(name, name) for name in dtype or ()),
        lengths=tuple(length or ()),
        input=input,
        seed=seed,
        budget_s=budget,
        device=device,
        cache=cache,
        heads=tuple(heads or ()),
        width=width,
        batch=batch,
        phases=tuple(phase or ()),
    )
    request = command.Request(
        tuple(suite or ()),
        options,
        out,
        resume,
        dry_run,
        not no_verdict,
        context.obj,
        report=not no_report,
        cases=tuple(case or ()),
        threads=threads,
        against=against,
        fail_on_slower=fail_on_slower,
    )
    return command.run(request)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="The earlier results file.")],
    new: Annotated[Path, typer.Argument(help="The later results file.")],
    fail_on_slower: Annotated[float | None, typer.Option(min=0.0, help=_SLOWER)] = None,
    everything: Annotated[bool, typer.Option("--all", help="List every row.")] = False,
) -> int:
    """Say what changed between two results files, and what is only noise."""
    from manyheads.cli import compare as command

    return command.run(old, new, fail_on_slower, everything=everything)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A results file, as `bench` writes them.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; beside the results by default.")] = None,
) -> int:
    """Write a results file as one HTML page with plots and tables, which needs no network."""
    from manyheads.cli import report as command

    return command.run(results, out)


@app.command("list")
def list_systems(
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    state: Annotated[str | None, typer.Option(help="Only systems in this state: works or planned.")] = None,
) -> int:
    """The catalogue: every system, what holds it, and what is missing."""
    from manyheads.cli import catalogue

    return catalogue.run(as_json=json, state=state)


@app.command()
def doctor() -> int:
    """Say what works on this machine: versions, threads, compiler, products, extras."""
    from manyheads.cli import doctor as command

    return command.run()


@app.command()
def kernels(
    kernel: Annotated[str, typer.Option(help="Only this kernel, or engine.")] = "",
    arch: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942.")] = "",
    width: Annotated[int, typer.Option(help="Only this head width.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Compile those of `make test` and compare.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Compile every case and compare.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Compile every case and write the table.")] = False,
    triton: Annotated[Path | None, typer.Option(help="A folder with another Triton (pip install --target).")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that compile; one a core by default.")] = 0,
) -> int:
    """Registers, spills, shared memory and instructions of every kernel, compiled without a GPU."""
    from manyheads.cli import kernels as command

    return command.run(command.Request(kernel, arch, width, check, full, update, triton, workers))


@app.command()
def tune(
    kernel: Annotated[list[str] | None, typer.Option(help="Such as forward or mix; all by default.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="64, 128 or 256.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float32.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Such as plain or backward; all by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the legal configurations.")] = False,
    resources: Annotated[bool, typer.Option("--resources", help="Choose by compiled resources; no GPU.")] = False,
    best: Annotated[int, typer.Option(min=0, help="Only so many of each row, the most promising; 0: all.")] = 0,
    length: Annotated[int, typer.Option(min=256, help="Tokens of the measured problem.")] = 8192,
    out: Annotated[Path | None, typer.Option(help="The table to write; in the user's cache by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that wrote --out.")] = False,
    triton: Annotated[list[Path] | None, typer.Option(help="With --resources: one more Triton to fit.")] = None,
) -> int:
    """Find the fastest configuration of every kernel on this GPU."""
    from manyheads.cli import tune as command

    names = tuple(_SHORT.get(name, name) for name in dtype or ())
    rows = (tuple(kernel or ()), tuple(arch or ()), tuple(width or ()), names, tuple(kind or ()))
    return command.run(command.Request(*rows, dry_run, resources, best, length, out, resume, tuple(triton or ())))


@app.command()
def show(
    mask: Annotated[str, typer.Argument(help='Such as "causal & window(512)".')],
    n: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Queries.")] = 4096,
    keys: Annotated[int | None, typer.Option(min=1, help="Keys; as many as queries by default.")] = None,
    tile: Annotated[str | None, typer.Option(help="Queries x keys in a cell; as many as fit by default.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw into this file instead.")] = None,
) -> int:
    """Draw a mask with its tiles."""
    from manyheads.cli import look

    return look.show(mask, n, n if keys is None else keys, tile, png)


@app.command()
def explain(
    query: Annotated[str, typer.Argument(help="Shape of q: batch x heads x tokens x width, as 1x8x4096x64.")],
    kv: Annotated[str | None, typer.Option(help="Shape of k and v; that of q by default.")] = None,
    mask: Annotated[str, typer.Option(help='Such as "causal & window(512)".')] = "full",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    grad: Annotated[bool, typer.Option("--grad", help="The inputs need gradients.")] = False,
    lse: Annotated[bool, typer.Option("--lse", help="The call returns lse too.")] = False,
    backend: Annotated[str, typer.Option(help="auto, or a backend by name.")] = "auto",
) -> int:
    """Say which backend would take a call, and why the others would not."""
    from manyheads.cli import look

    return look.explain(query, kv, mask, dtype, grad=grad, lse=lse, backend=backend)


@app.command()
def capture(
    model: Annotated[str, typer.Argument(help="A transformers model: folder or name.")],
    text: Annotated[Path, typer.Argument(help="A text file, read as one sequence.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path("captured.safetensors"),
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to read.")] = 8192,
    layer: Annotated[list[int] | None, typer.Option(min=0, help="Only this layer; may be repeated.")] = None,
) -> int:
    """Record q, k, v of a model's attention layers on a text, for `bench --input`."""
    from manyheads.cli import look

    return look.capture(model, text, out, tokens, list(layer or ()))


@app.command()
def lost(
    mechanism: Annotated[str, typer.Argument(help="A mechanism that chooses its keys, by its slug.")],
    input: Annotated[str, typer.Option(help="needles, document, video, or a file of `capture`.")] = "document",
    set: Annotated[list[str] | None, typer.Option(help="An argument of the mechanism, as keep=16.")] = None,
    layer: Annotated[list[int] | None, typer.Option(min=0, help="Only this layer of a file.")] = None,
    length: Annotated[int, typer.Option(min=0, help="Tokens, at most; 0 for all of a file.")] = 4096,
    heads: Annotated[str, typer.Option(help="Heads : key heads x width of drawn input.")] = "8:2x64",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "bfloat16",
    mask: Annotated[str, typer.Option(help="What dense attention sees: causal or full.")] = "causal",
    top: Annotated[int, typer.Option(min=1, help="So many of the heaviest keys must be found.")] = 64,
    rows: Annotated[int, typer.Option(min=0, help="Query rows to judge; 0 for all.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of inputs and rows.")] = 42,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> int:
    """Say what a sparse mechanism loses on an input: error, weight, keys, and the time of choosing."""
    from manyheads.cli import lost as command

    chosen = (mechanism, input, tuple(set or ()), tuple(layer or ()), length, heads, _SHORT.get(dtype, dtype))
    return command.run(command.Request(*chosen, mask, top, rows, seed, json))


@app.command()
def advise(
    config: Annotated[Path, typer.Argument(help="A transformers config.json, or a folder with one.")],
    length: Annotated[int | None, typer.Option(help="Tokens; an image model knows its own.")] = None,
    device: Annotated[str, typer.Option(help="here, cpu, cuda, or a machine by name, as H100.")] = "here",
    phase: Annotated[str, typer.Option(help="prefill, train or decode.")] = "prefill",
    mask: Annotated[str | None, typer.Option(help="Instead of the model's own order: text, or a static mask.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The config's by default.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    results: Annotated[Path | None, typer.Option(help="A results file to know from, and its machine.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Packed documents: pile, prolong64k, prolong512k.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 42,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> int:
    """Say which attention to use for a model: ranked options with time and memory."""
    from manyheads.cli import advise as command

    kind = None if dtype is None else _SHORT.get(dtype, dtype)
    return command.run(
        command.Request(config, length, device, phase, mask, kind, batch, results, lengths, seed, json)
    )


simulate = typer.Typer(help="Plan before anything is run.", rich_markup_mode=None)
app.add_typer(simulate, name="simulate")


@simulate.callback()
def _plans() -> None:
    """Plan before anything is run."""


@simulate.command()
def tiles(
    mask: Annotated[str, typer.Argument(help='Such as "causal & window(512)", or a static mask by name.')],
    length: Annotated[int, typer.Option(help="Queries.")],
    keys: Annotated[int | None, typer.Option(help="Keys; as many as queries by default.")] = None,
    tile: Annotated[list[str] | None, typer.Option(help="Queries x keys of a tile; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch entries.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 1,
    units: Annotated[int | None, typer.Option(help="Cores or multiprocessors that share the rows.")] = None,
    device: Annotated[str | None, typer.Option(help="Take the units of this machine, as H100.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Draw documents from pile, prolong64k or prolong512k.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 42,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> int:
    """Count the tiles of a mask, what they save, and how evenly its rows load a machine."""
    from manyheads.cli import simulate as command

    sizes = tuple(tile or ())
    return command.run(
        command.Request(mask, length, keys, sizes, batch, heads, units, device, lengths, seed, json)
    )


@simulate.command()
def neighborhood(
    shape: Annotated[str, typer.Argument(help="Tokens along each axis, as 30x48x80.")],
    window: Annotated[str, typer.Option(help="Keys of a window along each axis; one number for all.")],
    stride: Annotated[list[str] | None, typer.Option(help="Queries that share a window; may be repeated.")] = None,
    dilation: Annotated[str, typer.Option(help="Distance of neighbours along each axis.")] = "1",
    causal: Annotated[str, typer.Option(help="Axes without later keys, as 1x0x0.")] = "0",
    q_tile: Annotated[str | None, typer.Option(help="Queries of a tile; the usual ones by default.")] = None,
    kv_tile: Annotated[str | None, typer.Option(help="Keys of a tile.")] = None,
    flat: Annotated[str | None, typer.Option(help="Compare with tiles of the flattened grid, as 128x64.")] = None,
    goal: Annotated[float | None, typer.Option(help="Share of the ideal that a stride shall reach.")] = None,
    here: Annotated[bool, typer.Option("--here", help="Predict the time on this machine.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> int:
    """Count the tiles of windows on a grid, and find the stride that suits them."""
    from manyheads.cli import neighborhood as command

    asked = (shape, window, tuple(stride or ()), dilation, causal, q_tile, kv_tile, flat, goal, here, json)
    return command.run(command.Request(*asked))


@simulate.command()
def cluster(
    mask: Annotated[str, typer.Argument(help="A static mask by name, or any mask as text.")] = "causal_document",
    ranks: Annotated[list[int] | None, typer.Option(help="Devices, 64 by default; may be repeated.")] = None,
    per_rank: Annotated[int, typer.Option(help="Tokens on each device.")] = 8192,
    device: Annotated[str, typer.Option(help="A machine by name, as H100.")] = "H100",
    model: Annotated[str, typer.Option(help="heads:key heads x width x layers, or a config.json.")] = "64:8x128x32",
    links: Annotated[str | None, typer.Option(help="GB/s inside:between x devices of a node, as 450:50x8.")] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="Only this scheme; may be repeated.")] = None,
    shard: Annotated[list[str] | None, typer.Option(help="Only this deal of tokens; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    lengths: Annotated[str | None, typer.Option(help="Draw documents from pile, prolong64k or prolong512k.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 42,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> int:
    """Time, idle share, bytes and memory of schemes and deals on many devices."""
    from manyheads.cli import cluster as command

    asked = (mask, tuple(ranks or (64,)), per_rank, device, model, links, tuple(scheme or ()), tuple(shard or ()))
    return command.run(command.Request(*asked, _SHORT.get(dtype, dtype), lengths, seed, json))
