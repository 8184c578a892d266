"""The errors ptqd raises on purpose; everything else that is raised is a bug.

    PtqdError
        InputError(ValueError)              a file, folder, argument or configuration is not usable
            ArtifactError                   a file that ptqd wrote is damaged, or of another version
            UnsupportedError                a pipeline, scheduler or engine that ptqd cannot follow
            MissingDependencyError(ImportError)
        MismatchError                       two things that must belong together do not

Every message names the thing and the remedy. The command line prints it in one line and exits with 2.
"""


class PtqdError(Exception):
    """Base of every error ptqd raises on purpose."""


class InputError(PtqdError, ValueError):
    """A file, folder, argument or configuration is not usable; the message says which, and the remedy."""


class ArtifactError(InputError):
    """A file that ptqd wrote is damaged or of another version; the message says how to make it again."""


class UnsupportedError(InputError):
    """A pipeline, scheduler or engine works in a way that ptqd cannot follow; the message says which way would do."""


class MissingDependencyError(InputError, ImportError):
    """A package that is not installed; the message says what to install."""


class MismatchError(PtqdError):
    """Two things that must belong together do not: statistics and a model, a plan and a schedule."""


def raised_by(error: BaseException, *packages: str) -> bool:
    """Whether an exception was raised in the code of some packages, and not by what they call.

    So a refusal of diffusers can be told from a bug in a hook or in ptqd, which must fly as what it is.

    >>> import json
    >>> try:
    ...     json.loads("{")
    ... except ValueError as error:
    ...     raised_by(error, "json"), raised_by(error, "ptqd")
    (True, False)
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = "" if last is None else str(last.tb_frame.f_globals.get("__name__", ""))
    return any(name == package or name.startswith(f"{package}.") for package in packages)
