"""The ``regrow`` command."""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

from regrow import __version__, hub
from regrow.lab.cli.bench import bench
from regrow.lab.cli.calibrate import calibrate
from regrow.lab.cli.demo import demo
from regrow.lab.cli.evaluate import evaluate
from regrow.lab.cli.generate import generate
from regrow.lab.cli.harmless import in_one_line, in_plain_words
from regrow.lab.cli.methods import methods
from regrow.lab.cli.options import FIELDS
from regrow.lab.cli.profile import profile
from regrow.lab.cli.search import search
from regrow.lab.cli.trace import trace
from regrow.lab.cli.train import train_app
from regrow.models import UnsupportedModelError
from regrow.schedule import Schedule
from regrow.words import one_line

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command(context_settings=FIELDS)(generate)
app.command()(methods)
app.command(context_settings=FIELDS)(profile)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(trace)
app.command()(search)
app.command()(calibrate)

STOPPED = 130
"""Exit code of a command that was stopped by Ctrl-C."""
_RESUMABLE = frozenset({"calibrate", "eval", "search", "train"})
# typer exports no more of the classes of what it raises for options it can't read.
_UsageError: Any = typer.BadParameter.__bases__[0]
_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
# What a user can mend, or has to wait for.
_REFUSALS = (ValueError, OSError, UnsupportedModelError, ImportError, SafetensorError, MemoryError)


def _say_version(asked: bool) -> None:
    if asked:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("diffusers", "torch"))
        print(f"regrow {__version__} ({versions}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def regrow(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Faster diffusion sampling by computing fewer tokens at fewer steps."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def share(
    file: Annotated[Path, typer.Argument(help="A plan: a schedule, or a method's configuration.")],
    repository: Annotated[str, typer.Argument(help="Of models on the Hugging Face hub: owner/name.")],
    name: Annotated[str | None, typer.Option(help="Its name there; that of the file.")] = None,
) -> None:
    """Put a plan on the Hugging Face hub, with the token of [b]hf auth login[/b].

    Example: [b]regrow share search/front/plan-03.yaml me/plans[/b], and then
    --schedule hub:me/plans/plan-03.yaml, or --method hub:me/plans/plan-03.json
    """
    plan = hub.load(file)
    address = hub.push(plan, repository, name or file.name)
    option = "--schedule" if isinstance(plan, Schedule) else "--method"
    print(f"{address}\n{option} {hub.PREFIX}{repository}/{name or file.name}")


app.add_typer(train_app, name="train")


def main() -> None:
    """Run the command. A mistake of the user becomes one line and exit code 2, Ctrl-C one and 130."""
    with warnings.catch_warnings(), _library_remarks():
        warnings.showwarning = _warn
        for kind in _FOR_DEVELOPERS:
            warnings.simplefilter("ignore", kind)
        try:
            code = app(prog_name="regrow", standalone_mode=False) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = STOPPED
        except _UsageError as error:
            where = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
            _fail(f"{in_plain_words(error, sys.argv)}{where}")
        except BrokenPipeError:
            # Whoever read the output wanted no more of it; nothing must be flushed into it at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except _REFUSALS as error:
            _fail(in_one_line(error))
    if code == STOPPED:
        again = "type the same command to "
        again += "go on where it was" if {*sys.argv[1:2]} & _RESUMABLE else "begin again"
        print(f"regrow: stopped; {again}", file=sys.stderr)
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    print(f"regrow: {message}", file=sys.stderr)
    sys.exit(2)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line."""
    print(f"regrow: warning: {one_line(' '.join(str(message).split()))}", file=sys.stderr)


@contextmanager
def _library_remarks() -> Iterator[None]:
    """Have remarks of diffusers look like regrow's warnings, and no one see those of transformers.

    They are about processors of pictures and the like, which a user of a pipeline does not choose.
    """
    transformers = logging.getLogger("transformers")
    level = transformers.level
    transformers.setLevel(logging.ERROR)
    handlers = logging.getLogger("diffusers").handlers
    before = [handler.formatter for handler in handlers]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("regrow: warning: %(message)s"))
    try:
        yield
    finally:
        transformers.setLevel(level)
        for handler, formatter in zip(handlers, before, strict=False):
            handler.setFormatter(formatter)
