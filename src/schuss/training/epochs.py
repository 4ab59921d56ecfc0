"""Where a training is in its data: epoch after epoch of batches, with a position that checkpoints keep."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

from schuss.training.stateful import RANDOM, Loader, generators_here, has_state, remembered, restore, state_of

__all__ = ["Epochs", "kept_random"]

Batch = TypeVar("Batch")


class Epochs(Generic[Batch]):
    """The batches of one epoch after another, from any position on.

    Data with `state_dict` and `load_state_dict` keep their position themselves. Of other data the position is a number
    of batches, and the states that random generators had when the epoch began: those are put back, and the batches
    that have been used are taken once more and dropped.

    Attributes:
        epoch: epochs that are over.
        taken: batches of this epoch that have been used.
    """

    def __init__(self, data: Iterable[Batch]) -> None:
        """Begin at the beginning.

        Args:
            data: gone through once per epoch.
        """
        self.epoch = self.taken = 0
        self._data = data
        self._exhausted = False
        self._begin: dict[str, Any] = {}

    @property
    def stateful(self) -> Any:
        """What `save_checkpoint` is to save of the data; None if they have no state that can be seen."""
        return self._data if isinstance(self._data, DataLoader) or has_state(self._data) else None

    def rest(self) -> Iterator[Batch]:
        """The batches of this epoch that have not been used."""
        if self._exhausted:
            return
        inside = [getattr(self._data, name, None) for name in ("sampler", "batch_sampler", "dataset")]
        for part in (self._data, *inside):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self.epoch)
        if has_state(self._data):
            batches = iter(self._data)
        elif self.taken == 0:
            self._begin = {name: state_of(piece) for name, piece in self._pieces().items()}
            batches = iter(self._data)
        else:
            generators = {name: piece for name, piece in self._pieces().items() if isinstance(piece, RANDOM)}
            now = {name: state_of(generator) for name, generator in generators.items()}
            self._put(self._begin)
            batches = iter(self._data)
            next(islice(batches, self.taken - 1, None), None)
            self._put(now)
        yield from batches
        self._exhausted = True  # and data with a position would begin anew

    def end(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.taken, self._exhausted = self.epoch + 1, 0, False

    def state_dict(self) -> dict[str, Any]:
        """The position; without the state of the data themselves."""
        begin = self._begin if self.taken else {}
        return {"epoch": self.epoch, "taken": self.taken, "exhausted": self._exhausted, "begin": begin}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to a position.

        Args:
            state_dict: what `state_dict` returned.
        """
        self.epoch, self.taken = state_dict["epoch"], state_dict["taken"]
        self._exhausted, self._begin = state_dict["exhausted"], state_dict["begin"]

    def _pieces(self) -> dict[str, Any]:
        """What decides about the order of the data, as far as it can be seen."""
        inside = Loader(self._data).pieces if isinstance(self._data, DataLoader) else {}
        return {**generators_here(), **inside}

    def _put(self, states: Mapping[str, Any]) -> None:
        for name, piece in self._pieces().items():
            if name in states:
                restore(piece, states[name], strict=True)


@contextmanager
def kept_random() -> Iterator[None]:
    """A block after which the random numbers of Python, NumPy, torch and CUDA go on as if it had not been."""
    before = [remembered(generator) for generator in generators_here().values()]
    try:
        yield
    finally:
        for put_back in before:
            put_back()
