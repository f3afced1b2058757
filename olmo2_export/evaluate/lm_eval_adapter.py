"""lm-eval (EleutherAI's harness) on a package: `olmo2-export` is the name of the model.

    python -m olmo2_export.evaluate.lm_eval_adapter run --model olmo2-export --model_args package=DIR --tasks piqa

which is lm-eval's own command line behind an import of this file: lm-eval 0.4 finds models of others only once they are
imported. In Python the import does the same for `lm_eval.simple_evaluate(model="olmo2-export", model_args={...})`.

| lm-eval asks           | computed as                                                                                |
|------------------------|--------------------------------------------------------------------------------------------|
| loglikelihood          | context and continuation in one row; sum of log p over the continuation, and is it greedy  |
| loglikelihood_rolling  | windows of max_length, each token once, the first behind bos (or eos); one sum per document |
| generate_until         | greedy, or drawn if the task says do_sample; stop strings; the context cut on the left      |
| apply_chat_template    | the package's own template; its special tokens are those, the same text in a task is text   |

Requests are put in the order of their tokens, so that one keeps what it has in common with the one before it in the KV
cache: the choices of a question compute the question once. With batch_size above 1 that many rows run together instead.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped]
from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
from lm_eval.api.registry import register_model  # type: ignore[import-untyped]
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs  # type: ignore[import-untyped]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-untyped]
from tqdm import tqdm

from runtimes import Backend, Device, open_runner
from runtimes.chat.template import ChatTemplate
from runtimes.command import expanded, run_command
from runtimes.errors import ContextLengthError, InputError, UsageError
from runtimes.generation.generate import generate
from runtimes.ort.devices import available_providers
from runtimes.package import open_package
from runtimes.runners.runner import Logits, Runner, common_prefix
from runtimes.targets import find_target
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

_PIECE_LOGITS = 1 << 24  # numbers of logits that one call may return: 64 MB
_CHAT, _BEHIND = "\U000f0002", "\U000f0003"
"""what a chat begins with, and what stands behind its last token; lm-eval appends to it, and gives it back as text"""
_PROBE = "\u241e a probe \u241e"
_SAMPLING = {"do_sample", "until", "max_gen_toks", "temperature", "top_k", "top_p"}


@register_model("olmo2-export", "olmo2_export")
class PackageLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no annotations
    """A package as lm-eval's model. Text is only text: `<|endoftext|>` in a task is not the special token."""

    def __init__(
        self,
        package: str | Path,
        variant: str | None = None,
        backend: Backend = "ort",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        """Open the package.

        Args:
            package: the folder.
            variant, backend, threads: as `runtimes.open_runner`.
            device: cpu, cuda (or cuda:0) or nv-rtx, as lm-eval's --device gives it; None: the backend's default.
            batch_size: rows that are scored together; 1, the default, reuses what requests have in common instead, and
                is what `auto` means.
            max_batch_size: lm-eval gives it; `auto` does not need it.
            max_length: tokens of context; None: what the package holds.
            max_gen_toks: new tokens where a task does not say.
            seed: of tasks that sample.

        Raises:
            UsageError: a size out of range.
            Olmo2ExportError: as `open_runner` and `Tokenizer.from_package`.
        """
        super().__init__()
        del max_batch_size
        rows = 1 if str(batch_size).startswith("auto") else int(batch_size)
        if rows < 1:
            raise UsageError(f"batch_size {batch_size}: expected at least 1, or auto")
        where = "cuda" if device is not None and device.startswith("cuda") else device
        if (
            where == "cuda"
            and not find_target(backend).needs_engine
            and "CUDAExecutionProvider" not in available_providers()
        ):
            where = None  # lm-eval's command line asks for cuda where nobody does
            logging.getLogger(__name__).warning("device %s: this onnxruntime has no CUDA; running on the CPU", device)
        opened = open_package(expanded(str(package)))
        opened.check_logits("lm-eval")
        self._tokenizer = Tokenizer.from_package(opened)
        self._package = opened
        self._template_name: str | None = None
        self._runner: Runner = open_runner(
            opened, variant=variant, backend=backend, device=cast("Device | None", where), threads=threads
        )
        capacity = self._runner.max_cache_length
        self.max_length = capacity if max_length is None else int(max_length)
        if not 2 <= self.max_length <= capacity:
            raise UsageError(f"max_length {max_length}: expected 2 to {capacity} tokens, what the package holds")
        self.max_gen_toks = int(max_gen_toks)
        self.batch_size = rows
        self._seed = seed
        self._name = f"olmo2-export {opened.checksum}"
        self.computed_tokens = 0
        """ids that were fed for loglikelihoods; what was found in the cache is not in it"""

    @property
    def eot_token_id(self) -> int:
        """The first id that ends a text, or else the one that begins one."""
        ends = self._tokenizer.eos_token_ids
        if not ends and self._tokenizer.bos_token_id is None:
            raise InputError("the model has neither eos_token_id nor bos_token_id; lm-eval needs one of them")
        return ends[0] if ends else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id in front of a text that has no context: bos, or else the first eos."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests is told apart by."""
        return self._name

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.from_package(self._package)

    @cached_property
    def _chat_ends(self) -> tuple[int, ...]:
        ends = self._template.turn_ends(self._tokenizer, name=self._template_name)
        return tuple(dict.fromkeys([*self._tokenizer.eos_token_ids, *ends]))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose a template of the package, by name or its own choice, and return its source; False: none.

        Raises:
            PackageError: the package has no chat template.
            InputError: none of that name.
        """
        if not chat_template:
            return None
        self._template_name = chat_template if isinstance(chat_template, str) else None
        return self._template.source(self._template_name)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a chat, marked, so that `tok_encode` knows special tokens from text that looks so.

        Args:
            chat_history: messages.
            add_generation_prompt: False: the last message is the answer's beginning, and goes on.

        Raises:
            PackageError: the package has no chat template.
            Olmo2ExportError: as `ChatTemplate.encode`.
        """
        ours, name, template = self._tokenizer, self._template_name, self._template
        if add_generation_prompt:
            text = template.marked_text(ours, chat_history, name=name)
        else:
            *before, begun = chat_history
            probe = [*before, {**begun, "content": _PROBE}]
            text, _, _ = template.marked_text(ours, probe, add_generation_prompt=False, name=name).partition(_PROBE)
            text += template.marked(ours, begun["content"], name=name)
        text = text.replace(_BEHIND, "")
        kept = text.rstrip()  # lm-eval has white space at a context's end scored with what is behind it
        return f"{_CHAT}{kept}{_BEHIND}{text[len(kept) :]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, with what tokenizer.json itself adds unless told not to; of a chat its own."""
        if not string.startswith(_CHAT):
            return self._tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        parts = string.removeprefix(_CHAT).partition(_BEHIND)
        text = parts[0] + self._template.marked(self._tokenizer, parts[2], name=self._template_name)
        return self._template.encode_marked(self._tokenizer, text)

    def tok_decode(self, tokens: Sequence[int], **_: Any) -> str:
        """Return the text of ids, without special tokens."""
        return self._tokenizer.decode(tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole document, in nats."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (string,) in (request.args for request in requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(pair)) for pair in found]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        order = sorted((n for n, (_, targets) in enumerate(rows) if targets), key=lambda n: rows[n])
        with tqdm(total=len(order), desc="loglikelihood", unit="request", disable=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                if self.batch_size == 1:
                    scores = [self._score_alone(*rows[batch[0]])]
                else:
                    scores = self._score_together([rows[n] for n in batch])
                for n, score in zip(batch, scores, strict=True):
                    results[n] = score
                    if requests[n][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[n][0], score)
                bar.update(len(batch))
        return results

    def _row(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Return the ids to feed, cut on the left to the context, and those to predict at the end of them."""
        if len(continuation) > self.max_length:
            raise ContextLengthError(
                f"a continuation of {len(continuation)} tokens, the context holds {self.max_length}; shorten it"
            )
        return (context + continuation)[-(self.max_length + 1) :][:-1], continuation

    def _score_alone(self, ids: list[int], targets: list[int]) -> tuple[float, bool]:
        """Feed what the cache does not hold yet of a row, and score its end."""
        first = len(ids) - len(targets)
        held = self._runner.cached_tokens
        kept = min(first, common_prefix(held[0], ids)) if len(held) == 1 else 0
        if kept:
            self._runner.truncate([kept])
        else:
            self._runner.reset()
        self.computed_tokens += len(ids) - kept
        if kept < first:
            self._runner.prefill([ids[kept:first]])
        total, greedy = 0.0, True
        step = max(1, _PIECE_LOGITS // self._runner.model.vocab_size)
        for start in range(first, len(ids), step):
            (logits,) = self._runner.prefill([ids[start : start + step]], all_positions=True)
            part = _score(logits, targets[start - first : start - first + step])
            total, greedy = total + part[0], greedy and part[1]
        return total, greedy

    def _score_together(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score rows in one batch: their contexts without logits, then their ends with all of them."""
        self._runner.reset()
        firsts = [len(ids) - len(targets) for ids, targets in rows]
        self.computed_tokens += sum(len(ids) for ids, _ in rows)
        if min(firsts) > 0:
            self._runner.prefill([ids[:first] for (ids, _), first in zip(rows, firsts, strict=True)])
            logits = self._runner.prefill(
                [ids[first:] for (ids, _), first in zip(rows, firsts, strict=True)], all_positions=True
            )
        else:
            logits = self._runner.prefill([ids for ids, _ in rows], all_positions=True)
        return [_score(x[-len(targets) :], targets) for x, (_, targets) in zip(logits, rows, strict=True)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop string, the end of the text, or as many tokens as the task says."""
        results = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        samplers: dict[str, Sampler] = {}
        order = sorted(range(len(requests)), key=lambda n: prompts[n])
        for n in tqdm(order, desc="generate_until", unit="request", disable=disable_tqdm):
            context, asked = requests[n].args
            options = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
            if unknown := sorted(options.keys() - _SAMPLING):
                raise UsageError(
                    f"generation option {', '.join(unknown)}: this model has {', '.join(sorted(_SAMPLING))}"
                )
            stop = [s for s in handle_stop_sequences(options.get("until"), eos=None) if s]
            new = int(options["max_gen_toks"])
            room = self.max_length - new
            if room < 1:
                raise UsageError(f"max_gen_toks {new}: the context holds {self.max_length} tokens; ask for fewer")
            key = repr([options.get(name) for name in ("temperature", "top_k", "top_p")])
            if key not in samplers:
                samplers[key] = Sampler(
                    temperature=float(options.get("temperature") or 0.0),
                    top_k=int(options.get("top_k") or 0),
                    top_p=float(options.get("top_p") or 1.0),
                    seed=self._seed,
                )
            results[n] = generate(
                self._runner,
                self._tokenizer,
                prompts[n][-room:],
                sampler=samplers[key],
                max_new_tokens=new,
                stop=stop,
                eos_token_ids=self._chat_ends if context.startswith(_CHAT) else None,
            ).text
            self.cache_hook.add_partial("generate_until", (context, asked), results[n])
        return results


def _score(logits: Logits, targets: Sequence[int]) -> tuple[float, bool]:
    """Return the sum of log p of ids and whether each is the likeliest: logits [n, V], targets [n]."""
    x = logits.astype(np.float64)
    wanted = np.asarray(targets, np.int64)
    top = x.max(axis=-1)
    chosen = np.take_along_axis(x, wanted[:, None], axis=-1)[:, 0]
    total = np.log(np.exp(x - top[:, None]).sum(axis=-1)) + top
    return float((chosen - total).sum()), bool((x.argmax(axis=-1) == wanted).all())


def main() -> int:
    """Run lm-eval's command line, in which this model is known; return the exit code."""
    return run_command(
        "lm_eval_adapter", cli_evaluate, debug="DEBUG" in sys.argv, debug_option="--verbosity DEBUG", extra="eval"
    )


if __name__ == "__main__":
    sys.exit(main())
