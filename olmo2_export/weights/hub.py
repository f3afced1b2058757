"""Where a checkpoint is: a Hub id, a local folder, or the bundled demo; and what a folder is that is none."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)

from olmo2_export.config import LFS_POINTER
from runtimes.errors import CheckpointError, CheckpointNotFoundError, broken_link, first_names
from runtimes.manifest import SourceKind

DEMO = "demo"
TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""files that a package takes over as they are, where the checkpoint has them"""
TEMPLATES = "additional_chat_templates"
"""a folder of chat templates beside the default one, NAME.jinja each"""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_ADAPTER = "adapter_config.json"
_TEXTS = ["config.json", *TEXT_FILES, f"{TEMPLATES}/*.jinja", INDEX, _ADAPTER]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]  # of the client that this huggingface_hub has


def locate(model: str, revision: str | None, *, weights: bool = True) -> tuple[Path, str, SourceKind]:
    """Find a checkpoint and download what is on the Hub: its texts, then the weight files that its index names.

    Args:
        model: `demo`, a local folder, or a Hub id.
        revision: branch, tag or commit; Hub ids only.
        weights: False leaves the weight files where they are.

    Returns:
        The folder; the Hub id, `demo`, or the folder's name; and which of these it is.

    Raises:
        CheckpointNotFoundError: no such folder, repository or revision.
    """
    if model == DEMO:
        return Path(__file__).parents[1] / "demo", DEMO, "demo"
    path = Path(model).expanduser()
    if path.is_dir():
        return path, path.resolve().name, "folder"
    if path.exists():
        raise CheckpointNotFoundError(f"{path}: a file; MODEL is a folder, a Hub id (owner/name) or '{DEMO}'")
    if lost := broken_link(path):
        raise CheckpointNotFoundError(f"{path}: {lost}")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointNotFoundError(f"{model}: no such folder, and not a Hub id (owner/name) or '{DEMO}'")
    folder = _download(model, revision, _TEXTS)
    at = folder.name if _COMMIT.fullmatch(folder.name) else revision  # all files of one commit
    shards = sorted(set(read_index(folder / INDEX).values())) if (folder / INDEX).exists() else []
    if weights:
        _download(model, at, [SINGLE, *map(glob.escape, shards)])
    return folder, model, "hub"


def remote_headers(model: str, revision: str, files: Sequence[str]) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Read the headers of weight files that stay on the Hub: some 100 KB of each.

    Args:
        model: a Hub id.
        revision: a commit.
        files: safetensors of the repository.

    Returns:
        Per file, tensor -> its dtype as safetensors names it, and its shape.

    Raises:
        CheckpointNotFoundError: the Hub cannot be reached, or has no such file.
        CheckpointError: a header is damaged.
    """
    found: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for file in files:
        try:
            header = HfApi().parse_safetensors_file_metadata(model, file, revision=revision)
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{model}: {file}: a damaged header; expected safetensors: {error}") from error
        except (HfHubHTTPError, HFValidationError, OSError, _HTTP_ERROR) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointNotFoundError(f"{model}@{revision}: {file}: its header cannot be read: {reason}") from error
        found[file] = {name: (str(info.dtype), list(info.shape)) for name, info in header.tensors.items()}
    return found


def _download(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    try:
        # Resumes what is partly there; without a network, or with HF_HUB_OFFLINE=1, it answers from the cache.
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{model}: the Hub cannot be reached and the cache has no copy; check the network or HF_HUB_OFFLINE"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointNotFoundError(f"{model}@{revision or 'main'}: {reason}") from error


def read_index(path: Path) -> dict[str, str]:
    """Read the index of a checkpoint in several files: tensor -> its file.

    Raises:
        CheckpointError: not an index, or a file that lies elsewhere.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS_POINTER):
            raise CheckpointError(f"{path}: a Git LFS pointer: run 'git lfs pull', or download the file itself")
        weight_map: dict[str, str] = json.loads(text)["weight_map"]
        names = set(weight_map.values())
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {broken_link(path) or error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no valid weight_map ({type(error).__name__}); download it again") from error
    bad = sorted(str(n) for n in names if not isinstance(n, str) or not _is_shard(n))
    if bad:
        raise CheckpointError(f"{path}: {first_names(bad)}: a shard is a .safetensors file in the same folder")
    return {tensor: PurePosixPath(name).as_posix() for tensor, name in weight_map.items()}


def _is_shard(name: str) -> bool:
    path = PurePosixPath(name)  # ./x.safetensors is x.safetensors
    return path.as_posix() == Path(name).name and path.suffix == ".safetensors"


def refuse_other_formats(folder: Path) -> None:
    """Refuse a folder that is not a checkpoint of a whole model in Hugging Face format; say what it is and what to do.

    Raises:
        CheckpointNotFoundError: it has no config.json, or no safetensors.
    """
    weights = any((folder / name).exists() or (folder / name).is_symlink() for name in (SINGLE, INDEX))
    config = (folder / "config.json").is_file()
    if lost := broken_link(folder / "config.json"):
        raise CheckpointNotFoundError(f"{folder}/config.json: {lost}")
    if weights and config:
        return
    if found := next((said for shows, said in _OTHERS if shows(folder)), None):
        raise CheckpointNotFoundError(f"{folder}: {found}")
    inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
    if inner and not config:
        newest = max(inner, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)] or [-1])
        raise CheckpointNotFoundError(
            f"{folder}: no config.json, but checkpoints in {first_names(inner)}; give one of them: {folder / newest}"
        )
    if not config:
        raise CheckpointNotFoundError(f"{folder}: no config.json; is this a checkpoint in Hugging Face format?")
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    if shards:
        raise CheckpointNotFoundError(
            f"{folder}: {first_names(shards)}, but neither {SINGLE} nor {INDEX}, which says what belongs together; "
            "download the index, or rename a single file"
        )
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    hint = f"; {first_names(pickles)} is never read: convert it to safetensors" if pickles else ""
    raise CheckpointNotFoundError(
        f"{folder}: neither {SINGLE} nor {INDEX}{hint}; on the Hub, --revision refs/pr/1 may have a conversion"
    )


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _is_olmo_core(folder: Path) -> bool:
    config = _config(folder)
    return (
        "OlmoCore" in str(config)[:4000]
        or "olmo_core" in str(config)[:4000]
        or (isinstance(config.get("model"), dict) and "model_type" not in config)
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


_CONVERT = "convert it to Hugging Face format first"
_OTHERS: tuple[tuple[Callable[[Path], bool], str], ...] = (
    (
        _has(_ADAPTER, "adapter_model.safetensors"),
        "a LoRA adapter (PEFT), not a model; merge it into its base model first (PeftModel.merge_and_unload, then "
        "save_pretrained) and give that folder",
    ),
    (
        lambda folder: _is_olmo_core(folder) or _has("model_and_optim/*", "model_and_optim/.metadata")(folder),
        f"a checkpoint of OLMo-core; {_CONVERT}, with OLMo-core's src/examples/huggingface/convert_checkpoint_to_hf.py",
    ),
    (
        _has("config.yaml"),
        f"a checkpoint of AI2's OLMo trainer (config.yaml); {_CONVERT}, with OLMo's scripts/convert_olmo2_to_hf.py",
    ),
    (_has("*.distcp", "*/*.distcp"), f"a distributed checkpoint of PyTorch (.distcp); {_CONVERT}"),
    (
        _has("zero_to_fp32.py", "global_step*/*.pt"),
        "a DeepSpeed checkpoint; run its zero_to_fp32.py --safe_serialization and give that folder",
    ),
    (_has("manifest.json"), "a package or another export, not a checkpoint; give the model that it was made from"),
    (_has("*.gguf"), "GGUF files, not a checkpoint; give the model that they were made from"),
    (
        _has("snapshots/*/config.json"),
        "the cache of a Hub repository; give its id (owner/name), or the folder snapshots/COMMIT in it",
    ),
    (_has("flax_model.msgpack", "tf_model.h5"), f"weights of Flax or TensorFlow; {_CONVERT}, for PyTorch"),
)
"""what people give by mistake, in the order in which it is asked"""
