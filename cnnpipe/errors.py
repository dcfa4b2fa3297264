"""The two ways in which a command ends without a result, each with one line for its user."""


class UserError(Exception):
    """The user's input is wrong: the line names the file, the value and what to do. Exit code 2."""


class RunFailed(Exception):
    """The run failed for a reason that its user could not know. Exit code 1."""
