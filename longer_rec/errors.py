"""The faults of a user, of data and of files, told apart from our own bugs.

Each message names the value, the bound and the remedy. The command line turns every one of them into a single
line and exit code 2; anything else is a bug and keeps its traceback.
"""


class LongerRecError(Exception):
    """Base of all faults that the reader of the message can mend."""


class ConfigError(LongerRecError):
    """A configuration that is unknown, of the wrong type, or asks for what cannot be kept."""


class DataError(LongerRecError):
    """A log, a prepared dataset or a batch that does not hold what its description promises."""


class CheckpointError(LongerRecError):
    """A checkpoint or run directory that is damaged, incomplete or belongs to another run."""


class ServeError(LongerRecError):
    """A request or a bundle that the server cannot accept."""
