"""Counts the bytes held in all channels of a pipeline together: views and shared frames count once."""

from __future__ import annotations


def storages_of(item: object) -> dict[int, int]:
    """Address -> bytes of each storage that the item's tensors keep alive: views of one storage count once."""
    tensors = getattr(item, "tensors", None)
    if not tensors:
        return {}
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class Budget:
    """The bytes held in all channels together, and their limit."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.peak = 0
        self._held: dict[int, list[int]] = {}  # storage address -> [times it is held, bytes]

    def fits(self, storages: dict[int, int]) -> bool:
        """Whether the item may be added. While the budget is exceeded no item with tensors fits, even one that adds no
        bytes: items that a fast branch of a tee has already passed on would otherwise pile up before a slow branch."""
        extra = sum(size for address, size in storages.items() if address not in self._held)
        return not storages or self.used + extra <= self.total

    def hold(self, storages: dict[int, int]) -> None:
        for address, size in storages.items():
            if address in self._held:
                self._held[address][0] += 1
            else:
                self._held[address] = [1, size]
                self.used += size
        self.peak = max(self.peak, self.used)

    def release(self, storages: dict[int, int]) -> bool:
        """Returns whether this freed any bytes."""
        before = self.used
        for address in storages:
            held = self._held[address]
            held[0] -= 1
            if held[0] == 0:
                self.used -= held[1]
                del self._held[address]
        return self.used < before
