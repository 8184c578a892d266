"""The errors ptqd raises on purpose; everything else that is raised is a bug.

    PtqdError
        InputError(ValueError)              a file, folder, argument or configuration is not usable
            ArtifactError                   a file that ptqd wrote is damaged, or of another version
            UnsupportedError                a pipeline, scheduler or engine that ptqd cannot follow
            MissingDependencyError(ImportError)
        MismatchError                       two things that must belong together do not
        ResourceError                       the machine has not enough memory, disk or file handles

Every message names the thing and the remedy. The command line prints it in one line and exits with 2.
"""

import errno


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


class ResourceError(PtqdError):
    """The machine has not enough memory, disk or file handles; the message says what to do about it."""


MEMORY = (
    "not enough memory; lower --batch (in Python: Sampling's batch), close other programs, or take a larger machine"
)
HANDLES = "too many open files; raise the limit with 'ulimit -n 4096'"
_LACK_OF_MEMORY = (  # of torch, the C++ library, Linux' loader, NumPy, ONNX Runtime and OpenVINO
    "out of memory",
    "not enough memory",
    "allocate memory",
    "memory allocation",
    "bad_alloc",
    "bad allocation",
    "failed to map segment",
    "failed to allocate",
    "can't start new thread",
)


def lack_of(error: BaseException | None) -> ResourceError | None:
    """What the machine lacked where that is the reason of an error; None where it is not.

    >>> str(lack_of(MemoryError())).split(";")[0], lack_of(ValueError("no"))
    ('not enough memory', None)
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = error.errno if isinstance(error, OSError) else None
        text = str(error).lower()
        telling = isinstance(error, RuntimeError | ImportError) or type(error).__module__.startswith("onnxruntime")
        telling &= not isinstance(error, PtqdError)  # whose text may quote names, as a file's error may
        if isinstance(error, ResourceError):
            return error
        if isinstance(error, MemoryError) or number == errno.ENOMEM:
            return ResourceError(MEMORY)
        if number in (errno.EMFILE, errno.ENFILE) or (telling and "too many open files" in text):
            return ResourceError(HANDLES)
        if telling and any(words in text for words in _LACK_OF_MEMORY):
            return ResourceError(MEMORY)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


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
