"""Which epoch it is, for datasets whose items differ from one to the next."""

import torch


class SharedEpoch:
    """The number of an epoch, which processes that read items see as soon as it is set: they may outlive an
    epoch."""

    def __init__(self):
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        self._value.fill_(int(epoch))

    def get(self) -> int:
        return int(self._value)


def drawn(key: int | tuple[int, int]) -> tuple[int, int]:
    """Position of an item and how often it came before in the epoch, of what a sampler gives: the first, or
    both."""
    return key if isinstance(key, tuple) else (key, 0)
