"""The errors that minilm raises on purpose: each says what it got, what it wanted, and the fix."""

__all__ = ["ConfigError", "DataError", "MinilmError"]


class MinilmError(Exception):
    """Base of every error that minilm raises on purpose."""


class ConfigError(MinilmError, ValueError):
    """A setting or an argument is outside what the function can work with."""


class DataError(MinilmError, ValueError):
    """A file or an array is damaged, missing, or not of the expected form."""
