"""Checks of option values that several methods share."""

from typing import Any

from ..errors import UserError


def check_positive_int(argument: str, value: Any) -> None:
    """Raises UserError unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{argument} must be a positive integer, got {value!r}")


def check_positive_number(argument: str, value: Any) -> None:
    """Raises UserError unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"{argument} must be a finite number above 0, got {value!r}")


def check_share(argument: str, value: Any) -> None:
    """Raises UserError unless ``value`` is a number from 0 to below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{argument} must be a number from 0 to below 1, got {value!r}")


def check_number_from_0(argument: str, value: Any) -> None:
    """Raises UserError unless ``value`` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise UserError(f"{argument} must be a finite number of at least 0, got {value!r}")


def check_boolean(argument: str, value: Any) -> None:
    """Raises UserError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{argument} must be True or False, got {value!r}")
