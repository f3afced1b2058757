"""Several tokens a step: guesses, what they cost, and the rule that keeps the distribution."""
