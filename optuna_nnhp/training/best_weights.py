"""Weights on disk, without pickle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torch import nn

from optuna_nnhp.training.atomic_files import load_tensors
from optuna_nnhp.training.atomic_files import write_tensors


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's weights, whole or not at all.

    Args:
        network:
            A plain module.
        path:
            A ``.safetensors`` file; its folder is made.

    Raises:
        OSError: If it cannot be written.
    """
    write_tensors(path, network.state_dict())


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Fill a network with weights from a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or belongs to another network, which is as it was then.
    """
    state, wanted = load_tensors(path), network.state_dict()
    shapes = [{name: w.shape for name, w in weights.items()} for weights in (wanted, state)]
    if other := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        raise ValueError(
            f"{path.name} must hold this network's weights, but differs in {other[0]}."
        )
    return _with_weights(network, state)


def _with_weights(network: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    network.load_state_dict(state)
    return network.eval()


class BestWeights:
    """The weights of the best trials of a study, in a folder or in memory.

    Args:
        folder:
            Where to keep them; None for memory.

    Example:
        >>> weights = BestWeights(None)
        >>> weights.save(3, nn.Linear(1, 1))
        >>> 3 in weights, 4 in weights
        (True, False)
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[int, dict[str, Tensor]] = {}
        files = folder.glob("trial-*.safetensors") if folder else ()
        self._files = {int(file.stem.removeprefix("trial-")) for file in files}

    def __contains__(self, number: int) -> bool:
        return number in self._memory or (self.folder is not None and self._path(number).exists())

    def save(self, number: int, network: nn.Module) -> None:
        """Keep a trial's weights."""
        if self.folder is None:
            state = network.state_dict()
            self._memory[number] = {n: w.detach().cpu().clone() for n, w in state.items()}
        else:
            save_weights(network, self._path(number))
            self._files.add(number)

    def load_into(self, number: int, network: nn.Module) -> nn.Module:
        """Load a trial's weights into its network."""
        if number in self._memory:
            return _with_weights(network, self._memory[number])
        return load_weights(network, self._path(number))

    def delete_others(self, keep: Iterable[int]) -> None:
        """Forget other trials: what this object kept, and what it found when it was made.

        What another process has written since is left alone: it may be about to be the best.
        """
        kept = set(keep)
        self._memory = {n: state for n, state in self._memory.items() if n in kept}
        for number in self._files - kept:
            self._path(number).unlink(missing_ok=True)
        self._files &= kept

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"trial-{number}.safetensors"
