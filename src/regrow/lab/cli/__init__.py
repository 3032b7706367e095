"""The command line."""

from regrow.lab.cli.main import app, main

__all__ = ["app", "main"]
