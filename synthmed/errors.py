"""What can go wrong, one class per exit code; every message says what, where and what to do."""


class SynthmedError(Exception):
    """An error a user can act on: printed as one or two lines, never as a traceback.

    Args:
        message: what went wrong and where (config path or pseudonym, never an identity).
        remedy: what to do about it, a sentence; printed on a second line.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  {self.remedy}" if self.remedy else message


def pip(extra: str) -> str:
    """How to install an extra: from the checkout, since no package index is known to hold synthmed.

    >>> pip("faces")
    "pip install -c constraints.txt -e '.[faces]' in synthmed's folder"
    """
    return f"pip install -c constraints.txt -e '.[{extra}]' in synthmed's folder"


class UsageError(SynthmedError):
    """The command line or the config is wrong (exit 2)."""

    exit_code = 2


class InputError(SynthmedError):
    """Nothing usable came in (exit 3)."""

    exit_code = 3


class ResourceError(SynthmedError):
    """Memory, disk or device ran out (exit 5)."""

    exit_code = 5


class BudgetExhausted(SynthmedError):
    """A patient has no privacy left to spend (exit 6)."""

    exit_code = 6


class Interrupted(SynthmedError):
    """Stopped by Ctrl-C or SIGTERM after a checkpoint (exit 130)."""

    exit_code = 130


NOT_RELEASED = 4
"""Exit code of a run that ended in REVIEW or WITHHELD: an honest result, not an error."""
