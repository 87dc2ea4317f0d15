"""What is said of a file that is read although something is strange about it."""

from ..once import logger, warn_once


def say_once(name: str, what: str) -> None:
    """Warns in the words "<name> <what>", once: clips are read again in every epoch."""
    if name.startswith("the given "):  # the name of no source in particular
        logger.warning("%s %s", name, what)
    else:
        warn_once(f"{name} {what}")
