"""The package that the book builds, chapter by chapter. Nothing happens at import."""

__version__ = "0.1.0"
