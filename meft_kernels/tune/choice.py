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
    key = kernel, width, architecture, device_name
    known = _chosen.get(key)
    # Asked at every launch: the same tables give the same row.
    if known is None or not (known[1] is _trial and known[2] is measured and known[3] is TABLE):
        found = (best_of(rows, kernel, width, FAMILIES[architecture]) for rows in (_trial, measured, TABLE))
        row = next((row for row in found if row is not None), None)
        known = _chosen[key] = row, _trial, measured, TABLE
    return known[0]


_chosen: dict[tuple, tuple] = {}  # rows, each with the tables that it was chosen from


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
