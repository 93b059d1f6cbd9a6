"""Errors that a user can mend, each with the exit code that the command line leaves with.

A message says where, what was found, what was expected and what to do, in one line. Errors of this
family are raised before the first large allocation and identically on every rank; anything else is a
defect of the package and is shown with its traceback.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_UNFORESEEN = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_NON_FINITE = 5
# EX_TEMPFAIL of sysexits.h: the same command again goes on.
EXIT_PREEMPTED = 75


class DsAlignError(Exception):
    """Base of the errors that name a cause and a remedy."""

    exit_code = EXIT_UNFORESEEN
    # Met by one rank while the others go on: nobody may wait for them then.
    of_one_rank = False


class ConfigError(DsAlignError, ValueError):
    """A setting, a DeepSpeed file or a model directory that cannot be used as given."""

    exit_code = EXIT_CONFIG


class DataError(DsAlignError, ValueError):
    """A data file, row or column that cannot be used as given."""

    exit_code = EXIT_DATA


class CheckpointError(DsAlignError):
    """A checkpoint or an output directory that cannot be read or written."""

    exit_code = EXIT_CHECKPOINT


class OutOfMemory(DsAlignError):  # noqa: N818 - the field's name for it
    """An allocation that failed inside of a step, on this rank."""

    of_one_rank = True


class Preempted(DsAlignError):  # noqa: N818 - no error: the run was asked to leave, and did
    """A signal asked the run to end; it was saved and can go on."""

    exit_code = EXIT_PREEMPTED


class NonFiniteError(DsAlignError):
    """A loss or gradient that is not finite; the weights of the step before are kept."""

    exit_code = EXIT_NON_FINITE
