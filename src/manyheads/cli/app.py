"""The commands and their options; each hands over to the module that does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyheads import __version__
from manyheads.bench.suite import LEVELS, Options
from manyheads.cli import complain

_Click: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

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
    mask: Annotated[list[str] | None, typer.Option(help="A static mask by name, or any mask as text.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Tokens; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A couple of minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Everything; hours.")] = False,
    input: Annotated[Path | None, typer.Option(help="Captured q, k, v (safetensors) for the masks suite.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results file; reports/bench-<time>.jsonl by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the file named by --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and how long.")] = False,
    no_verdict: Annotated[bool, typer.Option("--no-verdict", help="A missed bar is no failure.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of inputs and of the shapes that are drawn.")] = 42,
    budget: Annotated[float | None, typer.Option(min=0.0, help="Seconds of rounds a provider and case.")] = None,
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
    )
    request = command.Request(tuple(suite or ()), options, out, resume, dry_run, not no_verdict, context.obj)
    return command.run(request)


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
