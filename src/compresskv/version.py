"""The version of this package: what the build, files and messages name."""

__version__ = "0.2.0.dev0"
