"""Recoveries: how values that a call does not compute are made."""
