"""The bytes that lie in all channels of a pipeline together: views and shared frames count once."""

from __future__ import annotations


def storages_of(item: object) -> dict[int, int]:
    """Bytes of each storage the item's tensors keep alive, by address: views and shared frames count once."""
    tensors = getattr(item, "tensors", None)
    if not tensors:
        return {}
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class Budget:
    """Bytes that lie in all channels together."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.peak = 0
        self._held: dict[int, list[int]] = {}  # storage address -> [places it lies in, bytes]

    def fits(self, storages: dict[int, int]) -> bool:
        """While the budget is overdrawn nothing with tensors fits, even if it adds no bytes: what a fast branch of a
        tee has let in and passed on would otherwise pile up before a slow one."""
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
        """True when bytes came free."""
        before = self.used
        for address in storages:
            held = self._held[address]
            held[0] -= 1
            if held[0] == 0:
                self.used -= held[1]
                del self._held[address]
        return self.used < before
