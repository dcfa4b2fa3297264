"""The two ways in which a command ends without a result, each with one line for its user."""


class UserError(Exception):
    """The user's input is wrong: the line names the file, the value and what to do. Exit code 2."""


class RunFailed(Exception):
    """The run failed for a reason that its user could not know. Exit code 1."""


class ProcessLost(RunFailed):
    """Another process of the same training has ended, or cannot be reached."""


def printable(text: str) -> str:
    """The text with all that a terminal would act on escaped, whatever a file or a class is called.

    Line ends and other control characters, marks that change the direction of writing, and the
    undecodable bytes of a file's name become escapes, as in a string of Python.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python's stand-in for a byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
