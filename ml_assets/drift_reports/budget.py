"""The budget of false alarms: how 'at most one in N days' is divided among all comparisons ever begun.

Each comparison gives evidence that reaches c with a probability of at most 1 / c if nothing has changed. One
that is begun with weight w alarms at c = N / w. So the chance of any false alarm within T days is at most the
sum of the weights begun by then, over N (the union bound needs no independence). A day adds 1 to that sum,
over all signals together, whatever the number of requests: P(any false alarm within T days) <= T / N, for
every T. In the words of sequential analysis these are repeated tests with restarts (Shekhar and Ramdas,
arXiv 2309.09111; Shin, Ramdas and Rinaldo, 'E-detectors', 2023)."""

from dataclasses import dataclass

SHARES = {
    "inputs_classifier": 0.25,
    "inputs_mmd": 0.25,
    "outputs_mix": 0.1,
    "outputs_length": 0.05,
    "outputs_malformed": 0.1,
    "outputs_refusals": 0.05,
    "outcome_feedback": 0.1,
    "outcome_estimated": 0.1,
}
"""Of the budget, by signal; they add up to 1."""


@dataclass
class Purse:
    """What the comparisons of one kind may still use of their share of the days that have passed.

    Each takes a part that fits the number of comparisons in a day, as far as the days before tell.
    """

    held: float = 0.0
    today: int = 0
    fullest: int = 0

    def add(self, days: float, share: float) -> None:
        """`days` have passed (or begun) since the last call."""
        self.held += days * share
        self.fullest, self.today = max(self.fullest, self.today), 0

    def take(self) -> float:
        """The weight of a comparison that begins now."""
        self.today += 1
        weight = self.held / (2 * max(2, self.today, self.fullest))
        self.held -= weight
        return weight
