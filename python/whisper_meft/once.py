"""Saying a thing once, however often it comes up."""

import logging
from functools import cache

logger = logging.getLogger("whisper_meft")


@cache
def warn_once(text: str) -> None:
    """Warns in these words once in a process: splits are read one by one, clips in every epoch."""
    logger.warning("%s", text)
