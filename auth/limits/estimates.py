"""How long answers usually get, for requests that name no limit."""

from __future__ import annotations

FIRST_GUESS = 256
_MEMORY = 0.1  # of the newest answer in the running mean
_MAX_KNOWN = 10_000


class Estimates:
    """A running mean and deviation for each key and model; their sum, twice the deviation, covers most answers."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[float, float]] = {}

    def of(self, key_id: str, model: str) -> int:
        """Tokens, at least one."""
        known = self._known.get((key_id, model))
        return FIRST_GUESS if known is None else max(1, round(known[0] + 2 * known[1]))

    def learn(self, key_id: str, model: str, num_tokens: int) -> None:
        mean, deviation = self._known.get((key_id, model), (float(num_tokens), num_tokens / 2))
        deviation += _MEMORY * (abs(num_tokens - mean) - deviation)
        mean += _MEMORY * (num_tokens - mean)
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[key_id, model] = (mean, deviation)
