"""report: one page that needs nothing else, with every figure that it promises and the numbers of parity.json."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olmo2_export import cli
from olmo2_export.config import ModelConfig
from olmo2_export.measure.quality import quality_tokens
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.report import data as report_data
from olmo2_export.report import plots
from olmo2_export.report.bench_file import read_bench
from olmo2_export.report.logit_samples import sample_logits
from olmo2_export.report.parts import FIGURES, NONE, figures
from olmo2_export.truth.torch_layers import reference_logits
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import PackageError, UsageError

HOSTILE = "<script>alert(1)<|x`$a_b$"
VOID = {"meta", "br", "img", "link", "hr", "input", "path", "use", "rect", "image", "line", "circle"}
POINT = {
    "context_tokens": 128,
    "batch_size": 1,
    "ttft_s": 0.5,
    "itl_p50_s": 0.0334,
    "itl_p99_s": 0.04,
    "decode_tokens_per_s": 29.7,
    "prefill_tokens_per_s": 274.0,
    "bytes_per_token": 850e6,
    "bandwidth_share": 0.81,
}
RATIO = {
    "peer": "llama.cpp <Q4>",
    "ours": "ours fp32",
    "like_for_like": True,
    "metric": "decode_tokens_per_s",
    "context_tokens": 128,
    "batch_size": 1,
    "ratio_median": 1.5712,
    "ratio_low": 1.38,
    "ratio_high": 1.834,
}
BENCH: dict[str, Any] = {
    "machine": {
        "cpu": "A CPU",
        "cores": 2,
        "memory_bandwidth_bytes_per_s": 31e9,
        "memory_bandwidth_from": "measured: a copy of 512 MB by PyTorch",
    },
    "package": "packages/tiny",
    "contenders": {
        "ours fp32": {
            "load_s": 1.03,
            "peak_memory_bytes": 1.33e9,
            "disk_bytes": 9e8,
            "points": [POINT, POINT | {"context_tokens": 3000, "decode_tokens_per_s": 16.9}],
        },
        "llama.cpp <Q4>": {
            "load_s": 0.7,
            "peak_memory_bytes": 1.7e9,
            "disk_bytes": 9e8,
            "points": [POINT],
            "note": "a Llama with <made-up> weights",
        },
    },
    "ratios": [
        RATIO,
        RATIO | {"context_tokens": 3000, "ratio_median": 0.98, "ratio_low": 0.9, "ratio_high": 1.02},
        RATIO | {"metric": "prefill_tokens_per_s", "like_for_like": False},
    ],
    "left_out": ["transformers is left out: it is not installed"],
    "failures": ["optimum-onnx, making its model:\n  no such model type"],
}


class Page(HTMLParser):
    """Checks nesting, and collects what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def package(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a checkpoint with a hostile name; fp32 is verified, q4 and bf16 are not."""
    folder = tmp_path_factory.mktemp("report")
    source = Path(shutil.copytree(tiny_checkpoint, folder / HOSTILE))
    out = folder / "tiny"
    export(open_checkpoint(str(source)), out, variants=["fp32", "q4", "bf16"], options=Options(kv_caches=("float32",)))
    command = ["verify", str(out), "--reference", str(source), "--variant", "fp32", "--longest", "32"]
    assert cli.main(command) == 0
    return out


@pytest.fixture(scope="module")
def written(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report, by the command line."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "bench.json").write_text("a line before\n" + json.dumps(BENCH))
    arguments = ["report", str(package), "--reference", str(package.parent / HOSTILE), "--tokens", "96"]
    assert cli.main([*arguments, "--bench", str(folder / "bench.json"), "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_page_needs_nothing_else(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|@import|url\((?!#)", text)
    page = Page(text)
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        for name in ("href", "src"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (tag, name)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in page.tags if (a.get("href") or "").startswith("#")}  # type: ignore[index]
    assert targets <= set(ids)


def test_every_figure_is_there(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    assert [a["id"] for tag, a in page.tags if tag == "figure"] == [f"figure-{name}" for name in FIGURES]
    assert sum(tag == "svg" for tag, _ in page.tags) == len(FIGURES)
    markdown = (written / "report.md").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f"]({name}.png)" in markdown
        raw = (written / f"{name}.png").read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(raw[16:20], "big") == 720  # pixels wide
        assert len(raw) < 120_000
    assert sorted(p.name for p in written.iterdir()) == sorted(
        ["report.html", "report.md", *(f"{name}.png" for name in FIGURES)]
    )


def test_numbers_of_parity_json(package: Path, written: Path) -> None:
    fp32 = json.loads((package / "parity.json").read_text())["variants"]["fp32"]
    page = Page((written / "report.html").read_text(encoding="utf-8")).text
    markdown = (written / "report.md").read_text(encoding="utf-8")
    for case in fp32["cases"]:
        numbers = (figures(case["max_abs"], ".1e"), figures(case["nmse"], ".1e"), f"{case['error_ratio']:.2f}")
        for number in (*numbers, f"{case['top1']:.1%}", figures(case["kl_mean"], ".1e")):
            assert number in page
            assert number in markdown
    change = fp32["perplexity"]
    assert f"{change['test']:.3f}" in page
    assert f"fp32 on ort: {len(fp32['cases'])} cases" in page
    assert "1 passed, 2 not verified yet" in page
    assert "Not verified yet: q4, bf16. Run: olmo2-export verify" in page
    assert "--variant q4 --variant bf16" in page
    assert "≤ 1e-11" in page  # the gate
    assert "≤ +0.001%" in page  # of perplexity
    command = re.search(r"Run: olmo2-export (.*?--variant q4 --variant bf16)", page)
    assert command is not None
    assert shlex.split(command[1])[:4] == ["verify", str(package), "--reference", str(package.parent / HOSTILE)]


def test_says_which_graph_the_divergence_is_of(package: Path, written: Path) -> None:
    """q4 has a prefill graph, which takes the steps of a report; fp32 and bf16 have one graph."""
    variants = json.loads((package / "manifest.json").read_text())["variants"]
    assert [name for name, variant in variants.items() if variant["prefill"]] == ["q4"]
    page = Page((written / "report.html").read_text(encoding="utf-8")).text
    assert "KL mean and top-1 of q4 are those of the prefill graph" in page
    assert "what is below 1e-16 counts as that. Of q4: of the prefill graph." in page


def test_numbers_of_the_benchmark(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8")).text
    for words in ("29.7 tokens/s", "274.0 tokens/s", "33.4 ms", "1.3 GB", "81%"):
        assert words in page
    assert "memory bandwidth 31.0 GB/s (measured: a copy of 512 MB by PyTorch)." in page
    assert "1,024" not in page  # the context is 256


def test_notes_of_the_benchmark(written: Path) -> None:
    """What was left out or failed, and what stands in for a model, is below the figures."""
    page = Page((written / "report.html").read_text(encoding="utf-8")).text
    notes = (
        "transformers is left out: it is not installed",
        "llama.cpp <Q4>: a Llama with <made-up> weights",
        "FAILED: optimum-onnx, making its model: no such model type",
    )
    places = [page.index(note) for note in ("Per context", *notes, "weights (full colour)")]
    assert places == sorted(places)
    markdown = (written / "report.md").read_text(encoding="utf-8")
    assert "\n\nllama.cpp &lt;Q4&gt;: a Llama with &lt;made-up&gt; weights\n\n" in markdown


def test_ratios_are_a_table_of_pairs(written: Path) -> None:
    lines = (written / "report.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| phase | ours | peer | 128 tokens, batch 1 | 3,000 tokens, batch 1 |")
    assert lines[start + 2 : start + 4] == [
        "| decode | ours fp32 | llama.cpp &lt;Q4&gt; = | 1.57 (1.38 to 1.83) | 0.98 (0.90 to 1.02) |",
        f"| prefill | ours fp32 | llama.cpp &lt;Q4&gt; | 1.57 (1.38 to 1.83) | {NONE} |",
    ]


def test_page_without_ratios_and_notes(tmp_path: Path) -> None:
    (tmp_path / "b").write_text(json.dumps({"contenders": {"x": {"points": []}}, "left_out": None}))
    bench = read_bench(tmp_path / "b")
    assert (bench.ratios, bench.left_out, bench.failures, bench.contenders["x"].note) == ((), (), (), "")


def test_hostile_names_are_words(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;|x`$a_b$" in text
    assert "llama.cpp &lt;Q4&gt;" in text  # in the table and in the figure
    assert HOSTILE in Page(text).text
    markdown = (written / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert r"&lt;script&gt;alert(1)&lt;\|x\`$a\_b$" in markdown


def test_tables_of_markdown_are_tables(written: Path) -> None:
    """A head, a rule with as many columns, and rows with as many."""
    blocks = (written / "report.md").read_text(encoding="utf-8").split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) >= 8
    for head, rule, *rows in tables:
        assert re.fullmatch(r"\|( -{3}:? \|)+", rule)
        for line in (head, *rows):
            assert line.count("|") - line.count(r"\|") == rule.count("|"), line


def test_folders_that_are_no_report_stay(package: Path, written: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["report", str(package), "--reference", str(package.parent / HOSTILE), "--tokens", "32"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("<html>my own</html>")
    assert cli.main([*arguments, "--out", str(tmp_path / "mine")]) == 2
    assert "not empty and not a report (report.html)" in capsys.readouterr().err
    again = Path(shutil.copytree(written, tmp_path / "again"))
    (again / "notes.txt").write_text("mine")
    assert cli.main([*arguments, "--out", str(again)]) == 2
    assert "notes.txt" in capsys.readouterr().err
    (again / "notes.txt").unlink()
    assert cli.main([*arguments, "--variant", "fp32", "--out", str(again)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"report: {again}/report.html")
    page = Page((again / "report.html").read_text(encoding="utf-8"))
    assert "Not measured: give the JSON of olmo2-export bench with --bench" in page.text
    assert not (again / "throughput.png").exists()
    assert sum(tag == "figure" for tag, _ in page.tags) == len(FIGURES) - 2  # nothing fused in fp32 either


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("", "not a benchmark"),
        ("{}", "not a benchmark (KeyError: 'contenders')"),
        ('{"contenders": {"a": {"points": [{"context_tokens": "x"}]}}}', "not a benchmark"),
        ('{"contenders": {"a": {"points": [], "load_s": "fast"}}}', "load_s is 'fast'"),
    ],
)
def test_a_bad_benchmark_is_one_line(
    text: str | None, said: str, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "bench.json").write_text(text)
    arguments = ["report", str(package), "--reference", str(package.parent / HOSTILE), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--bench", str(tmp_path / "bench.json")]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def _bench_with(point: str = "", contender: str = "", document: str = "") -> str:
    return f'{{"contenders": {{"a": {{"points": [{{"context_tokens": 8{point}}}]{contender}}}}}{document}}}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_bench_with(', "context_tokens": Infinity'), "context_tokens is inf"),
        (_bench_with(', "context_tokens": 1e999'), "context_tokens is inf"),
        (_bench_with(', "context_tokens": 0'), "context_tokens is 0"),
        (_bench_with(', "context_tokens": 8.5'), "context_tokens is 8.5"),
        (_bench_with(', "batch_size": -1'), "batch_size is -1"),
        (_bench_with(', "batch_size": 2147483648'), "batch_size is 2147483648"),
        (_bench_with(', "ttft_s": 1e999'), "ttft_s is inf"),
        (_bench_with(', "ttft_s": -0.1'), "ttft_s is -0.1"),
        (_bench_with(', "decode_tokens_per_s": NaN'), "decode_tokens_per_s is nan"),
        (_bench_with(f', "bytes_per_token": 1{"0" * 400}'), "bytes_per_token is 1000"),
        (_bench_with(contender=', "disk_bytes": 1e18'), "disk_bytes is 1e+18"),
        (_bench_with(contender=', "note": 3'), "note is 3"),
        (_bench_with(document=', "machine": {"memory_bandwidth_bytes_per_s": 1e999}'), "bytes_per_s is inf"),
        (_bench_with(document=', "machine": {"memory_bandwidth_bytes_per_s": "inf"}'), "bytes_per_s is 'inf'"),
        (_bench_with(document=', "machine": [1]'), "AttributeError"),
        (_bench_with(document=', "failures": "all"'), "failures is 'all'"),
        (_bench_with(document=', "ratios": [{"ratio": 1}]'), "KeyError"),
        (
            _bench_with(document=f', "ratios": [{json.dumps(RATIO | {"ratio_low": math.inf})}]'),
            "ratio_low is inf",
        ),
    ],
)
def test_a_benchmark_of_impossible_numbers_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "b").write_text(_bench_with())
    read_bench(tmp_path / "b")
    (tmp_path / "b").write_text(text)
    with pytest.raises(UsageError, match=re.escape(said)) as raised:
        read_bench(tmp_path / "b")
    assert "not a benchmark" in str(raised.value)
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


def test_what_is_no_file_or_large_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", (64 << 20) + 1)
    for path, said in (
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "large", "67,108,865 bytes"),
    ):
        with pytest.raises(UsageError, match=f"cannot be read .*{said}"):
            read_bench(path)


def test_benchmark_with_gaps(tmp_path: Path) -> None:
    (tmp_path / "b").write_text(json.dumps({"contenders": {"x": {"points": [{"context_tokens": 8}]}}}))
    bench = read_bench(tmp_path / "b")
    assert math.isnan(bench.contenders["x"].load_s)
    assert math.isnan(bench.contenders["x"].points[0].decode_tokens_per_s)


def test_bad_arguments(
    package: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["report", str(package), "--reference", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    for extra, said in (
        (["--variant", "q3"], "no variant q3; it has"),
        (["--tokens", "1"], "tokens 1"),
        (["--revision", "main"], "only Hub ids have revisions"),
    ):
        assert cli.main([*arguments, *extra]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UsageError):
        report_data.gather(package, open_checkpoint(str(tiny_checkpoint)), tokens=0)


def test_samples_are_of_the_variant(package: Path, tiny_checkpoint: Path) -> None:
    """fp32 is PyTorch's but for rounding, bf16's rounded form is off by what bf16 costs, and q4 by more."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    sequences, _ = quality_tokens(checkpoint, config, length=48, most=96)
    reference = list(reference_logits(checkpoint, config, sequences))
    errors = {}
    for variant in ("fp32", "bf16", "q4"):
        sample = sample_logits(package, variant, sequences, reference)
        assert len(sample.kl) == 96
        assert len(sample.truth) == len(sample.test)
        errors[variant] = float(np.sqrt(np.mean((sample.truth - sample.test) ** 2)))
    assert errors["fp32"] < 1e-5 < errors["bf16"] < errors["q4"] < 1


def test_what_verify_wrote_elsewhere_is_read(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> None:
        raise PackageError("not measured here")

    monkeypatch.setattr(report_data, "sample_logits", nothing)
    checkpoint = open_checkpoint(str(package.parent / HOSTILE))
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    out = (copy / "parity.json").rename(tmp_path / "out.json")
    (bare,) = report_data.gather(copy, checkpoint, variants=["fp32"], tokens=2).variants
    (read,) = report_data.gather(copy, checkpoint, variants=["fp32"], tokens=2, parity=out).variants
    assert bare.parity is None
    assert read.parity == json.loads(out.read_text())["variants"]["fp32"]
    assert read.problem == "not measured here"
    command = ["report", str(copy), "--reference", str(checkpoint.folder), "--out", str(tmp_path / "page")]
    with pytest.raises(UsageError, match=r"--parity .*none.json: expected the file that olmo2-export verify --out"):
        cli.run(cli.parse_args([*command, "--parity", str(tmp_path / "none.json")]))
    with pytest.raises(PackageError, match=f"{package / 'config.json'}: "):
        cli.run(cli.parse_args([*command, "--parity", str(package / "config.json")]))


def test_svg_takes_the_colour_of_the_page() -> None:
    text = plots.svg(plots.perplexity_figure(30.0, [plots.PerplexityRow("a<b", 30.2, 30.1, 30.3)]), "one")
    assert text.startswith("<svg")
    assert "currentColor" in text
    assert plots.INK not in text
    assert "a&lt;b" in text
    assert "<metadata" not in text
    assert "width=" not in text.split(">", 1)[0]


def test_a_variant_has_one_colour() -> None:
    assert plots.colour("q4", 3) == plots.colour("ours q4", 5) == plots.colour("q4@cuda")
    assert len({plots.colour(name) for name in ("fp32", "q4", "q8", "bf16", "trt_int4")}) == 5


@pytest.mark.parametrize("values", [(1e-7, 2e-7, 3e-7), (2e-7, 3e-7), (1e-7,), (1e-9, 5e-2), (0.0,), (math.inf, 2.0)])
def test_error_over_depth_has_numbers(values: tuple[float, ...]) -> None:
    """Also where all errors are within a decade."""
    names = tuple(map(str, range(len(values))))
    figure = plots.depth_figure({"fp32": plots.Depth(names, values, values)})
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert len([tick for tick in ticks if tick.label1.get_text()]) >= 2
    assert all(low <= value <= high for value in values if 0 < value < math.inf)
    if values == (1e-7, 2e-7, 3e-7):
        assert [tick.label1.get_text() for tick in ticks] == ["1e-7", "1e-6"]
