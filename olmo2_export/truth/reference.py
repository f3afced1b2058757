"""PyTorch's logits and scores, taken as truth: transformers' own OLMo 1, 2 and 3, which share no code with ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from olmo2_export.config import TOKEN_ID_FIELDS, is_classifier, padding_id, read_json_object
from olmo2_export.dtypes import float_dtype
from olmo2_export.truth.classes import CLASSES, LAYER_NORM_EPS, LayerNorm, RMSNorm
from olmo2_export.weights.checkpoint import Checkpoint
from runtimes.errors import CheckpointError, first_names

_CONTEXT_PIECE = 512  # positions at a time where no logits are wanted
_NOT_FOR_REFERENCE = {*TOKEN_ID_FIELDS, "auto_map", "quantization_config"}
_OF_WINDOWS = {"layer_types", "sliding_window"}

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""float32 or float64 [..., K] -> the same, rounded"""


def int8_blocks(block_size: int) -> Rounding:
    """Return what rounds to 8 bits, with a scale for each `block_size` columns of a row; 0: for a whole row.

    In the kernels' own float32 arithmetic: those in blocks multiply by 127 / size, for a whole row the graph divides by
    the scale. Inputs that come from codes, as a quantised embedding's do, lie halfway between two codes as often as one
    in thirty, and there the last bit decides.
    """

    def rounding(x: torch.Tensor) -> torch.Tensor:
        columns = x.shape[-1]
        size = block_size or columns
        padded = F.pad(x.float(), (0, -columns % size))
        blocks = padded.view(*padded.shape[:-1], -1, size)
        largest = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        if block_size:
            scale = largest / 127
            codes = blocks * (torch.full_like(largest, 127) / largest)  # 127 / largest would be 127 * (1 / largest)
        else:
            scale = largest * torch.tensor(1 / 127, dtype=torch.float32)
            codes = blocks / scale
        rounded: torch.Tensor = (codes.round().to(x.dtype) * scale.to(x.dtype)).flatten(-2)[..., :columns]
        return rounded

    return rounding


def in_order(rounding: Rounding, order: np.ndarray) -> Rounding:
    """Return what rounds columns in an order, int64 [K], in which they are cut into blocks."""
    into, back = torch.from_numpy(order), torch.from_numpy(np.argsort(order))
    return lambda x: rounding(x[..., into])[..., back]


def int8_scaled(scale: float) -> Rounding:
    """Return what rounds to int8 with a fixed scale."""
    return lambda x: (x / scale).round().clamp(-128, 127) * scale


def fp8_scaled(scale: float) -> Rounding:
    """Return what rounds to float8e4m3fn with a fixed scale."""
    fp8 = float_dtype("float8e4m3fn")
    return lambda x: (x / scale).clamp(-fp8.largest, fp8.largest).to(fp8.torch).float() * scale


SCALED: dict[str, Callable[[float], Rounding]] = {"int8": int8_scaled, "fp8": fp8_scaled}
"""precision of weights whose inputs are rounded likewise -> what rounds those with a fixed scale"""


class Reference:
    """transformers' model at one precision; use it inside `open_reference`."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self._model: Any = model
        self._scores = hasattr(model, "score")
        self._result = torch.float64 if precision == "fp64" else torch.float32

    @torch.inference_mode()
    def logits(
        self, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Run each sequence alone, whole and without padding.

        Args:
            sequences: int64 token ids, each [length].
            positions: per sequence int64 [n], where logits are wanted; None: everywhere.

        Returns:
            Per sequence the logits of these positions [n, vocab_size]; float64 for fp64, else float32. Of a classifier
            the scores that each position would get, were it the one that is scored, [n, labels].
        """
        found = []
        for row, ids in enumerate(sequences):
            if self._scores:
                hidden = self._model.model(torch.from_numpy(ids)[None], use_cache=False).last_hidden_state
                wanted = hidden if positions is None else hidden[:, torch.from_numpy(positions[row])]
                found.append(self._model.score(wanted)[0].to(self._result).numpy())
                continue
            kept: Any = 0 if positions is None else torch.from_numpy(positions[row])  # 0: all
            logits = self._model(torch.from_numpy(ids)[None], logits_to_keep=kept, use_cache=False).logits
            found.append(logits[0].to(self._result).numpy())
        return found

    @torch.inference_mode()
    def scores(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Score a batch with a classifier, by transformers' own choice of the token.

        Args:
            ids: int64 [B, S], padded.
            mask: int64 [B, S], 0 where padding is hidden.

        Returns:
            [B, labels]; float64 for fp64, else float32.
        """
        given = torch.from_numpy(ids), torch.from_numpy(mask)
        scores = self._model(given[0], attention_mask=given[1], use_cache=False).logits
        array: np.ndarray = scores.to(self._result).numpy()
        return array

    @torch.inference_mode()
    def hidden_states(self, sequences: Sequence[np.ndarray], numbers: Sequence[int]) -> list[list[np.ndarray]]:
        """Run each sequence alone, and return its hidden states as transformers numbers them.

        Args:
            sequences: int64 token ids, each [length].
            numbers: of the hidden states.

        Returns:
            Per number and sequence [length, hidden]; float64 for fp64, else float32.
        """
        found: list[list[np.ndarray]] = [[] for _ in numbers]
        for ids in sequences:
            states = self._model.model(torch.from_numpy(ids)[None], use_cache=False, output_hidden_states=True)
            for kept, number in zip(found, numbers, strict=True):
                kept.append(states.hidden_states[number][0].to(self._result).numpy())
        return found

    @torch.inference_mode()
    def embeddings(
        self, sequences: Sequence[np.ndarray], numbers: Sequence[int], poolings: Sequence[str]
    ) -> list[np.ndarray]:
        """Pool hidden states of one batch, padded on the right, with its mask.

        Args:
            sequences: int64 token ids, each [length].
            numbers: of the hidden states.
            poolings: mean, over the tokens that the mask shows, or last, that of the last one.

        Returns:
            Per number, and for each all poolings, [B, hidden]; float64 for fp64, else float32.
        """
        width = max(map(len, sequences))
        mask = torch.stack([(torch.arange(width) < len(ids)).long() for ids in sequences])
        ids = torch.zeros_like(mask)
        ids[mask == 1] = torch.from_numpy(np.concatenate(sequences))
        output = self._model.model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        shown, last = mask[..., None].to(self._result), mask.sum(1) - 1
        found = []
        for number in numbers:
            states = output.hidden_states[number].to(self._result)  # (B, S, hidden)
            for pooling in poolings:
                mean = pooling == "mean"
                pooled = (states * shown).sum(1) / shown.sum(1) if mean else states[torch.arange(len(states)), last]
                found.append(pooled.numpy())
        return found

    @torch.inference_mode()
    def mixed(self, before: np.ndarray, vectors: np.ndarray, behind: np.ndarray) -> np.ndarray:
        """Run a sequence of tokens, then vectors in the place of tokens, then tokens again, whole.

        Args:
            before, behind: int64 [n], of any length.
            vectors: float32 [n, hidden].

        Returns:
            The logits from the first vector on, [n, vocab_size]; float64 for fp64, else float32. Of a classifier the
            scores that each position would get.
        """
        whole = self._embedded(before, vectors, behind)
        hidden = self._model.model(inputs_embeds=whole, use_cache=False).last_hidden_state[:, len(before) :]
        head = self._model.score if self._scores else self._model.lm_head
        array: np.ndarray = head(hidden)[0].to(self._result).numpy()
        return array

    @torch.inference_mode()
    def mixed_states(
        self, before: np.ndarray, vectors: np.ndarray, behind: np.ndarray, numbers: Sequence[int]
    ) -> list[np.ndarray]:
        """Return hidden states of what `mixed` runs, tokens and vectors, per number as `hidden_states`."""
        whole = self._embedded(before, vectors, behind)
        states = self._model.model(inputs_embeds=whole, use_cache=False, output_hidden_states=True).hidden_states
        return [states[number][0].to(self._result).numpy() for number in numbers]

    def _embedded(self, before: np.ndarray, vectors: np.ndarray, behind: np.ndarray) -> torch.Tensor:
        table = self._model.model.embed_tokens
        given = torch.from_numpy(vectors).to(table.weight.dtype)
        return torch.cat([table(torch.from_numpy(before)), given, table(torch.from_numpy(behind))])[None]

    @torch.inference_mode()
    def stream(self, ids: np.ndarray, first: int, piece: int) -> Iterator[np.ndarray]:
        """Run one sequence in pieces over a KV cache, so that the logits of few positions are in memory.

        Args:
            ids: int64 [length].
            first: the position from which logits are wanted.
            piece: positions at a time.

        Yields:
            The logits of positions first, first + 1, ...: [up to piece, vocab_size]; float64 for fp64, else float32.
        """
        cache = None
        bounds = [*range(0, first, _CONTEXT_PIECE), *range(first, len(ids), piece), len(ids)]
        for start, stop in pairwise(bounds):
            part = torch.from_numpy(ids[start:stop])[None]
            keep = 0 if start >= first else 1  # 0: all
            output = self._model(part, past_key_values=cache, use_cache=True, logits_to_keep=keep)
            cache = output.past_key_values
            if start >= first:
                yield output.logits[0].to(self._result).numpy()

    @torch.inference_mode()
    def greedy(self, prompt: np.ndarray, new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Continue a prompt greedily; an end-of-text token does not stop it.

        Returns:
            int64 [new_tokens] and the logit gap between the first and the second choice, float32 [new_tokens].
        """
        ids, cache = torch.from_numpy(prompt)[None], None
        tokens, gaps = [], []
        for _ in range(new_tokens):
            output = self._model(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            top = output.logits[0, -1].float().topk(2)
            tokens.append(int(top.indices[0]))
            gaps.append(float(top.values[0] - top.values[1]))
            ids = torch.tensor([[tokens[-1]]])
        return np.array(tokens, dtype=np.int64), np.array(gaps, dtype=np.float32)


@contextmanager
def open_reference(
    checkpoint: Checkpoint,
    precision: str,
    weights: Mapping[str, torch.Tensor] | None = None,
    rounded_inputs: Mapping[str, Rounding] | None = None,
) -> Iterator[Reference]:
    """Load the reference weights into PyTorch; they are dropped at the end.

    Args:
        checkpoint: the weights.
        precision: fp32, fp16 or bf16: the dtype of weights and activations; fp64: the exact answer.
        weights: by the checkpoint's names, to compute with instead of the checkpoint's: dequantised ones.
        rounded_inputs: names of linear weights, and what rounds their inputs, such as `int8_blocks`.

    Raises:
        CheckpointError: PyTorch could not load every tensor.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours is enough
    model: Any
    info: dict[str, Any]
    config = reference_config(checkpoint.folder)
    raw = read_json_object(checkpoint.folder / "config.json")
    classes = CLASSES[config.model_type]
    kind = classes.classifier if is_classifier(raw) else classes.causal_lm
    packed = checkpoint.quantized is not None  # transformers would want the library that made it, and round as it does
    model, info = kind.from_pretrained(  # type: ignore[misc]  # a pair, with loading info
        None if packed else checkpoint.folder,
        config=config,
        state_dict={name: checkpoint.tensor(name) for name in checkpoint.tensors} if packed else None,
        dtype=float_dtype(precision).torch,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    # transformers fills what is missing with fresh values and only reports it.
    wrong = sorted({str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind]})
    wrong += sorted(checkpoint.extra(checkpoint.tensors.keys() - set(info["unexpected_keys"])))
    if wrong:
        raise CheckpointError(f"{checkpoint.folder}: PyTorch could not load {first_names(wrong)}")
    if kind is classes.classifier:  # only now: an embedding refuses one beyond the vocabulary
        model.config.pad_token_id = padding_id(raw)
    if precision == "fp64":
        use_float64_norms(model)
    given = weights or {}
    for name in (*(checkpoint.changed - given.keys()), *given):
        weight = given[name] if name in given else checkpoint.tensor(name)
        parameter = nn.Parameter(weight.to(float_dtype(precision).torch), requires_grad=False)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)
    for name, rounding in (rounded_inputs or {}).items():
        owner, _, linear = name.removesuffix(".weight").rpartition(".")
        module = model.get_submodule(owner) if owner else model
        setattr(module, linear, _RoundedInputs(module.get_submodule(linear), rounding))
    try:
        yield Reference(model.eval(), precision)
    finally:  # its cycles wait for a collection; to force one takes longer than a small model's answers
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.new_empty(0)


def reference_config(folder: Path) -> transformers.PreTrainedConfig:
    """Return config.json as transformers reads it, without what changes no logits and may keep it from loading.

    That is: fields that are null; ids of tokens, which may be beyond the vocabulary; code of its own; layer types
    where the model has one; and a quantization_config, since weights are read as the plain numbers they are.
    """
    raw = read_json_object(folder / "config.json")
    left_out = _NOT_FOR_REFERENCE | (set() if raw["model_type"] == "olmo3" else _OF_WINDOWS)
    kept = {name: value for name, value in raw.items() if value is not None and name not in left_out}
    classes = CLASSES[raw["model_type"]]
    config: transformers.PreTrainedConfig = classes.config.from_dict(kept | dict.fromkeys(TOKEN_ID_FIELDS))
    return config


def use_float64_norms(model: nn.Module) -> None:
    """Replace the norms: transformers computes them in float32 whatever the model's dtype."""
    for name, module in list(model.named_modules()):
        exact: nn.Module | None = None
        if isinstance(module, RMSNorm):
            exact = _Float64Norm(module)
        elif isinstance(module, LayerNorm):
            exact = nn.LayerNorm(module.normalized_shape, LAYER_NORM_EPS, elementwise_affine=False)
        if exact is not None:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], exact)


class _Float64Norm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class _RoundedInputs(nn.Module):
    """A linear whose inputs are rounded, as quantised kernels do."""

    def __init__(self, linear: nn.Module, rounding: Rounding) -> None:
        super().__init__()
        self.linear, self.rounding = linear, rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        y: torch.Tensor = self.linear(self.rounding(wide).to(x.dtype))
        return y
