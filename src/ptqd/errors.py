"""The errors ptqd raises on purpose."""


class PtqdError(Exception):
    """Base of every error ptqd raises on purpose; the CLI prints it in one line and exits with 2."""


class InputError(PtqdError):
    """A file, folder, argument or configuration is not usable; the message says which, and the remedy."""


class MismatchError(PtqdError):
    """Two things that must belong together do not: statistics and a model, a plan and a schedule."""
