"""What commands say on the way, on a screen and in a log file."""

from __future__ import annotations

import io

import pytest

from regrow.lab.cli import terminal
from regrow.lab.cli.terminal import Bar, Plain, busy, output, table


def test_a_log_file_gets_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal, "monotonic", lambda: now[0])
    text = io.StringIO()
    console = Plain(file=text, width=80)
    with busy(console, "loading [/red]"), Bar(console, every=30) as bar:
        task = bar.add_task("sito:d", total=8)
        for second in (10, 31, 40, 61, 70, 95):
            now[0] = second
            bar.advance(task)
        now[0] = 200
        bar.update(task, advance=1, description="[/b]")
    assert text.getvalue().splitlines() == [
        "loading [/red]",
        "sito:d: 25% after 0:31",
        "sito:d: 50% after 1:01",
        "sito:d: 75% after 1:35",
        "[/b]: 88% after 3:20",
    ]


def test_a_screen_gets_a_bar() -> None:
    text = io.StringIO()
    console = Plain(file=text, force_terminal=True, width=80)
    with Bar(console) as bar:
        bar.advance(bar.add_task("[/b]:cat:", total=8), 4)
    assert "[/b]:cat:" in text.getvalue()
    assert "4/8" in text.getvalue()
    assert "after" not in text.getvalue()


def test_texts_of_others_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table("caption [/x]", "name", "number")
    shown.add_row("dato:[/x].yaml:cat:", "1")
    output().print(shown)
    printed = capsys.readouterr().out
    assert "dato:[/x].yaml:cat:" in printed
    assert "caption [/x]" in printed
