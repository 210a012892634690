"""The one exception for what a user can mistype or misplace."""


class UserError(ValueError):
    """Bad input: the message is one line that says what was given and what is accepted.

    The command line prints it and exits with status 2.
    """
