"""The errors that a user can mend; each command turns one into its exit code."""

from __future__ import annotations


class JaxtuneError(Exception):
    """A mistake to mend: the text says where, what was expected, what came and what to do.

    `passes` where time may mend it too: the same command is worth another try.
    """

    def __init__(self, *texts: object, passes: bool = False) -> None:
        super().__init__(*texts)
        self.passes = passes


class ConfigError(JaxtuneError):
    """A config field, a path or a combination of them that is wrong."""


class DataError(JaxtuneError):
    """A data file that is missing, broken, or holds nothing to train on."""


class ModelError(JaxtuneError):
    """A model folder that is missing, incomplete, or of a family this version does not know."""


class Diverged(JaxtuneError):
    """A loss or gradient that became non-finite; the parameters before that step are kept."""
