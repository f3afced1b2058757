"""PyTorch's logits with one layer in memory: what `reference` gives of the whole model, for those beyond memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import float_dtype
from olmo2_export.truth.reference import Rounding
from olmo2_export.truth.torch_layers import StoredTables, TorchModel
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.source import Replaced
from olmo2_export.weights.stored_names import EMBEDDING, head_weight, stored_head, stored_weight

Row = np.ndarray | Sequence[np.ndarray]
"""int64 token ids [length]; or parts that follow one another, such ids and float32 vectors [n, hidden]"""


class LayeredReference:
    """transformers' layers at one precision, one at a time; they are read anew for each call of `logits`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        precision: str,
        weights: Mapping[str, Tensor] | None = None,
        rounded_inputs: Mapping[str, Rounding] | None = None,
    ) -> None:
        """Open nothing yet; arguments as `reference.open_reference`, and `config`, the checkpoint's shape."""
        replaced = weights or {}
        source = Replaced(checkpoint, replaced)

        def weight(name: str) -> Tensor:
            return replaced[name] if name in replaced else stored_weight(source, config, name)

        whole = EMBEDDING in replaced or head_weight(config) in replaced
        stored = None if whole else StoredTables(checkpoint, stored_head(config))
        self._model = TorchModel(checkpoint.folder, weight, precision, rounded_inputs, stored=stored)
        self._layers = config.num_hidden_layers
        self._result = torch.float64 if float_dtype(precision).torch == torch.float64 else torch.float32

    def logits(
        self, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Run each sequence alone, whole and without padding; see `Reference.logits`."""
        return self.logits_and_states(sequences, positions, ())[0]

    @torch.inference_mode()
    def logits_and_states(
        self, sequences: Sequence[Row], positions: Sequence[np.ndarray] | None, numbers: Sequence[int]
    ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Return `logits`, and in the same pass hidden states; see `Reference.hidden_states`."""
        model = self._model
        states: dict[int, list[np.ndarray]] = {}
        hidden = [self._embedded(row) for row in sequences]
        for index in range(self._layers):
            if index in numbers:
                states[index] = self._arrays(hidden)
            layer = model.layer(index)
            hidden = [layer(x) for x in hidden]
            del layer
        normed = [model.norm(x) for x in hidden]
        if self._layers in numbers:
            states[self._layers] = self._arrays(normed)
        kept = (
            normed
            if positions is None
            else [x[:, torch.from_numpy(at)] for x, at in zip(normed, positions, strict=True)]
        )
        return self._arrays([model.head(x) for x in kept]), [states[number] for number in numbers]

    def _embedded(self, row: Row) -> Tensor:
        parts = [torch.from_numpy(part) for part in ([row] if isinstance(row, np.ndarray) else row) if len(part)]
        return torch.cat([self._model.embed(x) if x.ndim == 1 else x[None].to(self._model.dtype) for x in parts], 1)

    def _arrays(self, rows: Sequence[Tensor]) -> list[np.ndarray]:
        return [x[0].to(self._result).numpy() for x in rows]
