"""A LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors, read and checked against a model.

| tensor, behind `base_model.model.`        | shape      | what becomes of the weight W, [out, in] of a linear       |
|-------------------------------------------|------------|-----------------------------------------------------------|
| {module}.lora_A.weight                    | [r, in]    | W + s B A, s = alpha / r, or alpha / sqrt(r) with rslora  |
| {module}.lora_B.weight                    | [out, r]   |                                                           |
| {module}.lora_magnitude_vector            | [out]      | DoRA, m: m V / |V|, row by row, where V = W + s B A       |
| {module}.lora_embedding_A                 | [r, vocab] | of the embedding: W + s (B A)^T                           |
| {module}.lora_embedding_B                 | [hidden, r] |                                                          |
| {module}.weight, .bias                    | as W       | in its place (modules_to_save)                            |
| {module}.base_layer.weight                | as W       | must be W                                                 |

Rank and alpha of a module are those of the first pattern of rank_pattern and alpha_pattern that fits the end of its
name. Every tensor must have a use, and every target that the config names its tensors.

Source: huggingface/peft 0.21, tuners/lora/{layer,dora}.py, tuners/tuners_utils.py, utils/save_and_load.py.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from olmo2_export.architecture import EMBED, Operation
from olmo2_export.config import read_json_object
from olmo2_export.dtypes import STORED
from olmo2_export.fields import Fields, short
from olmo2_export.weights import stored_tensors
from olmo2_export.weights.checkpoint import Checkpoint, file_stamp, model_name
from olmo2_export.weights.hub import locate_adapter
from olmo2_export.weights.other_formats import ADAPTER, ADAPTER_WEIGHTS
from runtimes.errors import CheckpointError, ConfigError, UsageError, broken_link, first_names
from runtimes.hub import is_hub_id
from runtimes.manifest import AdapterSource
from runtimes.sealed import hash_files

logger = logging.getLogger(__name__)

Rows: TypeAlias = slice | Tensor
"""rows of a weight: a range of them, or int64 [n]"""
Change: TypeAlias = Callable[[Tensor, Rows], Tensor]
"""takes some rows of a weight, [n, ...] in any float dtype, and which they are; gives float64 [n, ...]"""

_PREFIX = "base_model.model."
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector(\.weight)?|base_layer\.weight)"
)
_HEADS = ("classifier", "score")
"""what PEFT saves of every classifier, one of which the model has"""
_MERGE = "merge it with PEFT (PeftModel.merge_and_unload, then save_pretrained) and give that folder as the model"
_RANKS = 1 << 16

# Fields that change nothing once the adapter is trained, or are read below.
_NEUTRAL = frozenset(
    "auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config inference_mode "
    "lora_dropout lora_ga_config loftq_config megatron_core peft_version qalora_group_size revision runtime_config "
    "task_type".split()
)
_READ = frozenset(
    "alpha_pattern exclude_modules fan_in_fan_out init_lora_weights layers_pattern layers_to_transform lora_alpha "
    "modules_to_save peft_type r rank_pattern target_modules use_dora use_rslora".split()
)
# Kinds of LoRA that are other formulas -> what they are.
_OTHERS = {
    "alora_invocation_tokens": "aLoRA, which begins at a token of the prompt",
    "arrow_config": "Arrow, which chooses among adapters for each token",
    "kasa_config": "KaSA",
    "layer_replication": "copies of layers",
    "lora_bias": "a bias of its own, which OLMo's linears have not",
    "megatron_config": "Megatron's parallel linears",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "parameters that are no module's weight",
    "trainable_token_indices": "rows of the embedding, trained apart",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA, on pooled inputs",
    "velora_config": "VeLoRA",
}
_PLAIN_INIT = (None, True, False, "gaussian", "orthogonal")
"""values of init_lora_weights that leave the base model as it is"""


@dataclass(frozen=True)
class LowRank:
    """How one weight is changed; the tensors are named as the adapter names them."""

    a: str
    b: str
    rank: int
    scale: float
    """s"""
    magnitude: str | None = None
    """DoRA's"""
    transposed: bool = False
    """of the embedding: A is [r, out] and B [in, r]"""


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model; its tensors are read when they are asked for."""

    given: str
    """where it was said to be"""
    name: str
    """what it is called in a package"""
    stored: Checkpoint
    """where it is, and its tensors by its own names"""
    base: str | None
    """the model that its config says it was trained on"""
    low_rank: Mapping[str, LowRank] = field(hash=False)
    """by the weight's name in the model"""
    replaced: Mapping[str, str] = field(hash=False)
    """weight or bias -> the tensor that takes its place"""
    unchanged: Mapping[str, str] = field(hash=False)
    """weight -> a tensor that must be equal to it"""

    @property
    def changed(self) -> frozenset[str]:
        """The weights that it changes, by the model's names."""
        return frozenset((*self.low_rank, *self.replaced))

    @property
    def numbers(self) -> int:
        """How many numbers A and B of all weights hold."""
        factors = [name for row in self.low_rank.values() for name in (row.a, row.b)]
        return sum(math.prod(self.stored.tensors[name].shape) for name in factors)

    def factors(self, weight: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a weight [out, in], as they are stored: [r, in] and [out, r], where W + s B A is meant."""
        row = self.low_rank[weight]
        a, b = self.stored.tensor(row.a), self.stored.tensor(row.b)
        return (b.T, a.T) if row.transposed else (a, b)

    def change(self, weight: str) -> Change:
        """Read what changes a weight; the result takes its rows, in parts of any size.

        In float64, so that a row is the same number for number whatever the part that it came in.
        """
        if weight in self.replaced:
            new = self.stored.tensor(self.replaced[weight]).double()
            return lambda _, rows: new[rows]
        row = self.low_rank[weight]
        a, b = (factor.double() for factor in self.factors(weight))
        length = None if row.magnitude is None else self.stored.tensor(row.magnitude).double()

        def changed(part: Tensor, rows: Rows) -> Tensor:
            y = part.double() + row.scale * (b[rows] @ a)
            return y if length is None else y * (length[rows] / y.norm(dim=1))[:, None]

        return changed

    @property
    def source(self) -> AdapterSource:
        """What a manifest says of it."""
        stored = self.stored
        files = hash_files(stored.folder, stored.files)
        return AdapterSource(self.name, stored.model, stored.kind, stored.revision, self.base, files)

    def problems(self) -> list[str]:
        """Return which of its tensors hold NaN or Inf."""
        counts = {name: stored_tensors.count_non_finite(*self.stored.place(name)) for name in self._used()}
        return [f"{self.name}: {name}: {n} NaN or Inf" for name, n in counts.items() if n]

    def _used(self) -> list[str]:
        rows = self.low_rank.values()
        magnitudes = [row.magnitude for row in rows if row.magnitude is not None]
        return [*(name for row in rows for name in (row.a, row.b)), *magnitudes, *self.replaced.values()]


def open_adapter(given: str, model: Collection[Operation], *, tied: bool) -> Adapter:
    """Locate an adapter, download it if it is on the Hub, and check its config and its headers against a model.

    Args:
        given: a folder, or a Hub id with or without @REVISION; behind it =NAME, where its own name shall not be used.
        model: the rows of the model that it is for.
        tied: its embedding and its lm_head are one.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no adapter in it.
        ConfigError: adapter_config.json holds what this version cannot express.
        CheckpointError: tensors are missing, of no use, misshapen, or damaged.
        UsageError: a name that is none.
    """
    stored, name = _opened(given)
    raw = read_json_object(stored.folder / ADAPTER)
    settings = _Settings.read(raw, stored.folder / ADAPTER)
    shapes = {row.weight: row.shape for row in model if row.weight is not None}
    shapes |= {row.bias: row.shape[:1] for row in model if row.bias is not None}
    modules = [row.name for row in model if row.kind in ("gather", "linear")]
    finder = _Finder(stored, settings, modules, shapes)
    low_rank, replaced, unchanged = finder.find()
    problems = finder.problems
    if tied and (both := sorted(name for name in (*low_rank, *replaced) if not name.startswith("model.layers."))):
        problems.append(
            f"{first_names(both)}: changed, but embedding and lm_head are one weight here (tie_word_embeddings); untie "
            "them in the model first"
        )
    if problems:
        raise CheckpointError(f"{stored.folder}: {'; '.join(problems)}")
    base = raw.get("base_model_name_or_path")
    if isinstance(base, str) and not is_hub_id(base):
        base = Path(base).name  # of a local folder, whose path is nobody's business
    return Adapter(given, name, stored, base if isinstance(base, str) and base else None, low_rank, replaced, unchanged)


def _opened(given: str) -> tuple[Checkpoint, str]:
    """Return the files, and the name that was given or is the folder's."""
    where, name = given, ""
    if not Path(given).is_dir() and "=" in given:
        where, _, name = given.rpartition("=")
    folder, model, kind = locate_adapter(where)
    name = name or model.partition("@")[0].rpartition("/")[2]
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"--lora {given}: the name {name!r}; expected letters, digits, _ - and ., as in {where}=chat")
    path = folder / ADAPTER_WEIGHTS
    if lost := broken_link(path):
        raise CheckpointError(f"{path}: {lost}")
    tensors = stored_tensors.read_header(path, ADAPTER_WEIGHTS)
    stamps = {file: file_stamp(folder / file) for file in (ADAPTER, ADAPTER_WEIGHTS)}
    commit = folder.resolve().name if kind == "hub" else None
    return Checkpoint(folder, model, kind, commit, (ADAPTER, ADAPTER_WEIGHTS), tensors, stamps), name


@dataclass(frozen=True)
class _Settings:
    """What adapter_config.json says."""

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(hash=False)
    """pattern -> rank"""
    alphas: Mapping[str, float] = field(hash=False)
    rslora: bool
    dora: bool
    targets: str | tuple[str, ...]
    """a regular expression of the whole name, or ends of names"""
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    """the only ones; None: all"""
    saved: tuple[str, ...]
    """modules_to_save"""
    classifier: bool

    @classmethod
    def read(cls, raw: Mapping[str, Any], path: Path) -> _Settings:
        """Read the fields, and refuse what is another formula than that at the top of this file.

        Raises:
            ConfigError: naming every such field.
        """
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise ConfigError(f"{path}: peft_type {short(kind)}; this version reads LORA; {_MERGE}")
        fields = Fields(raw)
        others = [f"{name} ({what})" for name, what in _OTHERS.items() if raw.get(name)]
        init = raw.get("init_lora_weights")
        if init not in _PLAIN_INIT:
            others.append(f"init_lora_weights {short(init)} (its training began with another base model)")
        unknown = sorted(name for name in raw.keys() - _NEUTRAL - _READ - _OTHERS.keys() if raw[name])
        others += [f"{name} {short(raw[name])} (not known here)" for name in unknown]
        settings = cls(
            rank=fields.integer("r", 1, _RANKS),
            alpha=fields.number("lora_alpha"),
            ranks=_table(fields, "rank_pattern"),
            alphas=_table(fields, "alpha_pattern"),
            rslora=fields.boolean("use_rslora"),
            dora=fields.boolean("use_dora"),
            targets=_names(fields, "target_modules"),
            excluded=_names(fields, "exclude_modules"),
            layers=_layers(fields),
            saved=_names(fields, "modules_to_save"),
            classifier=raw.get("task_type") == "SEQ_CLS",
        )
        problems = [f"cannot be expressed: {', '.join(others)}; {_MERGE}"] if others else []
        if fields.problems:
            problems.append(f"invalid: {'; '.join(fields.problems)}")
        if problems:
            raise ConfigError(f"{path}: {'; '.join(problems)}")
        if fields.boolean("fan_in_fan_out"):
            logger.warning("%s: fan_in_fan_out is not used, as in PEFT: OLMo's linears are [out, in]", path)
        return settings

    def is_target(self, module: str) -> bool:
        """Tell whether PEFT would adapt a module."""
        if _fits(self.excluded, module) or any(_is_in(name, module) for name in self.saved):
            return False
        if self.layers is None or module in self.targets:
            return _fits(self.targets, module)
        layer = re.search(r"\.layers\.(\d+)\.", module)
        return _fits(self.targets, module) and layer is not None and int(layer[1]) in self.layers

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return next((rank for key, rank in self.ranks.items() if _ends(key, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Return s of a module."""
        rank = self.rank_of(module)
        alpha = next((alpha for key, alpha in self.alphas.items() if _ends(key, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


class _Finder:
    """Matches the tensors of an adapter with the weights of a model, and collects what does not fit."""

    def __init__(
        self, stored: Checkpoint, settings: _Settings, modules: list[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._stored, self._settings, self._modules, self._shapes = stored, settings, modules, shapes
        self.problems: list[str] = []

    def find(self) -> tuple[dict[str, LowRank], dict[str, str], dict[str, str]]:
        """Return the weights that are changed, those that are replaced, and those that must be as they are."""
        parts: dict[str, dict[str, str]] = {}
        plain: dict[str, str] = {}
        unchanged: dict[str, str] = {}
        for name in sorted(self._stored.tensors):
            inner = model_name(name.removeprefix(_PREFIX))
            found = _PART.fullmatch(inner)
            if found is None:
                plain[inner] = name
            elif found["part"] == "base_layer.weight":
                unchanged[f"{found['module']}.weight"] = name
            else:
                parts.setdefault(found["module"], {})[found["part"].removesuffix(".weight")] = name
        targets = [module for module in self._modules if self._settings.is_target(module)]
        low_rank = {f"{module}.weight": self._low_rank(module, parts.pop(module, {})) for module in targets}
        replaced = self._replaced(plain)
        same = {weight: name for weight, name in unchanged.items() if weight in low_rank}
        useless = [name for found in parts.values() for name in found.values()]
        useless += [name for weight, name in unchanged.items() if weight not in same]
        useless += [name for inner, name in plain.items() if inner not in replaced]
        if useless:
            self.problems.append(f"for no module that the model has and the config names: {first_names(useless)}")
        self._check_targets()
        if not low_rank and not replaced:
            self.problems.append("target_modules names no module of the model")
        for weight, name in (same | replaced).items():
            self._check_shape(name, self._shapes[weight])
        return {weight: row for weight, row in low_rank.items() if row is not None}, replaced, same

    def _low_rank(self, module: str, parts: Mapping[str, str]) -> LowRank | None:
        embedding, settings = module == EMBED, self._settings
        names = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A", "lora_B"]
        names += ["lora_magnitude_vector"] * settings.dora
        missing = [f"{module}.{name}" for name in names if name not in parts]
        if missing:
            self.problems.append(f"missing: {first_names(missing)}")
        if surplus := sorted(parts.keys() - set(names)):
            self.problems.append(f"not what the config says: {first_names([f'{module}.{name}' for name in surplus])}")
        if missing or surplus:
            return None
        if embedding and settings.dora:
            self.problems.append(f"{module}: DoRA of an embedding cannot be expressed; {_MERGE}")
            return None
        rank, (out, into) = settings.rank_of(module), self._shapes[f"{module}.weight"]
        shapes = [(rank, out), (into, rank)] if embedding else [(rank, into), (out, rank)]
        for name, shape in zip(names, [*shapes, (out,)], strict=False):
            self._check_shape(parts[name], shape)
        magnitude = parts.get("lora_magnitude_vector")
        return LowRank(parts[names[0]], parts[names[1]], rank, settings.scale_of(module), magnitude, embedding)

    def _replaced(self, plain: Mapping[str, str]) -> dict[str, str]:
        """Return what is stored whole: modules_to_save, and embedding and head, as PEFT saves them on its own."""
        tables = [name for name in self._shapes if not name.startswith("model.layers.") and name.endswith(".weight")]
        wanted = self._settings.saved
        saved = [weight for weight in self._shapes if any(_is_in(name, weight.rpartition(".")[0]) for name in wanted)]
        if missing := [name for name in saved if name not in plain]:
            self.problems.append(f"missing, though in modules_to_save: {first_names(missing)}")
        return {name: plain[name] for name in dict.fromkeys((*saved, *tables)) if name in plain}

    def _check_targets(self) -> None:
        """Note names of modules in the config that the model does not have."""
        settings, known = self._settings, [name.rpartition(".")[0] for name in self._shapes]
        given = () if isinstance(settings.targets, str) else settings.targets
        lost = [name for name in given if not any(_fits((name,), module) for module in self._modules)]
        saved = [name for name in settings.saved if not any(_is_in(name, module) for module in known)]
        lost += [name for name in saved if not (settings.classifier and name in _HEADS)]
        if lost:
            self.problems.append(f"no such module in the model, or none that can be adapted: {first_names(lost)}")

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        info = self._stored.tensors[name]
        if info.dtype not in STORED:
            self.problems.append(f"{name}: dtype {info.dtype}, expected one of {', '.join(STORED)}")
        if info.shape != expected:
            self.problems.append(f"{name}: shape {list(info.shape)}, expected {list(expected)}")


def _fits(names: str | tuple[str, ...], module: str) -> bool:
    """Tell whether a module is meant: by a regular expression of its whole name, or by the end of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _ends(pattern: str, module: str) -> bool:
    """Tell whether a pattern of ranks fits the end of a module's name, from a dot on or from its start."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def _is_in(saved: str, module: str) -> bool:
    """Tell whether a module, or one that it is in, has a name that ends so: PEFT asks for no dot before it."""
    parts = module.split(".")
    return any(".".join(parts[: n + 1]).endswith(saved) for n in range(len(parts)))


def _names(fields: Fields, name: str) -> Any:
    """Return a regular expression, or the ends of names; () where there is nothing."""
    value = fields.raw.get(name)
    if isinstance(value, str) and value and _is_pattern(value):
        return value
    if value is None or (isinstance(value, list) and all(isinstance(item, str) and item for item in value)):
        return tuple(value or ())
    fields.problems.append(f"{name} {short(value)} (a list of names, or a regular expression)")
    return ()


def _table(fields: Fields, name: str) -> Any:
    """Return pattern -> number."""
    value = fields.raw.get(name) or {}
    valid = isinstance(value, dict) and all(
        isinstance(key, str) and _is_pattern(key) and type(number) in (int, float) and number > 0
        for key, number in value.items()
    )
    fields.require(valid, f"{name} {short(value)} (patterns of names, each with a positive number)")
    return value if valid else {}


def _layers(fields: Fields) -> tuple[int, ...] | None:
    """Return the layers that are adapted; None: all."""
    value, pattern = fields.raw.get("layers_to_transform"), fields.raw.get("layers_pattern")
    fields.require(
        pattern in (None, "", [], "layers", ["layers"]), f"layers_pattern {short(pattern)} (OLMo's are called layers)"
    )
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    fields.require(all(type(item) is int for item in layers), f"layers_to_transform {short(value)} (numbers of layers)")
    return tuple(layers)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
