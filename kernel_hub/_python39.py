"""Python 3.10's ``zip(strict=True)`` for all who run the kernel."""

import itertools
import sys

_END = object()


def _zip(*iterables, strict):
    for row in itertools.zip_longest(*iterables, fillvalue=_END):
        if strict and any(each is _END for each in row):
            raise ValueError("zip() arguments have different lengths")
        yield row


strict_zip = zip if sys.version_info >= (3, 10) else _zip
