"""What is said of a file that is read although something is strange about it."""

import logging

logger = logging.getLogger(__name__)

_said: set[tuple[str, str]] = set()


def say_once(name: str, what: str) -> None:
    """Warns in the words "<name> <what>", once: clips are read again in every epoch."""
    if (name, what) not in _said or name.startswith("the given "):  # the name of no source in particular
        _said.add((name, what))
        logger.warning("%s %s", name, what)
