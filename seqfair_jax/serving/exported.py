"""Recommend with an exported model, without the package.

A program of JAX needs jax, numpy and flatbuffers; one of ONNX needs onnxruntime and numpy.
`seqfair export` copies this file to the exported folder, as `load.py`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

_BATCH = 256  # histories scored at once
_SHORTEST = 256  # items; shorter histories are padded, so that they share a compiled program


def _jax_program(folder: Path) -> Callable:
    import jax
    from jax import export

    with np.load(folder / "params.npz") as arrays:
        params = jax.device_put(dict(arrays))
    program = export.deserialize(bytearray((folder / "program.jax").read_bytes()))
    call = jax.jit(program.call)
    return lambda *arrays: call(params, *arrays)


def _onnx_program(folder: Path) -> Callable:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "program.onnx")
    names = [argument.name for argument in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _padded_shape(rows: int, longest: int) -> tuple[int, int]:
    """Powers of two, so that few shapes are compiled."""
    return 1 << (rows - 1).bit_length(), 1 << (max(longest, _SHORTEST) - 1).bit_length()


def _read_settings(folder: Path) -> dict:
    """The content of `model.json`, after a check of the files that it names."""
    advice = "copy the folder again, or export it again"
    try:
        settings = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        files = settings["sha256"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'model.json'} is damaged ({error!r}); {advice}") from error
    for name, expected in files:
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ValueError(f"{folder / name} is not the file that was exported; {advice}")
    return settings


class Model:
    """An exported folder. It may be shared by threads."""

    def __init__(self, folder: str | Path):
        """Read the folder.

        Args:
            folder: what `seqfair export` wrote.

        Raises:
            ValueError: if a file is not the one that was exported.
            FileNotFoundError: if one is missing.
        """
        folder = Path(folder)
        self.settings = _read_settings(folder)
        self.item_ids = json.loads((folder / "item_ids.json").read_text(encoding="utf-8"))
        self.places = {item: place for place, item in enumerate(self.item_ids)}
        self.max_k = int(self.settings["max_k"])
        make = {"jax": _jax_program, "onnx": _onnx_program}[self.settings["format"]]
        self._call = make(folder)

    def recommend(
        self, histories: Sequence[Sequence[int | str]], k: int = 10, mask_seen: bool | None = None
    ) -> list[list[tuple[int | str, float]]]:
        """The k best items of each history, as (item, score) pairs, best first.

        Items with the same score are in the order of `item_ids`. A list is shorter than k if
        fewer items are left.

        Args:
            histories: the items of each user, oldest first. Items that the model does not know
                are left out; those of `places` are known.
            k: length of a list, at most `max_k`.
            mask_seen: recommend no item of the history; None for what the run was evaluated by.

        Raises:
            TypeError: if a history is a text, and not a list of items.
            ValueError: if k is not between 1 and `max_k`.
        """
        for history in histories:
            if isinstance(history, str):
                raise TypeError(f"the history {history!r} is one text: expected a list of items")
        if not 1 <= k <= self.max_k:
            raise ValueError(f"k is {k}: expected 1 to {self.max_k}")
        if mask_seen is None:
            mask_seen = self.settings["mask_seen"]
        known = [[self.places[i] for i in items if i in self.places] for items in histories]
        return list(self._lists(known, k, bool(mask_seen)))

    def _lists(self, known: list, k: int, mask_seen: bool) -> Iterator[list]:
        shape = self.settings["shape"]  # of the program's input, if it is fixed
        step = shape[0] if shape else _BATCH
        for first in range(0, len(known), step):
            batch = known[first : first + step]
            rows, width = shape or _padded_shape(len(batch), max(map(len, batch)))
            items, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
            for row, history in enumerate(batch):
                newest = history[-width:]
                items[row, : len(newest)] = newest
                lengths[row] = len(newest)
            found = self._call(items, lengths, np.asarray(mask_seen))
            scores, places = (np.asarray(part)[:, :k] for part in found)
            for row in range(len(batch)):
                real = scores[row] > -np.inf  # masked items come last
                pairs = zip(places[row][real].tolist(), scores[row][real].tolist(), strict=True)
                yield [(self.item_ids[place], score) for place, score in pairs]
