"""The exception for mistakes that a user can mend."""


class UserError(ValueError):
    """Input that cannot be used: its message is one sentence that names the argument, what was given and
    what is accepted. The command line prints it as one line and exits with a non-zero status."""


_LONGEST = 600  # characters of a foreign message; what libraries say past that is advice to programmers


def one_line(error: BaseException) -> str:
    """An exception as one line of text, with its type where the message alone does not say what went wrong.

    An error from a data-loading process arrives with the traceback of that process as its message; the last
    line of that is what went wrong.
    """
    text = str(error).strip()
    if text.startswith("Caught ") and "DataLoader worker" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    if isinstance(error, UserError):
        return text
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rsplit(" ", 1)[0] + " ..."
    name = type(error).__name__
    if text and type(error) in (OSError, ValueError, ImportError):
        return text
    return f"{name}: {text}" if text else name
