"""The README and the guides: their commands run, their verbs and flags exist, their links lead somewhere.

A block of shell or Python is run in a scratch folder, page by page in the order of the site, unless a comment before it
says why not: `<!-- not run: GPU -->`. Those are listed as skipped.
"""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import olmo2_export.cli
import runtimes.cli
from olmo2_export.catalog import VARIANTS, VariantRow
from runtimes.errors import UsageError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

OTHER_TOOLS = {
    "--apply_chat_template",
    "--extra-index-url",
    "--help",
    "--local-dir",
    "--model",
    "--model_args",
    "--platform",
    "--target",
    "--tasks",
    "--weight-format",
}
"""flags in the docs of pip, docker, hf, lm-eval; --help is everybody's"""

BENCH = "python -m olmo2_export.bench"
EXPORT = "olmo2-export"
RUN = "olmo2-run"


@dataclass(frozen=True)
class Block:
    """Code in a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    """why it is not run; None: it is"""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The arguments of each command, continued lines joined, comments left out."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def pages() -> list[Path]:
    """The README, then the guides in the order of the site."""
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(encoding="utf-8"), re.M | re.S)
    names = [line for tree in trees for line in tree.split() if re.fullmatch(r"[a-z][a-z0-9-]*", line)]
    return [ROOT / "README.md", *(DOCS / f"{name}.md" for name in names)]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    comment: str | None = None
    inside: tuple[str, str, int, list[str]] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if inside is not None:
            fence, language, start, text = inside
            if line.strip() == fence:
                found.append(Block(name(path), start, language, "\n".join(text), comment))
                inside, comment = None, None
            else:
                text.append(line)
        elif opening := re.match(r"(`{3,})(.*)", line):
            inside = opening[1], opening[2].strip(), number, []
        elif reason := re.fullmatch(r"<!-- not run: (.+) -->", line):
            comment = reason[1]
        elif line.strip():
            assert comment is None, f"{name(path)}:{number}: a comment 'not run' belongs right before a block"
    assert inside is None, f"{name(path)}: a block that does not end"
    return found


def code() -> list[Block]:
    return [block for page in pages() for block in blocks(page) if block.language in ("sh", "python")]


def prose(path: Path) -> str:
    """A page without what is another language: blocks within blocks."""
    return re.sub(r"^````.*?^````", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def program(words: list[str]) -> tuple[str, list[str]]:
    """Tell a command's program from its arguments."""
    if words[:3] == BENCH.split():
        return BENCH, words[3:]
    return words[0], words[1:]


def pipe(words: list[str]) -> tuple[str, list[str], Path | None]:
    """Tell what `printf TEXT | command > file` gives to a command from its words and from where its output goes."""
    given, out = "", None
    if words[0] == "printf" and words[2] == "|":
        given, words = words[1].replace("\\n", "\n"), words[3:]
    if ">" in words[-2:]:
        words, out = words[:-2], Path(words[-1])
    return given, words, out


# What runs


@dataclass
class Scratch:
    """The folder in which the commands run, and which of them did: none runs twice."""

    folder: Path
    done: set[tuple[str, ...]] = field(default_factory=set)

    def run(self, block: Block, capsys: pytest.CaptureFixture[str]) -> None:
        """Run a block of commands that has no reason against it."""
        for words in block.commands():
            if tuple(words) in self.done:
                continue
            given, command, out = pipe(words)
            called, arguments = program(command)
            mains = {EXPORT: olmo2_export.cli.main, RUN: runtimes.cli.main}
            assert called in mains, f"{block}: {called} cannot be run here; mark the block <!-- not run: why -->"
            capsys.readouterr()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
                exit_code = mains[called](arguments)
            said = capsys.readouterr()
            if out is not None:
                out.write_text(said.out, encoding="utf-8")
            assert exit_code == 0, f"{block}: {shlex.join(words)}: exit code {exit_code}\n{said.err[-2000:]}"
            assert said.out.strip(), f"{block}: {shlex.join(words)} printed nothing"
            self.done.add(tuple(words))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Scratch:
    return Scratch(tmp_path_factory.mktemp("docs"))


RUNNABLE = [page for page in pages() if any(block.reason is None for block in code() if block.page == name(page))]


@pytest.mark.usefixtures("traces", "remembered", "little_text", "short_rows")
@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_the_commands_and_the_python_of_a_page_run(
    page: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scratch.folder)
    first = next(block for block in code() if block.language == "sh" and block.reason is None)
    scratch.run(first, capsys)  # makes packages/demo; a page may be run alone
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "sh":
            scratch.run(block, capsys)
        elif block.language == "python":
            exec(compile(f"{block.line * chr(10)}{block.text}", page, "exec"), names)


@pytest.mark.parametrize("block", [block for block in code() if block.reason is not None], ids=str)
def test_what_is_not_run_says_why(block: Block) -> None:
    """Its verbs and flags are checked below."""
    pytest.skip(f"{block.reason}: {block.text.splitlines()[0].split('  ')[0]}")


# What is named


def bench_help(arguments: list[str]) -> None:
    import olmo2_export.bench.cli

    olmo2_export.bench.cli.parse_args(arguments)


PARSERS: dict[str, Callable[[list[str]], object]] = {
    EXPORT: olmo2_export.cli.parse_args,
    RUN: runtimes.cli.parse_args,
    BENCH: bench_help,
}


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def read(called: str, *verb: str) -> str:
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            PARSERS[called]([*verb, "--help"])
        return capsys.readouterr().out

    return read


def verbs(text: str) -> list[str]:
    """The verbs in a program's help."""
    return re.findall(r"^    ([a-z0-9-]+)(?: |$)", text, re.M)  # a long one has a line to itself


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text))


@pytest.mark.parametrize("block", [block for block in code() if block.language == "sh"], ids=str)
def test_every_command_is_one_that_there_is(block: Block) -> None:
    for words in block.commands():
        called, arguments = program(words)
        if called in PARSERS:
            try:
                PARSERS[called](arguments)
            except (UsageError, SystemExit) as error:
                pytest.fail(f"{block}: {shlex.join(words)}: {error}")


def test_every_flag_in_the_docs_exists(help_of: Callable[..., str]) -> None:
    known = set(OTHER_TOOLS)
    for called in PARSERS:
        for verb in verbs(help_of(called)):
            known |= flags(help_of(called, verb))
    wrong = {name(page): found for page in pages() if (found := flags(prose(page)) - known)}
    assert not wrong, f"no verb takes them: {wrong}"


@pytest.mark.parametrize("called", [EXPORT, RUN])
def test_every_verb_and_every_flag_is_in_the_docs(called: str, help_of: Callable[..., str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (DOCS / "commands.md").read_text("utf-8"), re.M | re.S))
    for verb in verbs(help_of(called)):
        assert f"`{called} {verb} " in readme, f"README.md has no line for {called} {verb}"
        assert verb in sections, f"docs/commands.md has no section for {called} {verb}"
        usage = next(re.finditer(r"```text\n(.*?)```", sections[verb], re.S))[1]
        assert usage.startswith(f"{called} {verb} "), usage
        declared = set(re.findall(r"^  (--[a-z][a-z0-9-]*)", help_of(called, verb), re.M))  # not those in its words
        assert flags(usage) == declared - {"--debug"}, f"docs/commands.md, {verb}"


def without_a_row(variants: Iterable[VariantRow]) -> set[str]:
    """Variants that no table of the guides explains."""
    rows = re.findall(r"^\| `(\w+)`", (DOCS / "variants.md").read_text(encoding="utf-8"), re.M)
    precisions = re.findall(r"^\| (\w+)(?:, (\w+))? \|", (DOCS / "gpu.md").read_text(encoding="utf-8"), re.M)
    explained = {*rows, "trt_fp32", *(f"trt_{name}" for pair in precisions for name in pair)}
    return {row.name for row in variants} - explained


def test_every_variant_has_its_row() -> None:
    assert without_a_row(VARIANTS) == set()
    made_up = [dataclasses.replace(row, name=f"{row.name}x") for row in VARIANTS]
    assert without_a_row([*VARIANTS, *made_up]) == {row.name for row in made_up}


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in pages():
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", prose(page), re.M))
        assert named <= targets, f"{name(page)}: make {named - targets}"


def test_ci_runs_the_readmes_test_command() -> None:
    *_, command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split("\n")[:-1]
    documented = [shlex.join(words) for block in blocks(ROOT / "README.md") for words in block.commands()]
    assert command in documented


# Where links lead


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^(`{3,}).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        found = (page.parent / file).resolve() if file else page
        assert found.is_file(), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(found), f"{name(page)}: {target}"


def test_pictures_have_words() -> None:
    for page in pages():
        for words in re.findall(r"!\[([^\]]*)\]\(", page.read_text(encoding="utf-8")):
            assert len(words) > 20, f"{name(page)}: a picture's text is {words!r}"


def test_a_page_that_is_not_in_the_site_is_found() -> None:
    assert {page.name for page in DOCS.glob("*.md")} == {page.name for page in pages()[1:]} | {"index.md"}
