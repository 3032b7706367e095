"""How commands speak: tables, progress, and texts of others, which are printed as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from regrow.words import one_line

Row = TypeVar("Row")
Column = tuple[str, Callable[[Row], str]]
"""The head of a column, and what it says of a row."""

EVERY = 30.0
"""Seconds between the lines of a progress that nobody watches."""


class Plain(Console):
    """A console that takes no text for markup and hands no control character on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text as it is, line by line."""
        return super().render_str("\n".join(one_line(line) for line in text.split("\n")), **options)


def output() -> Console:
    """What a command is asked for: standard output."""
    return Plain()


def remarks() -> Console:
    """What a command says on its way: standard error."""
    return Plain(stderr=True)


@contextmanager
def busy(console: Console, what: str) -> Iterator[None]:
    """Say what is done for as long as it lasts; in a log file once, where it begins."""
    if console.is_terminal:
        with console.status(Text(one_line(what))):
            yield
    else:
        console.print(what, soft_wrap=True)
        yield


class _Table(Table):
    """A table whose cells are one line each."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(one_line, cells), **options)


def table(caption: str, first: str, *numbers: str) -> Table:
    """A table that fits into 80 columns: long names are folded, numbers are not.

    Args:
        caption: below it.
        first: head of the column of names.
        numbers: heads of the others; line breaks are kept.
    """
    made = _Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption or None)
    made.caption_justify = "left"
    made.add_column(first, overflow="fold")
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def table_of(rows: Iterable[Row], columns: Sequence[Column[Row]], caption: str = "") -> Table:
    """A `table` with a row for each of some things.

    Args:
        rows: the things.
        columns: the first has the names.
        caption: below it.
    """
    made = table(caption, *(head for head, _ in columns))
    for row in rows:
        made.add_row(*(cell(row) for _, cell in columns))
    return made


def amount(value: float | None, form: str, unit: str = "") -> str:
    """A figure in a form and with its unit; a dash for what is not known."""
    if value is None:
        return "-"
    text = f"{value:{form}}"
    # Zero has no sign.
    return (text if text.strip("-0.") else text.removeprefix("-")) + unit


class Bar(Progress):
    """A progress bar; where nobody watches, as in a log file, a plain line now and then.

    Args:
        console: where it shows.
        columns: the parts of the bar; what is done, the bar, numbers and time left by default.
        after: seconds before it shows; what takes less time shows none.
        every: seconds between plain lines.
        options: of rich's `Progress`.
    """

    def __init__(
        self,
        console: Console,
        *columns: ProgressColumn,
        after: float = 0.0,
        every: float = EVERY,
        **options: Any,
    ) -> None:
        watched = console.is_terminal
        # What a command prints must not be sent to the console of a bar where that is another place.
        seen: dict[str, Any] = {
            "console": console,
            "disable": not watched,
            "redirect_stdout": output().is_terminal,
        }
        super().__init__(*columns, **seen, **options)
        self._watched, self._after, self._every = watched, after, every
        self._begin = self._said = monotonic()

    @classmethod
    def get_default_columns(cls) -> tuple[ProgressColumn, ...]:
        """What is done, the bar, numbers and the time left."""
        return named("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()

    def __enter__(self) -> Bar:
        if not self._after:
            self.start()
        return self

    def update(self, task_id: TaskID, **options: Any) -> None:
        """As rich's, and a plain line where it is time for one."""
        super().update(task_id, **options)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich's, and a plain line where it is time for one."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        now = monotonic()
        if self._watched:
            if not self.live.is_started and now - self._begin > self._after:
                self.start()
            return
        if now - self._said < self._every:
            return
        self._said = now
        task = self._tasks[task_id]
        done = f"{task.percentage:.0f}%" if task.total else f"{task.completed:g}"
        minutes, seconds = divmod(int(now - self._begin), 60)
        said = f"{task.description}: {done} after {minutes}:{seconds:02}"
        self.console.print(one_line(said), soft_wrap=True)


@contextmanager
def progress(
    console: Console, what: str = "", total: float | None = None, after: float = 0.0
) -> Iterator[Callable[..., None]]:
    """A `Bar` of one task.

    Args:
        console: where it shows.
        what: is done.
        total: how much of it there is, if that is known yet.
        after: seconds before it shows.

    Yields:
        What changes it, with the arguments of rich's `Progress.update`; ``advance=1`` by default.
    """
    with Bar(console, after=after) as bar:
        task = bar.add_task(what, total=total)
        yield lambda **changes: bar.update(task, **(changes or {"advance": 1}))


class _Named(TextColumn):
    def render(self, task: Task) -> Text:
        return Text(one_line(self.text_format.format(task=task)))


def named(form: str) -> TextColumn:
    """A column of text that is taken as it is."""
    return _Named(form)
