"""The version of this package: what the build, files and messages name."""

__version__ = "0.1.0"
