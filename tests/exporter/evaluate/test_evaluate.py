"""Perplexity and KL divergence are those of independent computations, and a text of any kind and size is read."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from lm_eval.utils import get_rolling_token_windows
from support.rebuilt_packages import with_trt_graph

from olmo2_export import cli
from olmo2_export.evaluate.evaluate import evaluate, token_text
from olmo2_export.evaluate.models import logit_pieces, open_package_model, open_torch_model
from olmo2_export.evaluate.text import HELDOUT, TokenText
from olmo2_export.measure.error_bars import BLOCK, LEAST, mean, perplexity, perplexity_change
from olmo2_export.package.export import export
from olmo2_export.package.trt_variants import TrtOptions
from olmo2_export.weights.checkpoint import open_checkpoint
from olmo2_export.weights.hub import DEMO
from runtimes.errors import InputError, PackageError, UsageError
from runtimes.text.plain_text import read_text
from runtimes.text.tokenizer import Tokenizer

TOKENS = 700


@pytest.fixture(scope="module")
def tokenizer(demo_package: Path) -> Tokenizer:
    return Tokenizer.from_package(demo_package)


def heldout_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    return tokenizer.encode(HELDOUT.read_text(encoding="utf-8")[: 8 * count])[:count]


def ids_file(path: Path, ids: object) -> Path:
    np.save(path, np.array(ids))
    return path


def test_perplexity_is_that_of_transformers_own_loss(demo_package: Path, tokenizer: Tokenizer) -> None:
    """Windows of 256, through transformers with labels, one by one."""
    folder = open_checkpoint(DEMO).folder
    model = transformers.Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [0, *heldout_ids(tokenizer, 512)]  # 0: bos
    total = 0.0
    with torch.inference_mode():
        for start in (0, 256):
            window = torch.tensor([ids[start : start + 257]])
            total += 256 * float(model(window, labels=window).loss)
    with open_package_model(demo_package, variant="fp32") as tested:
        found = evaluate(tested, token_text(demo_package, HELDOUT, most=512), context=256, progress=False)
    assert (found.tokens, found.windows, found.prefix) == (512, 2, 0)
    assert found.perplexity.value == pytest.approx(np.exp(total / 512), rel=1e-6)
    assert found.losses.shape == (512,)
    assert found.losses.dtype == np.float64


def test_pytorch_whole_and_by_layers_and_the_package_agree(demo_package: Path) -> None:
    """With a stride, so that each window begins with tokens that are not scored."""
    tokens = token_text(demo_package, HELDOUT, most=TOKENS)
    checkpoint = open_checkpoint(DEMO)
    with (
        open_package_model(demo_package) as tested,
        open_torch_model(checkpoint) as whole,
        open_torch_model(checkpoint, low_memory=True) as layered,
    ):
        found = evaluate(tested, tokens, references=[whole, layered], context=200, stride=150, progress=False)
    assert (found.tokens, found.windows) == (TOKENS, 5)  # 200 + 3 * 150 + 50
    for comparison in found.comparisons:
        assert comparison.perplexity.value == pytest.approx(found.perplexity.value, rel=1e-6)
        assert comparison.kl.value < 1e-10
        assert comparison.kl_max < 1e-8
        assert comparison.top1 == 1.0
        assert abs(comparison.change.value) < 1e-6
        np.testing.assert_allclose(comparison.losses, found.losses, atol=2e-4)
        assert comparison.kls.shape == (TOKENS,)


def test_a_longer_context_predicts_better(demo_package: Path) -> None:
    tokens = token_text(demo_package, HELDOUT, most=TOKENS)
    with open_package_model(demo_package) as tested:
        short = evaluate(tested, tokens, context=16, progress=False)
        strided = evaluate(tested, tokens, context=16, stride=4, progress=False)
        long = evaluate(tested, tokens, context=256, progress=False)
    assert long.perplexity.value < strided.perplexity.value < short.perplexity.value
    assert short.tokens == strided.tokens == long.tokens == TOKENS


def test_kl_and_change_of_another_model(demo_package: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Weights made worse: numbers against those of a direct computation in float64."""
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(open_checkpoint(DEMO).folder, tmp_path / "other", ignore=shutil.ignore_patterns("*.txt"))
    weights = load_file(other / "model.safetensors")
    name = "model.layers.3.post_feedforward_layernorm.weight"
    save_file(weights | {name: weights[name] * 1.5}, other / "model.safetensors")
    tokens = token_text(demo_package, HELDOUT, most=600)
    with open_package_model(demo_package) as tested, open_torch_model(open_checkpoint(str(other))) as reference:
        found = evaluate(tested, tokens, references=[reference], context=600, progress=False)

    ids = torch.tensor([[0, *heldout_ids(tokenizer, 600)]])
    logs = []
    for folder in (other, open_checkpoint(DEMO).folder):
        model = transformers.Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            logs.append(model(ids[:, :-1]).logits[0].double().log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).numpy()
    losses = [-x.gather(1, ids[0, 1:, None])[:, 0].numpy() for x in logs]
    (comparison,) = found.comparisons
    assert kl.mean() > 1e-4
    assert comparison.kl.value == pytest.approx(kl.mean(), rel=1e-3)
    assert comparison.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-2)
    assert comparison.kl_max == pytest.approx(kl.max(), rel=1e-2)
    assert comparison.top1 == pytest.approx(float((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean()), abs=2e-3)
    wanted = np.exp(losses[1].mean()) / np.exp(losses[0].mean()) - 1
    assert comparison.change.value == pytest.approx(wanted, rel=1e-3)
    assert comparison.change.low is not None
    assert comparison.change.high is not None
    assert comparison.change.low <= comparison.change.value <= comparison.change.high


def test_standard_error_is_that_of_block_means() -> None:
    """Equal blocks: the textbook's standard deviation of their means; and tokens that are alike are no evidence."""
    random = np.random.default_rng(0)
    values = random.normal(3, 1, 40 * 16)
    means = values.reshape(40, 16).mean(1)
    found = mean(values, 16)
    assert found.value == pytest.approx(values.mean())
    assert found.se == pytest.approx(means.std(ddof=1) / np.sqrt(40), rel=1e-12)
    repeated = np.repeat(random.normal(3, 1, 40), 16)
    by_tokens = repeated.std(ddof=1) / np.sqrt(len(repeated))
    se = mean(repeated, 16).se
    assert se is not None
    assert se / by_tokens == pytest.approx(4, rel=0.02)  # sqrt(16)
    assert perplexity(values, 16).value == pytest.approx(np.exp(values.mean()))
    assert perplexity(values, 16).se == pytest.approx(np.exp(values.mean()) * means.std(ddof=1) / np.sqrt(40))
    assert mean(values[:16], 16).se is None
    assert perplexity(np.full(4, 1e9)).value == pytest.approx(np.exp(700.0))


def test_change_of_perplexity_is_paired() -> None:
    """Losses that vary alike: their difference is known far better than either."""
    random = np.random.default_rng(1)
    reference = np.repeat(random.normal(3, 1, 60), 16) + random.normal(0, 0.1, 960)
    tested = reference + random.normal(0.01, 0.02, 960)
    found = perplexity_change(tested, reference, 16)
    differences = (tested - reference).reshape(60, 16).mean(1)
    expected = np.exp(differences.mean()) * differences.std(ddof=1) / np.sqrt(60)
    assert found.value == pytest.approx(np.expm1((tested - reference).mean()))
    assert found.se == pytest.approx(expected, rel=0.05)
    assert found.low == pytest.approx(found.value - 1.96 * expected, rel=0.1)
    assert found.high == pytest.approx(found.value + 1.96 * expected, rel=0.1)
    alone = perplexity(tested, 16).se
    assert alone is not None
    assert found.se is not None
    assert found.se < alone / perplexity(tested, 16).value / 50
    assert perplexity_change(reference, reference, 16).se == 0
    assert perplexity_change(tested[:16], reference[:16], 16).low is None


@pytest.mark.parametrize(("context", "stride"), [(4, 4), (4, 2), (7, 1), (64, 64), (5, 3)])
@pytest.mark.parametrize("count", [1, 4, 5, 8, 41])
def test_windows_are_those_of_lm_eval(tmp_path: Path, context: int, stride: int, count: int) -> None:
    ids = list(range(10, 10 + count))
    text = TokenText(ids_file(tmp_path / "ids.npy", ids), None, 3)
    wanted = list(get_rolling_token_windows(ids, 3, context, context - stride + 1))
    found = [(w.ids.tolist(), w.targets.tolist()) for w in text.windows(context, stride)]
    # lm-eval's windows behind the first always have `context` ids; on a short text they begin with what there is
    assert [targets for _, targets in found] == [targets for _, targets in wanted]
    for (own, targets), (theirs, _) in zip(found, wanted, strict=True):
        assert own[-len(targets) :] == ([3, *ids])[ids.index(targets[0]) : ids.index(targets[-1]) + 1]
        assert len(own) == min(context, ids.index(targets[-1]) + 1)
        assert own == theirs or len(theirs) < len(own)
    assert all(len(a[0]) <= len(b[0]) for a, b in pairwise(found))


def test_pieces_have_the_ids_of_the_whole_text(tokenizer: Tokenizer) -> None:
    odd = "  \n\n a\r\n\r\nb   c\t\t\n d 12345 'll it's\u00e9\u4e2d\u6587 \U0001f600\u200d  \n"
    text = odd * 3 + HELDOUT.read_text(encoding="utf-8")[:6000] + odd + "x" * 500 + " \n" * 90 + odd
    whole = tokenizer.encode(text)
    for size in (1, 7, 64, 1000):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        joined = list(tokenizer.encode_pieces(pieces, piece_length=200))
        assert len(joined) > 3
        assert [i for ids in joined for i in ids] == whole


def test_lines_of_windows_are_scored_as_they_are_and_said(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "text.txt"
    for content, warnings in (("one\ntwo\n", 0), ("one\r\ntwo\r\n", 1), ("\ufeffone\r\ntwo\r\n", 1)):
        path.write_bytes(content.encode())
        caplog.clear()
        text = TokenText(path, tokenizer, 0)
        assert text.count(4096) == len(tokenizer.encode(content.removeprefix("\ufeff")))
        assert len(caplog.messages) == warnings
    assert "lines end with CR LF" in caplog.messages[0]


def test_text_edge_cases(demo_package: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"")
    with open_package_model(demo_package) as tested:
        with pytest.raises(InputError, match="empty text"):
            evaluate(tested, token_text(demo_package, path), progress=False)
        path.write_text("And")  # one token, behind bos
        one = evaluate(tested, token_text(demo_package, path), progress=False)
        assert (one.tokens, one.windows, one.perplexity.se) == (1, 1, None)
        path.write_bytes(b"And it\r\ncame to\r\n")
        crlf = evaluate(tested, token_text(demo_package, path), progress=False)
        assert crlf.tokens == len(tokenizer.encode("And it\r\ncame to\r\n"))
        assert crlf.tokens > len(tokenizer.encode("And it\ncame to\n")) - 1
        assert crlf.context == 1024
        alone = TokenText(ids_file(tmp_path / "one.npy", [5]), None, None)
        with pytest.raises(InputError, match="nothing to score"):
            evaluate(tested, alone, progress=False)
        foreign = TokenText(ids_file(tmp_path / "big.npy", [5, 4096]), None, None)
        with pytest.raises(InputError, match="token id 4096, the vocabulary has 0 to 4095"):
            evaluate(tested, foreign, progress=False)
        for options, said in (({"context": 1025}, "1 to 1024"), ({"context": 8, "stride": 9}, "1 to 8")):
            with pytest.raises(UsageError, match=said):
                evaluate(tested, token_text(demo_package, path), progress=False, **options)
    path.write_bytes(b"x" * 70_000 + "\u00e9".encode()[:1] + b"abc")
    with pytest.raises(InputError, match="byte 70000 is not UTF-8"):
        list(read_text(path))
    path.write_bytes(b"abc" + "\u00e9".encode()[:1])
    with pytest.raises(InputError, match="byte 3 is not UTF-8"):
        list(read_text(path))
    path.write_bytes(b"\xef\xbb\xbfAnd " + "\u00e9".encode() * 40_000)
    assert "".join(read_text(path)) == "And " + "\u00e9" * 40_000
    with pytest.raises(InputError, match="no such file"):
        list(read_text(tmp_path / "absent.txt"))
    for name, array in (("floats", [0.5]), ("matrix", [[1]])):
        with pytest.raises(InputError, match="expected integers"):
            list(TokenText(ids_file(tmp_path / f"{name}.npy", array), None, None).pieces())
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match="not an array of token ids"):
        list(TokenText(tmp_path / "bad.npy", None, None).pieces())


def resident() -> int:
    """The memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.alone
def test_a_long_text_is_read_in_little_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(HELDOUT.read_bytes() * 20)  # 3.9 MB
    before = highest = resident()
    tokens = 0
    for number, window in enumerate(TokenText(path, tokenizer, 0).windows(256, 256)):
        tokens += len(window.targets)
        if number % 64 == 0:
            highest = max(highest, resident())
    assert tokens > 700_000
    assert highest - before < 100e6  # 10 MB encoded as a whole take over a gigabyte


def test_logits_of_a_large_vocabulary_stay_small() -> None:
    assert logit_pieces(100_352) * 100_352 * 8 < 40e6
    assert logit_pieces(131) == 256


def test_the_command_line(
    demo_package: Path, tiny_package: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(HELDOUT.read_text(encoding="utf-8")[:3000])
    options = ["--text", str(text), "--context", "64", "--stride", "32", "--max-tokens", "300"]
    package = ["evaluate", str(demo_package), "--variant", "fp32", "--backend", "ort", "--device", "cpu"]
    package += ["--kv-cache", "float32"]
    assert cli.main([*package, "--decode-graph", "--reference", "demo", *options]) == 0
    printed = capsys.readouterr()
    assert "evaluating fp32" in printed.err  # the progress bar
    document = json.loads(printed.out.splitlines()[-1])
    assert (document["tokens"], document["context_tokens"], document["stride_tokens"]) == (300, 64, 32)
    assert document["against"]["PyTorch float32"]["kl_mean_nats"] < 1e-10
    assert document["peak_memory_bytes"] > 1e8
    assert "the same likeliest token at 100.00%" in printed.out

    assert cli.main(["evaluate", "demo", "--pytorch", "--low-memory", *options]) == 0
    other = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert other["perplexity"] == pytest.approx(document["perplexity"], rel=1e-6)
    assert other["perplexity_se"] == pytest.approx(document["perplexity_se"], rel=1e-4)

    # Random weights and no tokenizer: token ids instead of text.
    ids = ids_file(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 131, 200))
    assert cli.main(["evaluate", str(tiny_package), "--reference", str(tiny_checkpoint), "--text", str(ids)]) == 0
    tiny = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (tiny["tokens"], tiny["context_tokens"], tiny["prefix_token_id"]) == (199, 256, None)
    assert 0 < tiny["perplexity_se"] < tiny["perplexity"]
    assert tiny["perplexity"] > 131
    assert cli.main(["evaluate", str(tiny_package)]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["PACKAGE", "--pytorch"], "give the checkpoint it was exported from"),
        (["demo", "--variant", "q4"], "--variant: demo is no package"),
        (["demo", "--pytorch", "--reference", "demo"], "--reference: PyTorch runs a checkpoint by itself"),
        (["PACKAGE", "--revision", "main"], "give one with --reference"),
        (["PACKAGE", "--max-tokens", "0"], "expected at least 1"),
        (["PACKAGE", "--variant", "q5"], "no variant 'q5'"),
    ],
)
def test_bad_usage(demo_package: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", *[str(demo_package) if a == "PACKAGE" else a for a in arguments]]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_folder_without_tokenizer(tiny_checkpoint: Path) -> None:
    with pytest.raises(PackageError, match=r"IDS\.npy"):
        token_text(tiny_checkpoint, HELDOUT, is_package=False)


def test_variants_for_gpus_are_evaluated_in_their_rounded_form(tmp_path: Path) -> None:
    demo = open_checkpoint("demo")
    export(demo, tmp_path / "package", variants=["fp32", "bf16"])
    with_trt_graph(tmp_path / "package", tmp_path / "trt", TrtOptions("bf16", 300))
    found = {}
    for package, variant in (("package", "fp32"), ("package", "bf16"), ("trt", "trt_bf16")):
        with open_package_model(tmp_path / package, variant=variant) as tested:
            text = token_text(tmp_path / package, HELDOUT, most=300)
            found[variant] = evaluate(tested, text, context=256, progress=False)
    assert found["bf16"].name == "bf16, rounded as on its device"
    exact = found["fp32"].perplexity.value
    for name in ("bf16", "trt_bf16"):
        change = found[name].perplexity.value / exact - 1
        assert 1e-6 < abs(change) < 5e-3, (name, change)  # it is rounded, and no more than that


def test_a_short_text_has_as_many_blocks() -> None:
    """Two blocks, one of them cut short, say next to nothing about the spread."""
    values = np.random.default_rng(0).exponential(size=300)
    assert mean(values) == mean(values, block=300 // LEAST)
    assert mean(np.tile(values, 20)) == mean(np.tile(values, 20), block=BLOCK)
    assert mean(values[:1]).se is None
