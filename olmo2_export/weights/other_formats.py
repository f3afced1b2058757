"""What people give as a checkpoint that is none, told by the files' names: each is named, with what to do.

What config.json says of a model that is not read, `config.py` tells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from olmo2_export.config import OLMO_CORE, is_olmo_core, read_json_object, refuse_other_forms
from runtimes.errors import CheckpointNotFoundError, ConfigError, first_names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Place:
    """A folder, or a repository on the Hub: where it is, its files by name, and what its config.json says."""

    where: str
    """for messages"""
    name: str
    """the last part of it"""
    find: Callable[[str], list[str]]
    """takes a pattern for one file, such as `*/config.json`; gives the names that it matches, in order"""
    config: Mapping[str, Any]
    """empty where there is none that can be read"""
    local: bool
    """a folder on this machine"""

    def has(self, *patterns: str) -> bool:
        """Tell whether a file matches one of the patterns."""
        return any(map(self.find, patterns))


def folder_place(folder: Path) -> Place:
    """Return a folder on this machine."""

    def find(pattern: str) -> list[str]:
        return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))

    return Place(str(folder), folder.resolve().name, find, _config(folder), local=True)


def listed_place(where: str, names: Iterable[str], folder: Path) -> Place:
    """Return a repository of which the names of all files are known, and a folder has the texts."""
    parts = {name: name.split("/") for name in names}

    def find(pattern: str) -> list[str]:
        wanted = pattern.split("/")
        return sorted(
            name for name, found in parts.items() if len(found) == len(wanted) and all(map(fnmatchcase, found, wanted))
        )

    return Place(where, where.rpartition("/")[2], find, _config(folder), local=False)


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(folder / "config.json")
    except ConfigError:  # said when it is read in earnest
        return {}


def is_whole(folder: Path) -> bool:
    """Tell whether a folder has config.json and weights in safetensors, or links in their place."""
    weights = any((folder / name).exists() or (folder / name).is_symlink() for name in (SINGLE, INDEX))
    return weights and (folder / "config.json").is_file()


def refuse_file(path: Path) -> NoReturn:
    """Refuse a file in the place of a folder.

    Raises:
        CheckpointNotFoundError: always.
    """
    if _is_gguf(path):
        raise CheckpointNotFoundError(f"{path}: a GGUF file; {_GGUF}")
    if path.suffix == ".safetensors":
        raise CheckpointNotFoundError(f"{path}: a file; give the folder that it is in, with its config.json")
    raise CheckpointNotFoundError(f"{path}: a file; MODEL is a folder, a Hub id (owner/name) or 'demo'")


def _is_gguf(path: Path) -> bool:
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except OSError:
        return False


def refuse_other_formats(place: Place) -> NoReturn:
    """Refuse a place that is not a checkpoint of a whole model in Hugging Face format; say what it is and what to do.

    Args:
        place: for which `is_whole` is false.

    Raises:
        CheckpointNotFoundError, ConfigError: always one of them; the second where config.json tells what it is.
    """
    if found := next((said for shows, said in _OTHERS if shows(place)), None):
        raise CheckpointNotFoundError(f"{place.where}: {found}")
    refuse_other_forms(place.config, f"{place.where}: config.json")
    config = place.has("config.json")
    inner = sorted(name.split("/")[0] for name in place.find("*/config.json"))
    if inner and not config:
        newest = max(inner, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)] or [-1])
        give = f"{place.where}/{newest}"
        if not place.local:
            give = f"hf download {place.where} --include '{newest}/*' --local-dir DIR, then DIR/{newest}"
        raise CheckpointNotFoundError(
            f"{place.where}: no config.json, but checkpoints in {first_names(inner)}; give one of them: {give}"
        )
    if not config:
        raise CheckpointNotFoundError(f"{place.where}: no config.json; is this a checkpoint in Hugging Face format?")
    if shards := place.find("*.safetensors"):
        raise CheckpointNotFoundError(
            f"{place.where}: {first_names(shards)}, but neither {SINGLE} nor {INDEX}, which says what belongs "
            "together; download the index, or rename a single file"
        )
    pickles = sorted(name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for name in place.find(pattern))
    hint = f"; {first_names(pickles)} is never read: convert it to safetensors" if pickles else ""
    raise CheckpointNotFoundError(
        f"{place.where}: neither {SINGLE} nor {INDEX}{hint}; on the Hub, --revision refs/pr/1 may have a conversion"
    )


def _has(*patterns: str) -> Callable[[Place], bool]:
    return lambda place: place.has(*patterns)


_CONVERT = "convert it to Hugging Face format first"
_GGUF = "it is llama.cpp's, which runs it; give the checkpoint it was made from, in Hugging Face format"
_OTHERS: tuple[tuple[Callable[[Place], bool], str], ...] = (
    (
        _has(ADAPTER, ADAPTER_WEIGHTS),
        "a LoRA adapter (PEFT), not a model; give its base model, and the adapter with --lora: it is merged",
    ),
    (
        lambda place: (
            is_olmo_core(place.config)
            or place.has("model_and_optim/*", "model_and_optim/.metadata")
            or (place.name == "model_and_optim" and place.has(".metadata", "*.distcp"))
        ),
        OLMO_CORE,
    ),
    (
        _has("config.yaml"),
        "a checkpoint of AI2's OLMo trainer (config.yaml beside model.pt or model.safetensors); give the repository "
        f"whose name ends in -hf, or {_CONVERT}, with OLMo's scripts/convert_olmo2_to_hf.py (of OLMo 1: "
        "convert_olmo_to_hf_new.py)",
    ),
    (_has("*.distcp", "*/*.distcp"), f"a distributed checkpoint of PyTorch (.distcp); {_CONVERT}"),
    (
        _has("zero_to_fp32.py", "global_step*/*.pt"),
        "a DeepSpeed checkpoint; run its zero_to_fp32.py --safe_serialization and give that folder",
    ),
    (_has("manifest.json"), "a package or another export, not a checkpoint; give the model that it was made from"),
    (_has("*.gguf", "*/*.gguf"), f"GGUF files, not a checkpoint; {_GGUF}"),
    (
        _has("snapshots/*/config.json"),
        "the cache of a Hub repository; give its id (owner/name), or the folder snapshots/COMMIT in it",
    ),
    (
        _has("weights.npz", "weights.*.safetensors"),
        "weights of MLX, not a checkpoint; give the model that they were made from, in Hugging Face format",
    ),
    (_has("flax_model.msgpack", "tf_model.h5"), f"weights of Flax or TensorFlow; {_CONVERT}, for PyTorch"),
)
"""what people give by mistake, in the order in which it is asked"""
