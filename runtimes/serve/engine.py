"""The engine: many requests on the slots of one runner, a tick at a time.

    tick: a step of all answers  ->  pieces of the oldest prompt, for a time  ->  what came of it, in one list

- Whole texts, of which something is measured, wait until no answer is being made, and then have the runner alone.
- Requests are begun in the order in which they came, none passes another, and one prompt is computed at a time.
- A request is begun when all that it may come to hold fits beside what the others may, so that none is ever given up
  for want of memory. Texts that have ended are kept as long as there is room, see `kept.py`.
- `cancel` takes effect at once, which is between two ticks.
- Logits that are NaN or infinite end their own answer and no other. Whatever else a runner raises is the end of the
  engine: the process that it runs in ends, and another one is started.

Of an exact runner each answer is, bit for bit, what it would be alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from runtimes.errors import BrokenSlotsError, InputError, NumericError, Olmo2ExportError
from runtimes.generation.draw import Draw
from runtimes.runners.runner import Logits
from runtimes.runners.slots import Slots
from runtimes.serve.kept import KeptRows, Text, longest_prefix
from runtimes.serve.measuring import Measuring
from runtimes.serve.pace import LEAST_TOKENS, MOST_TOKENS, Pace
from runtimes.serve.requests import (
    Capacity,
    Clock,
    EndReason,
    Event,
    Failed,
    FailureKind,
    Request,
    Scored,
    Started,
    Texts,
    Token,
    check_queue,
    check_request,
)
from runtimes.text.logit_rules import LogitRule
from runtimes.text.logprobs import TokenLogprobs, token_logprobs
from runtimes.text.structured import Form, StructuredOutput

_SCORED_TOKENS = 64  # of a prompt whose logits are in memory at once, 25 MB at a vocabulary of 100,352


class Tick(NamedTuple):
    """What a tick brought, and how things stand after it."""

    events: list[Event]
    running: int
    """answers, and the request whose prompt is being computed"""
    waiting: int
    """requests"""
    kv_tokens: int
    """that are accepted or kept"""
    stepped: int
    """tokens of answers that were computed"""
    prompted: int
    """tokens of prompts that were computed"""
    idle: bool
    """there is nothing to do until a request comes"""


@dataclass
class _Prompt:
    """A request whose prompt is being computed."""

    request: Request
    slot: int
    draws: list[Draw]
    scored: int = 0
    """of its tokens, those whose log probabilities were given out, the first one among them"""


@dataclass
class _Answer:
    """A choice of a request that is being generated."""

    request: Request
    choice: int
    draw: Draw
    last: int = -1
    """the token that the next step appends"""
    made: int = 0


@dataclass
class _Seen:
    """What a tick has done so far."""

    events: list[Event] = field(default_factory=list)
    stepped: int = 0
    prompted: int = 0


class Engine:
    """Answers requests; whoever has it calls `tick` while it is not idle. It belongs to one thread."""

    def __init__(
        self,
        runner: Slots,
        *,
        kv_tokens: int | None = None,
        queue: int | None = None,
        kept_rows: int | None = None,
        prefill_seconds: float | None = None,
        structured: StructuredOutput | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Begin with nothing to do.

        Args:
            runner: of which no slot is taken; nobody else may use it.
            kv_tokens: that all answers together may come to hold; None: all that the slots hold.
            queue: requests that may wait; None: any number.
            kept_rows: texts that are kept when they have ended, for prompts that begin like them; None: as many as
                there are slots.
            prefill_seconds: that prompts may take between two steps; None: see `Pace`.
            structured: makes the rules of requests that have a form; None: these are refused.
            clock: tells the time.
        """
        self._runner = runner
        self.capacity = Capacity(
            vocab_size=runner.model.vocab_size,
            max_cache_length=runner.max_cache_length,
            max_slots=runner.max_slots,
            kv_tokens=runner.max_slots * runner.max_cache_length if kv_tokens is None else kv_tokens,
            adapters=tuple(runner.adapters),
            exact=runner.exact,
            variant=runner.variant.name,
            forms=structured is not None,
            hidden_size=runner.model.hidden_size,
            hidden_states=tuple(runner.variant.hidden_states),
            labels=tuple(runner.model.labels),
        )
        self._queue = queue
        self._structured = structured
        self._clock = clock
        self._pace = Pace(prefill_seconds)
        self._kept = KeptRows(runner, runner.max_slots if kept_rows is None else kept_rows)
        self._measuring = Measuring(runner)
        self._waiting: deque[Request | Texts] = deque()
        self._prompt: _Prompt | None = None
        self._answers: dict[int, _Answer] = {}  # slot -> what it holds

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do until a request comes."""
        return not (self._waiting or self._prompt or self._answers or self._measuring.requests)

    def submit(self, request: Request | Texts) -> None:
        """Take a request; it waits until there is room for it.

        Raises:
            BusyError: too many wait.
            InputError: as `check_request`, or its id is that of another.
        """
        check_request(request, self.capacity)
        check_queue(len(self._waiting), self._queue)
        current = [self._prompt.request] if self._prompt else []
        others = (*self._waiting, *current, *(answer.request for answer in self._answers.values()))
        if request.id in (*(other.id for other in others), *self._measuring.requests):
            raise InputError(f"request {request.id!r}: there is one of that id; give another")
        self._waiting.append(request)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Give up a request, or one of its choices; nothing more comes of it. One that is not there is none's loss."""
        for slot, answer in list(self._answers.items()):
            if answer.request.id == request_id and choice in (None, answer.choice):
                self._end(slot)
        if choice is None:
            self._waiting = deque(request for request in self._waiting if request.id != request_id)
            self._measuring.cancel(request_id)
            if self._prompt is not None and self._prompt.request.id == request_id:
                self._drop_prompt(self._prompt)

    def tick(self) -> Tick:
        """Compute the next token of every answer, and some of the oldest prompt; or some whole texts."""
        seen = _Seen()
        if self._answers:
            self._step(seen)
        self._compute_prompts(seen)
        if not self._answers and self._prompt is None:
            self._measure(seen)
        return Tick(
            events=seen.events,
            running=len(self._answers) + (self._prompt is not None) + len(self._measuring.requests),
            waiting=len(self._waiting),
            kv_tokens=self._accepted_tokens() + self._kept.tokens,
            stepped=seen.stepped,
            prompted=seen.prompted,
            idle=self.idle,
        )

    # Answers

    def _step(self, seen: _Seen) -> None:
        began = self._clock()
        broken: Sequence[int] = ()
        message = ""
        try:
            found: dict[int, Logits] = self._runner.step({slot: answer.last for slot, answer in self._answers.items()})
        except BrokenSlotsError as error:
            found, broken = error.logits, error.slots
            message = str(error)
        self._pace.stepped(self._clock() - began)
        seen.stepped += len(found)
        for slot in broken:
            request = self._answers.pop(slot).request
            self._runner.release(slot)
            self._fail(request, message, "numeric", seen)
        for slot, logits in found.items():
            if slot in self._answers:  # else it is another choice of one that failed
                self._take(slot, logits, seen)

    def _take(self, slot: int, logits: Logits, seen: _Seen) -> None:
        """Draw the next token of an answer, and end it where it ends."""
        answer = self._answers[slot]
        request = answer.request
        try:
            token_id = answer.draw(logits)
        except InputError as error:  # a grammar became too complex
            self._fail(request, str(error), "input", seen)
            return
        except NumericError as error:  # rules leave no token
            self._fail(request, str(error), "numeric", seen)
            return
        answer.last = token_id
        answer.made += 1
        reason: EndReason | None = None
        if token_id in request.eos_token_ids:
            reason = "eos"
        elif answer.made == request.max_new_tokens:
            reason = "length"
        noted: TokenLogprobs | None = answer.draw.noted.pop() if answer.draw.noted else None
        seen.events.append(Token(request.id, answer.choice, token_id, noted, reason))
        if reason is not None:
            self._end(slot)

    def _end(self, slot: int) -> None:
        request = self._answers.pop(slot).request
        self._kept.keep(slot, Text(len(request.prompt_ids), request.adapter))

    def _fail(self, request: Request, message: str, kind: FailureKind, seen: _Seen) -> None:
        """Give up a request with all its choices."""
        seen.events.append(Failed(request.id, message, kind))
        self.cancel(request.id)

    # Prompts

    def _compute_prompts(self, seen: _Seen) -> None:
        """Compute pieces of prompts; where others are answered for a time, and one piece at least."""
        waited_for = bool(self._answers)
        left = self._pace.seconds
        while self._prompt is not None or self._begin_next(seen):
            assert self._prompt is not None
            tokens = self._pace.piece(left) if waited_for else MOST_TOKENS
            if tokens < LEAST_TOKENS and seen.prompted:
                return
            began = self._clock()
            self._compute_piece(self._prompt, max(tokens, LEAST_TOKENS), seen)
            left -= self._clock() - began
            if not waited_for:
                return

    def _compute_piece(self, prompt: _Prompt, tokens: int, seen: _Seen) -> None:
        request, slot = prompt.request, prompt.slot
        held, began = len(self._runner.slot_tokens(slot)), self._clock()
        try:
            if request.prompt_logprobs is None:
                logits = self._runner.extend(slot, tokens)
            else:
                every = self._runner.extend_all(slot, min(tokens, _SCORED_TOKENS))
                self._score(prompt, every, request.prompt_logprobs, seen)
                logits = every[-1] if held + len(every) == len(request.prompt_ids) else None
        except NumericError as error:
            seen.events.append(Failed(request.id, str(error), "numeric"))
            self._prompt = None
            self._runner.release(slot)
            return
        computed = len(self._runner.slot_tokens(slot)) - held
        seen.prompted += computed
        self._pace.computed(computed, self._clock() - began)
        if logits is not None:
            self._prompt = None
            self._begin_answers(prompt, logits, seen)

    def _score(self, prompt: _Prompt, logits: Logits, top: int, seen: _Seen) -> None:
        """Give out the log probabilities of the tokens behind those of a piece."""
        ids = prompt.request.prompt_ids
        following = ids[prompt.scored + 1 : prompt.scored + 1 + len(logits)]
        found = tuple(token_logprobs(row, token_id, top) for row, token_id in zip(logits, following, strict=False))
        prompt.scored += len(found)
        if found:
            seen.events.append(Scored(prompt.request.id, found))

    def _begin_answers(self, prompt: _Prompt, logits: Logits, seen: _Seen) -> None:
        """Have all choices go on behind the prompt, each in a slot of its own."""
        request = prompt.request
        slots = [prompt.slot]
        try:
            while len(slots) < request.choices and request.max_new_tokens:
                slots.append(self._runner.copy_prefix(prompt.slot, len(request.prompt_ids)))
        except NumericError as error:
            seen.events.append(Failed(request.id, str(error), "numeric"))
            for slot in slots:
                self._runner.release(slot)
            return
        for choice, slot in enumerate(slots):
            self._answers[slot] = _Answer(request, choice, prompt.draws[choice])
        if not request.max_new_tokens:
            seen.events += [Token(request.id, choice, None, None, "length") for choice in range(request.choices)]
            self._end(prompt.slot)
            return
        for slot in slots:
            if slot in self._answers:
                self._take(slot, logits.copy(), seen)  # a rule changes what it is given

    def _drop_prompt(self, prompt: _Prompt) -> None:
        """Give up a prompt that is not complete; what was computed of it is kept."""
        self._prompt = None
        held = len(self._runner.slot_tokens(prompt.slot))
        if held:
            self._runner.truncate_slot(prompt.slot, held)  # nothing is to be computed behind it
            self._kept.keep(prompt.slot, Text(held, prompt.request.adapter))
        else:
            self._runner.release(prompt.slot)

    # Whole texts

    def _measure(self, seen: _Seen) -> None:
        """Begin the requests of this kind that have waited longest, and compute a batch of their texts."""
        while self._waiting and isinstance(request := self._waiting[0], Texts):
            self._waiting.popleft()
            seen.events.append(Started(request.id, 0))
            self._measuring.add(request)
        if not self._measuring.requests:
            return
        while self._kept.drop():  # a batch takes all rows
            pass
        events, tokens = self._measuring.compute()
        seen.events += events
        seen.prompted += tokens

    # Admission

    def _begin_next(self, seen: _Seen) -> bool:
        """Begin the request that has waited longest, if there is room for its prompt; tell whether there is one."""
        while self._waiting and self._prompt is None:
            request = self._waiting[0]
            if isinstance(request, Texts) or self._measuring.requests:
                return False
            taken = len(self._answers)
            if taken + request.choices > self.capacity.max_slots:
                return False
            if self._accepted_tokens() + request.tokens > self.capacity.kv_tokens:
                return False
            self._waiting.popleft()
            try:
                draws = [
                    request.draw(choice, self.capacity.vocab_size, self._forms(request.form))
                    for choice in range(request.choices)
                ]
                slot, reused = self._place(request)
            except Olmo2ExportError as error:
                kind: FailureKind = "numeric" if isinstance(error, NumericError) else "input"
                seen.events.append(Failed(request.id, str(error), kind))
                continue
            seen.events.append(Started(request.id, reused))
            self._prompt = _Prompt(request, slot, draws)
        return self._prompt is not None

    def _place(self, request: Request) -> tuple[int, int]:
        """Take a slot for a prompt, and leave room for its other choices; return it and the tokens that it has."""
        source, length = self._longest_prefix(request)
        kept = source in self._kept.texts
        own = request.tokens
        # A kept text with which the prompt begins is not needed beside it, nor is one for which there is no room.
        whole = source is not None and len(self._runner.slot_tokens(source)) == length
        taken = kept and (whole or not self._runner.copies_prefixes)
        while not taken and self._lacks_room(request.choices, own):
            if not self._kept.drop(but=source):
                taken = kept
                break
        if source is None:
            return self._runner.begin(request.prompt_ids, request.adapter), 0
        if taken:
            self._kept.take(source)
            self._runner.truncate_slot(source, length)
            slot = source
        else:
            self._kept.used(source)
            slot = self._runner.copy_prefix(source, length)
        while self._lacks_room(request.choices - 1, own, beside=slot) and self._kept.drop():
            pass
        if taken and len(self._runner.slots) == self.capacity.max_slots:
            self._kept.drop()  # to come before those that are parked it takes a free slot
        self._runner.append(slot, request.prompt_ids[length:])
        return slot, length

    def _longest_prefix(self, request: Request) -> tuple[int | None, int]:
        if request.prompt_logprobs is not None:  # all of it is computed
            return None, 0
        texts = dict(self._kept.texts)
        if self._runner.copies_prefixes:
            texts |= {slot: Text(len(a.request.prompt_ids), a.request.adapter) for slot, a in self._answers.items()}
        return longest_prefix(self._runner, texts, request.prompt_ids, request.adapter)

    def _lacks_room(self, slots: int, tokens: int, beside: int | None = None) -> bool:
        """Tell whether kept texts are in the way of so many slots and tokens; `beside`: a slot that is taken, too."""
        taken = len(self._answers) + len(self._kept.texts) + (beside is not None)
        held = self._accepted_tokens() + self._kept.tokens
        return taken + slots > self.capacity.max_slots or held + tokens > self.capacity.kv_tokens

    def _accepted_tokens(self) -> int:
        """Tokens that what is begun may come to hold."""
        prompt = self._prompt.request.tokens if self._prompt else 0
        return prompt + sum(answer.request.row_tokens for answer in self._answers.values())

    def _forms(self, form: Form | None) -> list[LogitRule]:
        if form is None:
            return []
        if self._structured is None:
            raise InputError("this server enforces no form of a text: install llguidance, and start it again")
        return [self._structured.of(form)]
