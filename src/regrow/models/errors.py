"""Errors about models."""


class UnsupportedModelError(TypeError):
    """A model or pipeline that regrow has no table for."""
