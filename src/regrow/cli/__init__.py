"""The command line."""

from regrow.cli.main import app, main

__all__ = ["app", "main"]
