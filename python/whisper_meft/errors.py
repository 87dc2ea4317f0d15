"""The exception for mistakes that a user can mend."""


class UserError(ValueError):
    """Input that cannot be used: its message is one sentence that names the argument, what was given and
    what is accepted. The command line prints it as one line and exits with a non-zero status."""
