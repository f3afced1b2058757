"""A server: an engine that answers many at once, a process that it runs in, and OpenAI's API in front of it."""
