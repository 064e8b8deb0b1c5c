"""Errors that a user's model choice or weights file can cause. The message names what would be valid."""


class ConfigError(ValueError):
    """A setting that cannot work: the same command will fail again."""

    exit_code = 2


class CheckpointError(RuntimeError):
    """A weights file or checkpoint that cannot be read, or does not belong to this model."""

    exit_code = 2


class ExportError(CheckpointError):
    """What was written for another library is not the same model to it."""

    exit_code = 1
