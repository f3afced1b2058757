"""LoRA adapters as inputs of a package's graphs: chosen for each sequence, exact without one, PyTorch's with one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.adapters import LINEARS, PREFIX, factors, write_adapter
from support.checkpoints import OLMO1, make_checkpoint
from support.fp16_models import changed, product
from support.packages import sequences

from olmo2_export import cli
from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig
from olmo2_export.fp16.values import islands_of
from olmo2_export.fuse import DEVICE
from olmo2_export.graphs.device import device_graph
from olmo2_export.graphs.files import save_graph
from olmo2_export.graphs.lora_inputs import adapted_linears, lora_tensors, take_adapters
from olmo2_export.graphs.shared import shared_graph
from olmo2_export.graphs.taps import find_segments
from olmo2_export.graphs.trace import trace
from olmo2_export.measure import quality
from olmo2_export.package.export import export
from olmo2_export.package.plan import plan_export
from olmo2_export.package.weight_choice import Options
from olmo2_export.truth.torch_layers import reference_logits
from olmo2_export.verify.adapters import adapter_checks
from olmo2_export.views.table import variant_views
from olmo2_export.weights.merged import open_merged, switchable_adapters
from runtimes import open_package, open_runner
from runtimes.errors import BackendError, CheckpointError, InputError
from runtimes.generation.generate import generate
from runtimes.ort.adapters import Adapters
from runtimes.ort.adapters import write_adapter as write_file
from runtimes.ort.device import DeviceRunner
from runtimes.ort.devices import GpuMemory
from runtimes.ort.session import open_session
from runtimes.runners.slots import Slots
from runtimes.targets import find_target

IDS = sequences()[0]
NAMES = ("chat", "code")
VARIANTS = ("fp32", "q8", "fp16", "bf16", "q4f16")


@pytest.fixture(scope="module")
def adapters(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two of other ranks and other linears."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "chat", factors(tiny_checkpoint))
    linears, seed = ["q_proj", "down_proj"], 7
    code = factors(tiny_checkpoint, linears, rank=6, seed=seed)
    write_adapter(root / "code", code, target_modules=linears, r=6, lora_alpha=18)
    return [str(root / name) for name in NAMES]


@pytest.fixture(scope="module")
def package(
    tiny_checkpoint: Path,
    adapters: list[str],
    traces: None,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("package") / "switchable"
    checkpoint = open_merged(str(tiny_checkpoint), switchable=adapters)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quality, "_MOST_TOKENS", 64)  # it is not what is looked at here
        monkeypatch.setattr(quality, "_LENGTH", 64)
        export(checkpoint, out, variants=VARIANTS, options=Options(prefill_graph=True))
    return out


@pytest.fixture(params=["fp32", "q8"])
def runner(request: pytest.FixtureRequest, package: Path) -> Iterator[Slots]:
    with open_runner(package, variant=request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def want(tiny_checkpoint: Path, adapters: list[str]) -> dict[str | None, np.ndarray]:
    """PyTorch's logits of IDS without an adapter, and with each merged."""
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    merged = {None: open_merged(str(tiny_checkpoint))}
    merged |= {name: open_merged(str(tiny_checkpoint), lora=[path]) for name, path in zip(NAMES, adapters, strict=True)}
    return {name: next(iter(reference_logits(checkpoint, config, [IDS]))) for name, checkpoint in merged.items()}


def off(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - right) ** 2) / np.mean(right**2)))


LIMIT = {"fp32": 2e-6, "q8": 0.05}
"""of the root of the mean squared error / of the logits; an adapter changes them by 0.3 and more"""


def test_each_row_of_a_batch_has_its_adapter_or_none(runner: Slots, want: dict[str | None, np.ndarray]) -> None:
    rows = ["chat", None, "code", "code", "chat"]
    assert runner.adapters == NAMES
    found = [runner.prefill([IDS[:9]] * 5, adapter=rows)]
    found += [[logits[None] for logits in runner.decode([token] * 5)] for token in IDS[9:]]
    assert runner.cached_adapters == tuple(rows)
    for row, name in enumerate(rows):
        logits = np.concatenate([step[row] for step in found])
        assert off(logits, want[name][8:]) < LIMIT[runner.variant.name]
        assert min(off(logits, want[other][8:]) for other in want if other != name) > 0.2
    assert min(off(want[a], want[b]) for a, b in ((None, "chat"), (None, "code"), ("chat", "code"))) > 0.2


def test_the_graphs_with_another_kv_cache_take_adapters_too(package: Path, want: dict[str | None, np.ndarray]) -> None:
    for cache in ("float32", "int8"):
        with open_runner(package, variant="q8", kv_cache=cache) as runner:
            found = runner.prefill([IDS, IDS], all_positions=True, adapter=["code", None])
            for logits, name in zip(found, ("code", None), strict=True):
                assert off(logits, want[name]) < LIMIT["q8"], cache


@pytest.mark.parametrize(("variant", "plain"), [("fp32", "tiny_package"), ("q8", "q8_package")])
def test_no_adapter_is_to_the_bit_the_package_without_any(
    request: pytest.FixtureRequest, package: Path, variant: str, plain: str
) -> None:
    found = []
    for folder in (package, request.getfixturevalue(plain)):
        with open_runner(folder, variant=variant) as runner:
            first = runner.prefill([IDS[:7]])[0]
            found.append(np.concatenate([first, *(runner.decode([token]) for token in IDS[7:])]))
            if folder == package:  # and after one was used
                runner.reset()
                runner.prefill([IDS[:7]], adapter="chat")
                runner.reset()
                assert np.array_equal(runner.prefill([IDS[:7]])[0], first)
    assert np.array_equal(*found)


def test_slots_keep_their_adapter_in_mixed_steps_forks_and_moves(
    runner: Slots, want: dict[str | None, np.ndarray]
) -> None:
    limit = LIMIT[runner.variant.name]
    gone, _ = runner.admit(IDS[:3])
    slots = {name: runner.admit(IDS[:9], name)[0] for name in ("code", None, "chat")}
    runner.release(gone)  # the last row moves into its place
    fork = runner.copy_prefix(slots["chat"], 9)
    for at in range(9, 12):
        found = runner.step({slot: int(IDS[at]) for slot in (*slots.values(), fork)})
        for name, slot in slots.items():
            assert off(found[slot], want[name][at]) < limit
        assert off(found[fork], want["chat"][at]) < limit
    assert [runner.cached_adapters[slot] for slot in (*slots.values(), fork)] == ["code", None, "chat", "chat"]
    runner.release(slots["chat"])
    again, logits = runner.admit(IDS[:9])
    assert runner.cached_adapters[again] is None
    assert off(logits, want[None][8]) < limit


def test_an_adapter_that_is_unknown_or_another_than_the_rows_is_refused(runner: Slots) -> None:
    with pytest.raises(InputError, match="adapter 'poet': this runner has chat, code"):
        runner.prefill([IDS], adapter="poet")
    with pytest.raises(InputError, match="adapter 'poet': this runner has chat, code"):
        runner.begin(IDS, "poet")
    with pytest.raises(InputError, match="2 adapters for 1 rows"):
        runner.prefill([IDS], adapter=["chat", None])
    assert runner.cached_tokens == ()
    runner.prefill([IDS], adapter="chat")
    with pytest.raises(InputError, match=r"row 0: its tokens were computed with chat, found adapter code; reset\(\)"):
        runner.prefill([IDS[:2]], adapter="code")
    assert runner.cached_adapters == ("chat",)
    runner.prefill([IDS[:2]])  # goes on with its own
    assert runner.cached_adapters == ("chat",)


def test_a_package_without_adapters_says_how_to_get_some(tiny_package: Path) -> None:
    with (
        open_runner(tiny_package) as runner,
        pytest.raises(InputError, match="this runner has none; export the package with --lora-inputs"),
    ):
        runner.prefill([IDS], adapter="chat")


@pytest.fixture
def on_device(package: Path) -> Iterator[DeviceRunner]:
    """The runner for GPUs, on the CPU provider: inputs bound by address, decode steps under ids of their own."""
    opened = open_package(package)
    variant, memory = opened.variant("fp16"), GpuMemory(kind="cpu")
    files = {name: entry.file for name, entry in opened.manifest.adapters.items()}
    lora = Adapters(package, files, variant, opened.check, memory)
    session = open_session(package / variant.graph, variant, 1)
    with DeviceRunner(session, variant, opened.model, memory, capture=True, adapters=lora) as runner:
        yield runner


def test_on_a_gpu_rows_with_one_adapter_are_a_captured_step_and_mixed_rows_are_not(
    on_device: DeviceRunner, want: dict[str | None, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []
    real = on_device._run_bound

    def seen(session: object, binding: object, options: ort.RunOptions) -> None:
        ids.append(options.get_run_config_entry("gpu_graph_id"))
        real(session, binding, options)

    monkeypatch.setattr(on_device, "_run_bound", seen)
    captured = []
    for rows in ((None, "chat"), ("chat", "chat"), (None, None), ("chat", "chat"), ("code", "chat")):
        on_device.reset()
        on_device.prefill([IDS[:9]] * 2, adapter=rows)
        ids.clear()
        found = on_device.decode([int(IDS[9])] * 2)
        captured.append(ids.copy())
        for logits, name in zip(found, rows, strict=True):
            assert off(logits, want[name][9]) < 0.01
            assert min(off(logits, want[other][9]) for other in want if other != name) > 0.2
    assert captured == [["-1", "-1"], ["1"], ["2"], ["1"], ["-1", "-1"]]


@pytest.mark.parametrize("variant", ["fp16", "bf16", "q4f16"])
def test_graphs_of_16_bits_take_adapters_in_their_precision_from_the_same_file(package: Path, variant: str) -> None:
    entry = open_package(package).variant(variant)
    dtypes = {spec.dtype for spec in entry.inputs if spec.role in ("lora_a", "lora_b")}
    assert dtypes == {entry.kv_cache.dtype}
    assert len([spec for spec in entry.inputs if spec.role == "lora_a"]) == 7 * 3


def test_a_linear_in_float32_of_a_float16_graph_takes_its_adapter_in_float32(
    traces: None,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    """Else onnxruntime refuses the graph, or what must not be rounded is rounded before the adapter is added. So are
    logits: the head's adapter is added before they are float32."""
    base = changed(tmp_path / "base", product)
    linears = [*LINEARS, "lm_head"]
    lora = str(write_adapter(tmp_path / "chat", factors(base, linears), target_modules=linears))
    config = ModelConfig.from_json(base / "config.json")
    rows, checkpoint = operations(config), open_merged(str(base), switchable=[lora])
    (adapter,) = switchable_adapters(checkpoint)
    wide = islands_of(["model.layers.0.mlp.product"])
    model, _, _ = device_graph(
        shared_graph(trace(config), rows, DEVICE), checkpoint, config, ir.DataType.FLOAT16, wide=wide
    )
    assert take_adapters(model, adapted_linears([adapter], rows), "float16") == 7 * 3 + 1
    casts = [node.inputs[0].name for node in model.graph if node.name and node.name.endswith(("_A.cast", "_B.cast"))]
    assert casts == ["model.layers.0.mlp.down_proj.lora_A", "model.layers.0.mlp.down_proj.lora_B"]
    save_graph(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx")
    feeds = {name: array.astype(np.float16) for name, array in lora_tensors(adapter).items()}
    feeds |= {"input_ids": IDS[None], "attention_mask": np.ones((1, len(IDS)), np.int64)}
    feeds |= {v.name: np.zeros((1, 2, 0, 16), np.float16) for v in session.get_inputs() if "past" in v.name}
    (found,) = session.run(["logits"], feeds)
    (want,) = reference_logits(open_merged(str(base), lora=[lora]), config, [IDS])
    assert off(found[0], want) < 0.01


def test_what_reads_a_linear_with_an_adapter_is_still_found(
    traces: None,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    """`verify --locate` compares a clip with PyTorch's; looked for in front of the adapter, it would be no clip."""
    config = ModelConfig.from_json(make_checkpoint(tmp_path / "olmo1", **OLMO1) / "config.json")
    rows = operations(config)
    model = trace(config)
    before = find_segments(model, rows)[1].taps
    take_adapters(model, [row for row in rows if row.kind == "linear" and row.layer is not None])
    after = find_segments(model, rows)[1].taps
    place = "model.layers.0.self_attn"
    assert after[f"{place}.q_proj"] == f"{place}.q_proj.adapted"
    assert after[f"{place}.q_clip"] == before[f"{place}.q_clip"]
    assert after.keys() == before.keys()


def test_a_device_that_compiles_for_fixed_ranks_is_refused_before_it_is_looked_for(package: Path) -> None:
    with pytest.raises(BackendError, match="takes LoRA adapters at run time, which device nv-rtx does not; use device"):
        open_runner(package, variant="bf16", device="nv-rtx")


class _NoText:
    eos_token_ids: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Callable[..., str]:
        return lambda *_, **__: ""


def test_a_text_of_one_adapter_is_no_prefix_of_anothers(
    package: Path, want: dict[str | None, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtimes.generation import generate as module
    from runtimes.text.sampling import Sampler

    monkeypatch.setattr(module, "stream_text", lambda _, ids, **__: (module.Piece("", None) for _ in ids))
    with open_runner(package, variant="fp32") as runner:

        def text(adapter: str | None) -> tuple[int, int]:
            result = generate(runner, _NoText(), IDS, sampler=Sampler(), max_new_tokens=1, adapter=adapter)
            return result.reused_tokens, result.token_ids[0]

        for name, reused in ((None, 0), (None, 16), ("chat", 0), ("chat", 16), ("code", 0), (None, 0)):
            assert text(name) == (reused, int(want[name][-1].argmax()))
        with pytest.raises(InputError, match="adapter 'poet'"):
            text("poet")


@pytest.mark.parametrize("variant", ["fp32", "q8"])
def test_plain_onnxruntime_loads_the_adapter_file(
    package: Path, want: dict[str | None, np.ndarray], variant: str
) -> None:
    """Into what other runtimes open: of fp32 the graph itself, of q8 that for either padding, here on the left."""
    manifest = open_package(package).manifest
    entry = manifest.variants[variant]
    opened = entry.portable or entry
    session = ort.InferenceSession(package / opened.graph)
    found = (*session.get_inputs(), *session.get_overridable_initializers())
    assert {spec.name for spec in opened.inputs} == {spec.name for spec in found}
    pads = 0 if entry.portable is None else 3
    ids, mask = np.pad(IDS, (pads, 0))[None], np.pad(np.ones_like(IDS), (pads, 0))[None]
    feeds = {"input_ids": ids, "attention_mask": mask}
    if entry.portable is None:
        feeds["position_ids"] = np.arange(len(IDS))[None]
    feeds |= {name: np.zeros((1, 2, 0, 16), np.float32) for name in manifest.variants["fp32"].caches}
    for name in (None, *NAMES):
        options = ort.RunOptions()
        if name is not None:
            adapter = ort.LoraAdapter()
            adapter.Load(str(package / manifest.adapters[name].file))
            options.add_active_adapter(adapter)
        assert off(session.run(["logits"], feeds, options)[0][0][pads:], want[name]) < LIMIT[variant]


def test_an_adapter_file_has_the_same_bytes_each_time(
    package: Path, tiny_checkpoint: Path, adapters: list[str], tmp_path: Path
) -> None:
    for adapter in switchable_adapters(open_merged(str(tiny_checkpoint), switchable=adapters)):
        write_file(tmp_path / "again", lora_tensors(adapter))
        assert (tmp_path / "again").read_bytes() == (package / f"adapters/{adapter.name}.onnx_adapter").read_bytes()


def test_a_dry_run_counts_the_adapters(package: Path, tiny_checkpoint: Path, adapters: list[str]) -> None:
    plain, both = (
        plan_export(open_merged(str(tiny_checkpoint), switchable=some, headers=True)).texts for some in ([], adapters)
    )
    files = open_package(package).manifest.files
    assert 0.8 < (both - plain) / sum(files[f"adapters/{name}.onnx_adapter"].size for name in NAMES) < 1


def test_what_is_no_low_rank_change_of_a_linear_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = factors(tiny_checkpoint, ["q_proj"])
    lora = write_adapter(
        tmp_path / "lora",
        tensors | {f"{PREFIX}lm_head.weight": torch.zeros(131, 96)},
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: an adapter as inputs changes linears by"):
        export(open_merged(str(tiny_checkpoint), switchable=[str(lora)]), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: an adapter as inputs changes linears by"):
        plan_export(open_merged(str(tiny_checkpoint), switchable=[str(lora)], headers=True))
    assert not (tmp_path / "out").exists()


def checks_of(package: Path, base: Path, adapters: list[str], variant: str) -> dict[str, bool]:
    opened, checkpoint = open_package(package), open_merged(str(base), switchable=adapters)
    config = ModelConfig.from_json(base / "config.json")
    views = variant_views(opened, opened.variant(variant), checkpoint, config, find_target("ort"))
    view = next(view for view in views if not view.label.startswith("int8"))
    return {check.name: check.passed for check in adapter_checks(opened, view, checkpoint, config, IDS)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_verify_passes_each_adapter_in_a_mixed_batch(
    package: Path, tiny_checkpoint: Path, adapters: list[str], variant: str
) -> None:
    assert checks_of(package, tiny_checkpoint, adapters, variant) == {"adapter chat": True, "adapter code": True}


def _scaled(arrays: dict[str, np.ndarray]) -> None:
    for name in arrays:
        if name.endswith("lora_B"):
            arrays[name] = arrays[name] / 2  # as if alpha / r was 1


def _of_the_next_layer(arrays: dict[str, np.ndarray]) -> None:
    old = dict(arrays)
    for name in arrays:
        if ".layers.0." in name:
            arrays[name] = old[name.replace(".layers.0.", ".layers.1.")]


@pytest.mark.parametrize("bug", [_scaled, _of_the_next_layer])
@pytest.mark.parametrize("variant", ["fp32", "q8", "bf16"])
def test_verify_fails_an_adapter_of_another_scale_or_layer(
    package: Path,
    tiny_checkpoint: Path,
    adapters: list[str],
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    bug: Callable[[dict[str, np.ndarray]], None],
) -> None:
    real = Adapters._placed

    def placed(self: Adapters, arrays: dict[str, np.ndarray]) -> dict[str, object]:
        if any(array.size for array in arrays.values()):
            bug(arrays)
        return real(self, arrays)

    monkeypatch.setattr(Adapters, "_placed", placed)
    assert checks_of(package, tiny_checkpoint, adapters, variant) == {"adapter chat": False, "adapter code": False}


def test_verify_fails_adapters_that_are_swapped_between_rows(
    package: Path, tiny_checkpoint: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, other = Adapters.values, {"chat": "code", "code": "chat", None: None}
    monkeypatch.setattr(Adapters, "values", lambda self, name: real(self, other[name]))
    assert checks_of(package, tiny_checkpoint, adapters, "q8") == {"adapter chat": False, "adapter code": False}


def test_locate_sees_the_graph_without_adapters_and_verify_asks_for_them(
    package: Path, tiny_checkpoint: Path, adapters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(package), "--reference", str(tiny_checkpoint), "--variant", "q8"]
    assert cli.main([*command, "--locate"]) == 0
    capsys.readouterr()
    assert cli.main(command) == 2
    assert "--lora-inputs: the package takes chat, code; give --lora-inputs DIR=NAME" in capsys.readouterr().err
    assert cli.main([*command, "--lora-inputs", adapters[0], "--lora-inputs", f"{adapters[0]}=code"]) == 2
    assert "--lora-inputs: code has other files than were exported" in capsys.readouterr().err
    assert cli.main(["build", str(package)]) == 2
    assert "takes chat, code at run time, which no engine does" in capsys.readouterr().err
    assert cli.main(["inspect", str(package), "--json"]) == 0
    assert "adapters/chat.onnx_adapter" in json.loads(capsys.readouterr().out)["files"]
