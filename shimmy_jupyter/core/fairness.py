"""Fair shares of the engine: the virtual token counter.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2: each principal has
a counter of the service it received, and the one with the lowest counter goes next. A principal that
comes back is lifted to the lowest counter of those that wait, so that idleness saves up nothing.
Between two principals that both wait all the while, service differs by at most twice the larger of
one prompt and all that can be in the KV cache, at the weights given here (theorem 4.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

PROMPT_COST = 1.0
COMPLETION_COST = 2.0
"""Of one token; the weights that the paper uses. Prompt tokens found in the cache cost nothing."""
_REMEMBERED = 4096


class Counters:
    """Service received by principal, in prompt tokens' worth divided by the principal's weight."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._counters: dict[str, float] = {}
        self.waiting: frozenset[str] = frozenset()
        self._floor = 0.0
        """The counter of whoever was last to wait: where those begin who find nobody waiting."""

    def __getitem__(self, principal: str) -> float:
        return self._counters.get(principal, self._floor)

    def weight(self, principal: str) -> float:
        return self._weights.get(principal, 1.0)

    def charge(self, principal: str, prompt: int = 0, completion: int = 0) -> None:
        """Count tokens as served; negative numbers give back what was charged and not done."""
        cost = prompt * PROMPT_COST + completion * COMPLETION_COST
        self._counters[principal] = self[principal] + cost / self.weight(principal)

    def wait(self, principals: Iterable[str]) -> None:
        """Say who waits now; those who did not before are lifted."""
        waiting = frozenset(principals)
        if waiting == self.waiting:
            return
        stayed = self.waiting & waiting
        if self.waiting:
            self._floor = min(self[p] for p in (stayed or self.waiting))
        for principal in waiting - stayed:
            self._counters[principal] = max(self[principal], self._floor)
        self.waiting = waiting
        if len(self._counters) > _REMEMBERED:
            self._forget()

    def _forget(self) -> None:
        """Whoever is no further than the floor would begin there anyway."""
        self._counters = {
            principal: counter
            for principal, counter in self._counters.items()
            if counter > self._floor or principal in self.waiting
        }
