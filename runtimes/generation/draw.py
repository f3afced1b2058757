"""How the next token of a text is drawn: rules change the logits, a sampler draws, what was drawn is noted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtimes.errors import NumericError
from runtimes.runners.runner import Logits
from runtimes.text.logit_rules import LogitRule
from runtimes.text.logprobs import TokenLogprobs, token_logprobs
from runtimes.text.sampling import Sampler


class Draw:
    """Draws the tokens of one text."""

    def __init__(self, sampler: Sampler, rules: Sequence[LogitRule] = (), logprobs: int | None = None) -> None:
        """Take what draws.

        Args:
            sampler: draws each id.
            rules: change the logits before it, in their order; of this text alone.
            logprobs: note each token's log probability and so many of the likeliest; None: note nothing.
        """
        self.sampler = sampler
        self._rules = rules
        self._top = logprobs
        self.noted: list[TokenLogprobs] = []
        """of every token that was drawn, where log probabilities are asked for"""

    @property
    def candidates(self) -> int:
        """As of `Sampler`; 0 with rules, which may bring any token among the likeliest, and where all logits count."""
        return 0 if self._rules or self._top is not None else self.sampler.candidates

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Begin the text behind a prompt."""
        self.noted.clear()
        for rule in self._rules:
            rule.begin(prompt_ids)

    def __call__(self, logits: Logits) -> int:
        """Draw the next token.

        Args:
            logits: float32 [vocab_size]; rules change them in place.

        Raises:
            NumericError: the rules have left no token.
            InputError: as the rules raise it.
        """
        if not self._rules and self._top is None:
            return self.sampler(logits)
        model = logits.copy() if self._rules and self._top is not None else logits
        for rule in self._rules:
            rule.apply(logits)
        if self._rules and logits.max() == -math.inf:
            raise NumericError(
                "penalties, biases and what the text must look like leave no token; ask for less of them"
            )
        token_id = self.sampler(logits)
        for rule in self._rules:
            rule.push(token_id)
        if self._top is not None:
            self.noted.append(token_logprobs(model, token_id, self._top))
        return token_id
