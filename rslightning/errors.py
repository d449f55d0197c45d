"""The two kinds of failure that a user is told about in one sentence.

Everything else that is raised is a defect of ours and keeps its traceback.
"""


class UserError(ValueError):
    """What the user asked for cannot be done as asked; the message says what to change. Exit 2."""


class RunError(RuntimeError):
    """The request was sound and its execution failed (full disk, lost file). Exit 1."""
