"""Names are data: a label as a folder's name and back, a path that stays in its folder, a name as people may see it."""

import re
import unicodedata
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from ptqd.errors import InputError

CHUNK = 120  # characters of one folder's name; a longer label goes into folders inside each other
LONGEST = 255  # bytes of a file's name
_GOES_ON = "%"  # at the end of a folder's name: the label goes on inside; quoted text never ends so
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # Unicode's categories of what moves text, hides it or breaks lines
_JOINERS = "\u200c\u200d"  # which some scripts and emoji need
SHORT = 40  # characters of a name in a plot


def folder_name(label: str) -> str:
    """A label as the name of a folder, or as folders inside each other where it is long; no two labels share one.

    Letters, digits and ``-._+=`` stand for themselves, everything else, a leading dot too, as ``%XX`` of its bytes.

    Raises:
        InputError: an empty label.

    >>> folder_name("w4a8-best"), folder_name("a b"), folder_name("../x")
    ('w4a8-best', 'a%20b', '%2E.%2Fx')
    """
    if not label:
        raise InputError("a name is empty; give one")
    text = quote(label, safe="+=", errors="surrogatepass").replace("~", "%7E")
    if text.startswith("."):
        text = f"%2E{text[1:]}"
    chunks = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
    return "/".join([*(f"{chunk}{_GOES_ON}" for chunk in chunks[:-1]), chunks[-1]])


def label_of(name: str) -> str:
    """The label that :func:`folder_name` made a name of.

    >>> label_of(folder_name("a/b c")), label_of(folder_name("x" * 300)) == "x" * 300
    ('a/b c', True)
    """
    *before, last = name.split("/")
    return unquote("".join(part[: -len(_GOES_ON)] for part in before) + last, errors="surrogatepass")


def check_label(label: str, where: str) -> None:
    """Refuse a label of a file that somebody else may have written, and that no file or shorthand could have given.

    Raises:
        InputError: it is empty, starts with a dot, or has a separator or a control character.
    """
    if not label or label.startswith(".") or any(c in "/\\" or unicodedata.category(c) in ("Cc", "Cs") for c in label):
        raise InputError(f"{where}: {label!r} is no name: it is empty, starts with a dot, or has a separator in it")


def inside(folder: Path, name: str, where: str) -> Path:
    """A path that a file gives, inside its folder, links followed.

    Args:
        folder: that it has to stay in.
        name: a relative path.
        where: what says so, for messages.

    Raises:
        InputError: it leads out of the folder.
    """
    lexical = PurePosixPath(name)
    too_long = any(len(part.encode(errors="replace")) > LONGEST for part in lexical.parts)
    leaves = lexical.is_absolute() or ".." in lexical.parts or "\\" in name
    hostile = not name or "\0" in name or too_long or leaves
    path = folder if hostile else folder / name
    try:
        if hostile or not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{where} names {name!r}, which is not inside {folder}; nothing there is read or written")
    except (OSError, RuntimeError) as error:  # a name that is too long, or links in a circle
        raise InputError(f"{where} names {name!r}, which cannot be a path: {error}") from error
    return path


def shown(text: object) -> str:
    r"""A name or a message as people may see it: what moves the cursor, hides text or breaks lines stands in escapes.

    >>> shown("a\x1b[31mb\u202ec"), shown("größe 模型")
    ('a\\x1b[31mb\\u202ec', 'größe 模型')
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in _INVISIBLE and c not in _JOINERS and not _is_tag(c)
        else c
        for c in str(text)
    )


def _is_tag(c: str) -> bool:
    return "\ufe00" <= c <= "\ufe0f"  # which say how the character before them looks


def shown_lines(text: str) -> str:
    """The same for text of several lines, which stay lines."""
    return "\n".join(map(shown, text.split("\n")))


def short(name: str) -> str:
    """A name for a plot, its middle left out where it is long.

    >>> short("a" * 100)
    'aaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaa'
    """
    text = shown(name)
    return text if len(text) <= SHORT else f"{text[: SHORT // 2]}...{text[-(SHORT // 2 - 3) :]}"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """What names are sorted by, so that ``2.png`` comes before ``10.png``.

    >>> sorted(["10.png", "2.png", "a/1.png"], key=natural_key)
    ['2.png', '10.png', 'a/1.png']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]
