"""``python -m regrow``."""

from regrow.lab.cli import main

main()
