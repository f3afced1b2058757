"""Whole texts, of each of which something is measured: a vector or scores. A few are computed at a time.

Texts of several requests share a batch where the same is wanted of them and their lengths are alike; the one that came
first is always in it. Nothing else may be on the runner meanwhile: a batch takes all of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtimes.errors import NumericError
from runtimes.runners.batches import batches
from runtimes.runners.embeddings import embed
from runtimes.runners.slots import Slots
from runtimes.serve.requests import Event, Failed, Measured, Texts

_SEEN = 64  # texts among which those of like lengths are looked for


class _Text(NamedTuple):
    """One of a request's texts."""

    request: Texts
    place: int

    @property
    def ids(self) -> tuple[int, ...]:
        return self.request.sequences[self.place]


class Measuring:
    """The texts that are to be measured, in the order in which they came."""

    def __init__(self, runner: Slots) -> None:
        """Begin with none.

        Args:
            runner: computes them.
        """
        self._runner = runner
        self._left: list[_Text] = []
        # What shares a batch is rounded otherwise than alone; transformers scores one text at a time without padding.
        alone = runner.exact or (bool(runner.model.labels) and runner.model.pad_token_id is None)
        self._rows = 1 if alone else runner.max_slots

    @property
    def requests(self) -> list[str]:
        """Their ids, each once."""
        return list(dict.fromkeys(text.request.id for text in self._left))

    def add(self, request: Texts) -> None:
        """Take another request's."""
        self._left += [_Text(request, place) for place in range(len(request.sequences))]

    def cancel(self, request_id: str) -> None:
        """Forget those of a request."""
        self._left = [text for text in self._left if text.request.id != request_id]

    def compute(self) -> tuple[list[Event], int]:
        """Measure the text that came first, and some like it.

        Returns:
            What came of them, and how many tokens they have.
        """
        batch = self._batch()
        chosen = {(text.request.id, text.place) for text in batch}
        self._left = [text for text in self._left if (text.request.id, text.place) not in chosen]
        events: list[Event] = []
        try:
            found = [*self._measured(batch)]
        except NumericError:  # which of them it was is not said
            found, kept = [], []
            for text in batch:
                try:
                    found += [*self._measured([text])]
                    kept.append(text)
                except NumericError as error:
                    events.append(Failed(text.request.id, str(error), "numeric"))
                    self.cancel(text.request.id)
            batch = kept
        for request_id in dict.fromkeys(text.request.id for text in batch):
            own = [number for number, text in enumerate(batch) if text.request.id == request_id]
            places = tuple(batch[number].place for number in own)
            events.append(Measured(request_id, places, np.stack([found[number] for number in own])))
        return events, sum(len(text.ids) for text in batch)

    def _batch(self) -> list[_Text]:
        first = self._left[0].request
        same = [text for text in self._left[:_SEEN] if _wanted(text.request) == _wanted(first)]
        groups = batches([len(text.ids) for text in same], self._rows)
        return [same[place] for place in sorted(next(group for group in groups if 0 in group))]

    def _measured(self, texts: Sequence[_Text]) -> npt.NDArray[np.floating[Any]]:
        sequences = [text.ids for text in texts]
        request = texts[0].request
        if request.measure == "scores":
            return self._runner.score(sequences)
        return embed(
            self._runner,
            sequences,
            pooling=request.pooling,
            hidden_state=request.hidden_state,
            normalize=request.normalize,
            batch_size=self._rows,
        )


def _wanted(request: Texts) -> tuple[object, ...]:
    return request.measure, request.pooling, request.hidden_state, request.normalize
