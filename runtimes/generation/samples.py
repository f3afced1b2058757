"""Several texts for one prompt, which is computed once: each in a slot that begins with its keys and values."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from runtimes.errors import InputError
from runtimes.generation.draw import Draw
from runtimes.generation.generate import Generation, encode_prompt, new_token_limit
from runtimes.generation.text_state import TextState
from runtimes.integers import as_integer
from runtimes.runners.runner import check_rows, chosen_adapters
from runtimes.runners.scores import check_logits
from runtimes.runners.slots import Slots
from runtimes.text.logit_rules import LogitRule
from runtimes.text.logprobs import check_top
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

DrawerOf = Callable[[int], tuple[Sampler, Sequence[LogitRule]]]
"""number of a sample, from 0 -> what draws it, of that sample alone"""


class _Sample:
    """One of the texts while it is generated."""

    def __init__(self, draw: Draw, state: TextState, began: float) -> None:
        self.draw, self.state, self.began = draw, state, began
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.times: list[float] = []

    def push(self, token_id: int, limit: int) -> bool:
        """Take a token; tell whether the text goes on."""
        self.times.append(time.perf_counter())
        self.token_ids.append(token_id)
        self.text.append(self.state.push(token_id))
        if self.state.finish_reason is None and len(self.token_ids) == limit:
            self.text.append(self.state.finish())
        return self.state.finish_reason is None

    def result(self, prompt_ids: Sequence[int], reused: int) -> Generation:
        if self.state.finish_reason is None:  # no token was asked for
            self.text.append(self.state.finish())
        reason = self.state.finish_reason
        assert reason is not None
        return Generation(
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            prompt_token_ids=tuple(prompt_ids),
            finish_reason=reason,
            time_to_first_token=self.times[0] - self.began if self.times else None,
            decode_seconds=self.times[-1] - self.times[0] if self.times else 0.0,
            reused_tokens=reused,
            drafted=0,
            accepted=0,
            logprobs=tuple(self.draw.noted),
        )


def generate_samples(
    runner: Slots,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    count: int,
    *,
    drawer: DrawerOf,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    eos_token_ids: Collection[int] | None = None,
    parse_special: bool = False,
    logprobs: int | None = None,
    adapter: str | None = None,
) -> list[Generation]:
    """Generate several continuations of one prompt.

    As many as the runner has slots are generated at once; as one ends, the next begins behind the same prompt. Of an
    exact runner each is, bit for bit, what `generate` gives with the same sampler and rules. Until it is done other
    threads cannot use the runner; what it held is forgotten.

    Args:
        runner: any.
        tokenizer: of the same package.
        prompt: text, or ids.
        count: of texts, at least one.
        drawer: gives each sample's own sampler and rules; with the same seed in all, all are the same text.
        max_new_tokens, stop, eos_token_ids, parse_special, logprobs, adapter: as of `generate`.

    Returns:
        One for each sample, in their order. `reused_tokens` are those of the prompt that another sample has computed.

    Raises:
        InputError, ContextLengthError, UsageError, NumericError: as `generate`.
    """
    began = time.perf_counter()
    check_logits(runner.variant)
    number = as_integer(count)
    if number is None or number < 1:
        raise InputError(f"samples {count!r}: expected an integer of at least 1")
    top = check_top("logprobs", logprobs, runner.model.vocab_size)
    chosen_adapters(adapter, 1, (), getattr(runner, "adapters", ()))
    ids = encode_prompt(tokenizer, prompt, parse_special=parse_special) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise InputError("expected at least one prompt id, found none")
    limit = new_token_limit(runner, len(ids), max_new_tokens)
    (checked,) = check_rows(
        [ids], vocab_size=runner.model.vocab_size, cache_lengths=(), max_cache_length=runner.max_cache_length
    )
    ids = checked.tolist()
    samples = []
    for i in range(number):
        sampler, rules = drawer(i)
        draw = Draw(sampler, rules, top)
        draw.begin(ids)
        samples.append(_Sample(draw, TextState(tokenizer, stop=stop, eos_token_ids=eos_token_ids), began))
    if limit:
        with runner.exclusive:
            _run(runner, ids, samples, limit, adapter)
    return [sample.result(ids, len(ids) if i else 0) for i, sample in enumerate(samples)]


def _run(runner: Slots, prompt_ids: Sequence[int], samples: Sequence[_Sample], limit: int, adapter: str | None) -> None:
    """Generate all samples, each in a slot that holds the prompt."""
    runner.reset()
    slot, logits = runner.admit(prompt_ids) if adapter is None else runner.admit(prompt_ids, adapter)
    taken = [slot]
    try:
        first = logits.copy()  # a rule may change what it is given
        waiting = list(samples)
        running: dict[int, _Sample] = {}

        def begin(slot: int) -> bool:
            """Let the next sample that goes on behind its first token have a slot; tell whether there was one."""
            while waiting:
                sample = waiting.pop(0)
                if sample.push(sample.draw(first.copy()), limit):
                    running[slot] = sample
                    return True
            return False

        begin(slot)
        while waiting and len(taken) < runner.max_slots:
            taken.append(runner.copy_prefix(slot, len(prompt_ids)))
            begin(taken[-1])
        while running:
            found = runner.step({slot: sample.token_ids[-1] for slot, sample in running.items()})
            for slot, logits in found.items():
                if not running[slot].push(running[slot].draw(logits), limit):
                    del running[slot]
                    if waiting:
                        runner.truncate_slot(slot, len(prompt_ids))
                        begin(slot)
    finally:
        for slot in taken:
            runner.release(slot)
