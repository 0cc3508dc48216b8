"""The faults of a user, of data and of files, told apart from our own bugs.

Each message names the value, the bound and the remedy. The command line turns every one of them into a single
line and its exit code; anything else is a bug and keeps its traceback.
"""


class LongerRecError(Exception):
    """Base of all faults that the reader of the message can mend."""

    exit_code = 2


class ConfigError(LongerRecError):
    """A configuration that is unknown, of the wrong type, or asks for what cannot be kept."""


class DataError(LongerRecError):
    """A log, a prepared dataset or a batch that does not hold what its description promises."""


class CheckpointError(LongerRecError):
    """A checkpoint or run directory that is damaged, incomplete or belongs to another run."""


class ServeError(LongerRecError):
    """A request or a bundle that the server cannot accept."""


class Overloaded(ServeError):
    """As many requests as the server takes are waiting, or it is closing; the same request may succeed later."""


class DeadlinePassed(ServeError):
    """A request waited so long that its answer is of no use any more."""


class RankLost(LongerRecError):
    """Another process of the run died, was stopped or cannot be reached; starting again continues the run."""

    exit_code = 1


class Preempted(LongerRecError):
    """The run was told to stop, and has saved; starting again continues it."""

    exit_code = 3
