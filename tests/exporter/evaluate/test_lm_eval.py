"""lm-eval runs a package as a model: tasks of local data, and the numbers of lm-eval's own transformers model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.chat import chat_package

from olmo2_export.evaluate import lm_eval_adapter
from olmo2_export.evaluate.evaluate import evaluate, token_text
from olmo2_export.evaluate.lm_eval_adapter import PackageLM
from olmo2_export.evaluate.models import open_package_model
from olmo2_export.weights.checkpoint import open_checkpoint
from olmo2_export.weights.hub import DEMO
from runtimes.errors import ContextLengthError, InputError, PackageError, UsageError
from runtimes.generation.generate import generate
from runtimes.text.sampling import Sampler

# Of lm-eval and datasets, which this project cannot change.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUESTIONS = [
    ("In the beginning God created the heaven and the", [" earth", " gold"], 0),
    ("And the LORD spake unto", [" Pharisee", " Moses"], 1),
    ("The children of", [" Israel", " ink"], 0),
    ("For God so loved the", [" leprosy", " world"], 1),
    ("And it came to", [" bread", " pass"], 1),
]
VERSES = [
    "And the whole earth was of one language, and of one speech.",
    "And they said one to another, Go to, let us make brick, and burn them thoroughly. " * 4,
]
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "local_generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lines = {
        "local_choice": [{"text": t, "choices": c, "label": n} for t, c, n in QUESTIONS],
        "local_rolling": [{"text": verse} for verse in VERSES],
        "local_generate": [{"text": t, "answer": ""} for t, _, _ in QUESTIONS[:3]],
    }
    for name, config in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines[name]))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + config.lstrip())
    return folder


@pytest.fixture(scope="module")
def model(demo_package: Path) -> Iterator[PackageLM]:
    made = PackageLM(demo_package)
    yield made
    made._runner.close()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def simple_evaluate(model: object, folder: Path, **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate as run
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = run(
        model=model, tasks=sorted(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    return found


def transformers_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's own model. Its file imports accelerate, for many GPUs, of which nothing runs here."""
    accelerate, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
    vars(accelerate).update(Accelerator=None, InitProcessGroupKwargs=None, find_executable_batch_size=None)
    vars(utils).update(get_max_memory=None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", accelerate)
        patch.setitem(sys.modules, "accelerate.utils", utils)
        from lm_eval.models.huggingface import HFLM
    folder = open_checkpoint(DEMO).folder
    model = transformers.Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), device="cpu")


def test_a_package_scores_as_transformers_does(
    demo_package: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = simple_evaluate("olmo2-export", tasks, model_args={"package": str(demo_package), "variant": "fp32"})
    theirs = simple_evaluate(transformers_model(monkeypatch), tasks)

    assert ours["results"]["local_choice"]["acc,none"] == theirs["results"]["local_choice"]["acc,none"]
    assert ours["results"]["local_choice"]["acc,none"] >= 0.8
    for metric in ("word_perplexity,none", "byte_perplexity,none"):
        wanted = theirs["results"]["local_rolling"][metric]
        assert ours["results"]["local_rolling"][metric] == pytest.approx(wanted, rel=1e-5)
    for task in TASKS:
        pairs = list(zip(ours["samples"][task], theirs["samples"][task], strict=True))
        assert pairs
        for own, other in pairs:
            if task == "local_generate":
                assert own["resps"] == other["resps"]
                assert 0 < len(own["resps"][0][0]) < 100
            elif task == "local_choice":
                for (a, greedy), (b, other_greedy) in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
                    assert a == pytest.approx(b, abs=2e-4)
                    assert greedy == other_greedy


def test_the_command_line_finds_the_model(
    demo_package: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.tasks import TaskManager

    arguments = ["--model", "olmo2_export", "--model_args", f"package={demo_package},variant=fp32", "--device", "cpu"]
    arguments += ["--tasks", "local_choice", "--include_path", str(tasks), "--batch_size", "3", "--limit", "4"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *arguments])
    only_ours = partialmethod(TaskManager.__init__, include_defaults=False)  # thousands of files that nobody asks for
    monkeypatch.setattr(TaskManager, "__init__", only_ours)
    lm_eval_adapter.cli_evaluate()
    printed = capsys.readouterr().out
    assert "local_choice" in printed
    assert "|acc" in printed.replace(" ", "")


def test_choices_compute_their_question_once(model: PackageLM) -> None:
    question = "And the whole earth was of one language, and of one"
    choices = [" speech", " bread", " people", " house"]
    model._runner.reset()
    before = model.computed_tokens
    together = model.loglikelihood([request(question, c) for c in choices], disable_tqdm=True)
    computed = model.computed_tokens - before
    assert computed < 2 * len(model.tok_encode(question)) + 4 * len(choices)

    alone = []
    for choice in choices:
        model._runner.reset()
        alone += model.loglikelihood([request(question, choice)], disable_tqdm=True)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-4)


def test_a_batch_scores_as_one_row_does(demo_package: Path, model: PackageLM) -> None:
    pairs = [(question, choice) for question, choices, _ in QUESTIONS for choice in choices]
    pairs += [("", " And God said"), ("x", " " + VERSES[1])]
    alone = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    batched = PackageLM(demo_package, batch_size=4)
    together = batched.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-4)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


def test_a_long_document_is_what_evaluate_says(demo_package: Path, tmp_path: Path) -> None:
    """Rolling windows and ours are the same, so both give one number."""
    path = tmp_path / "text.txt"
    path.write_text(VERSES[1])
    short = PackageLM(demo_package, max_length=32)
    (total,) = short.loglikelihood_rolling([request(VERSES[1])], disable_tqdm=True)
    with open_package_model(demo_package) as tested:
        # lm-eval's last window starts right behind what is scored already; a stride of the context leaves that alone
        found = evaluate(tested, token_text(demo_package, path), context=32, progress=False)
    assert found.windows > 1
    assert total == pytest.approx(-float(found.losses.sum()), rel=1e-5)


def test_contexts_are_cut_on_the_left(demo_package: Path) -> None:
    short = PackageLM(demo_package, max_length=24)
    long = ("And God said. " * 40).strip()
    context, continuation = short.tok_encode(long), short.tok_encode(" Let there")
    assert len(continuation) == 2
    (cut,) = short.loglikelihood([request(long, " Let there")], disable_tqdm=True)
    short._runner.reset()
    (same,) = short._loglikelihood_tokens([(None, context[-23:], continuation)], disable_tqdm=True)
    (shorter,) = short._loglikelihood_tokens([(None, context[-22:], continuation)], disable_tqdm=True)
    assert cut == same  # 23 + 2 ids, the last of which is not fed
    assert abs(cut[0] - shorter[0]) > 1e-4
    unfinished = ("And it came to pass that " * 40).strip()  # a finished verse would be followed by the end of the text
    options = {"until": [], "max_gen_toks": 6}
    (text,) = short.generate_until([request(unfinished, options)], disable_tqdm=True)
    ids = short.tok_encode(unfinished)[-18:]
    assert text == generate(short._runner, short._tokenizer, ids, sampler=Sampler(), max_new_tokens=6).text
    assert text
    with pytest.raises(ContextLengthError, match="the context holds 24"):
        short.loglikelihood([request("a", " And God said" * 20)], disable_tqdm=True)


def test_generation_options(model: PackageLM) -> None:
    asked = {"until": [","], "max_gen_toks": 8}
    (greedy,) = model.generate_until([request("In the beginning", asked)], disable_tqdm=True)
    assert "," not in greedy
    hot = asked | {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9}
    drawn = model.generate_until([request("In the beginning", hot)], disable_tqdm=True)
    assert drawn == model.generate_until([request("In the beginning", hot)], disable_tqdm=True)  # the seed is fixed
    assert drawn != [greedy]
    with pytest.raises(UsageError, match="num_beams"):
        model.generate_until([request("a", asked | {"num_beams": 4})], disable_tqdm=True)
    with pytest.raises(UsageError, match="ask for fewer"):
        model.generate_until([request("a", asked | {"max_gen_toks": 4096})], disable_tqdm=True)


@pytest.fixture(scope="module")
def chat_model(demo_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackageLM]:
    made = PackageLM(chat_package(demo_package, tmp_path_factory.mktemp("chat") / "demo"))
    yield made
    made._template.close()
    made._runner.close()


CHATS = [
    ([{"role": "user", "content": "Who made heaven?"}], True),
    ([{"role": "system", "content": "Speak."}, {"role": "user", "content": " What is\nan ocean? \n"}], True),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": ""}], True),
    ([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It was"}], False),
]


@pytest.mark.parametrize(("messages", "asked"), CHATS)
def test_a_chat_has_the_tokens_of_lm_evals_own_model(
    chat_model: PackageLM, messages: list[dict[str, str]], asked: bool
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(open_checkpoint(DEMO).folder)
    theirs.chat_template = chat_model.chat_template(True)
    text = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=asked, continue_final_message=not asked
    )
    encoder = SimpleNamespace(backend="causal", tok_encode=lambda t: theirs.encode(t, add_special_tokens=False))
    chat = chat_model.apply_chat_template(messages, add_generation_prompt=asked)
    assert chat_model.tok_encode(chat) == encoder.tok_encode(text)
    for continuation in (" God", "God said", "\nGod"):
        assert chat_model._encode_pair(chat, continuation) == PackageLM._encode_pair(encoder, text, continuation)


def test_special_text_of_a_task_is_text_in_a_chat_too(chat_model: PackageLM) -> None:
    (eos,) = chat_model._tokenizer.eos_token_ids
    chat = chat_model.apply_chat_template([{"role": "user", "content": "x <|endoftext|> y"}])
    assert chat_model.tok_encode(chat + "<|endoftext|>").count(eos) == 1  # what the template begins with
    assert chat_model.tok_encode("<|endoftext|>").count(eos) == 0


def test_a_chats_answer_is_what_the_model_says_to_its_tokens(chat_model: PackageLM) -> None:
    messages = [{"role": "user", "content": "What is an ocean?"}]
    asked = request(chat_model.apply_chat_template(messages), {"until": [], "max_gen_toks": 9})
    (text,) = chat_model.generate_until([asked], disable_tqdm=True)
    ids = chat_model._template.encode(chat_model._tokenizer, messages)
    runner, tokenizer = chat_model._runner, chat_model._tokenizer
    assert text == generate(runner, tokenizer, ids, sampler=Sampler(), max_new_tokens=9).text != ""


def test_a_template_is_named_or_missed_by_name(chat_model: PackageLM, model: PackageLM) -> None:
    assert chat_model.chat_template(False) is None
    with pytest.raises(InputError, match="no chat template 'tools'; there are default"):
        chat_model.chat_template("tools")
    assert chat_model.chat_template("default")
    with pytest.raises(PackageError, match="no chat template; olmo2-run generate continues a text without one"):
        model.chat_template(True)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_length": 1}, {"max_length": 5000}])
def test_sizes_out_of_range(demo_package: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        PackageLM(demo_package, **options)
    assert PackageLM(demo_package, batch_size="auto", device="cpu").batch_size == 1


def test_wrong_input_is_one_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_eval_adapter, "cli_evaluate", lambda: PackageLM(tmp_path / "nothing"))
    assert lm_eval_adapter.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("lm_eval_adapter: error: ")
    assert error.count("\n") == 1


def test_the_device_that_lm_eval_asks_for_by_itself_may_be_missing(demo_package: Path) -> None:
    """Its command line says cuda where nobody names a device."""
    assert PackageLM(demo_package, device="cuda:0").max_length > 0
