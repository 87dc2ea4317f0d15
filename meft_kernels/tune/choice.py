"""Which row serves a kernel: one on trial, one measured on the device at hand, or the table's."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from . import device_file
from .row import FAMILIES, Architecture, Row
from .table import TABLE


def choose(
    kernel: str, width: int, architecture: Architecture = 90, device_name: str | None = None
) -> Row | None:
    """The row that serves a kernel at a width, or None where no block shape fits.

    Args:
        architecture: of the device.
        device_name: whose measured rows come before the table's; None for the table alone.
    """
    measured = () if device_name is None else device_file.read(device_name)
    key, tables = (kernel, width, architecture, device_name), (_trial, measured, TABLE)
    known = _chosen.get(key)
    if known is None or any(given is not before for given, before in zip(tables, known[0])):
        found = (best_of(rows, kernel, width, FAMILIES[architecture]) for rows in tables)
        known = _chosen[key] = tables, next((row for row in found if row is not None), None)
    return known[1]


_chosen: dict[tuple, tuple[tuple, Row | None]] = {}  # with the tables that were chosen from


def best_of(rows: Iterable[Row], kernel: str, width: int, family: str) -> Row | None:
    """The first of ``rows`` for a kernel, width and family, one of the exact family before one for any."""
    fitting = [row for row in rows if row.kernel == kernel and row.widths[0] <= width <= row.widths[1]]
    exact = [row for row in fitting if row.family == family]
    general = [row for row in fitting if row.family == "any"]
    return next(iter(exact + general), None)


_trial: tuple[Row, ...] = ()


@contextmanager
def trial(*rows: Row) -> Iterator[None]:
    """Puts rows before all others inside the ``with`` block, to time them."""
    global _trial
    before, _trial = _trial, rows
    try:
        yield
    finally:
        _trial = before
