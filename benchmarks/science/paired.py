"""Statistics of paired seeds: the interval of a mean difference, the seeds that a difference takes, and how an estimate
divides into what differs between pre-trainings and what between fine-tunings of one.

All by Student's t, two-sided at 5 %, power 80 % where nothing else is said.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import chi2, nct, t

ALPHA, POWER = 0.05, 0.8
MOST_SEEDS = 100_000


@dataclass(frozen=True)
class Estimate:
    """mean, and standard deviation of a single seed, over n seeds; low, high: the 95 % interval of the mean."""

    mean: float
    deviation: float
    n: int

    @property
    def half_width(self) -> float:
        if self.n < 2:
            return math.inf
        return float(t.ppf(1 - ALPHA / 2, self.n - 1)) * self.deviation / self.n**0.5

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def verdict(self) -> str:
        """The word of `benchmarks.science.reading`: "undecided" unless the interval leaves out zero."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "undecided"


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value a seed; the deviation of a single one is not known: infinity."""
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.inf, len(values))


def deviation_limit(found: Estimate, level: float = 0.8) -> float:
    """What the true deviation does not exceed at ``level`` confidence: a few seeds may have been alike by chance."""
    if found.n < 2:
        return math.inf
    return found.deviation * ((found.n - 1) / float(chi2.ppf(1 - level, found.n - 1))) ** 0.5


def power(effect: float, deviation: float, seeds: int) -> float:
    """How likely the test of ``seeds`` pairs is to find a true mean ``effect``: the noncentral t distribution."""
    if seeds < 2:
        return 0.0
    if deviation == 0:
        return 1.0 if effect else ALPHA
    bound, shift = float(t.ppf(1 - ALPHA / 2, seeds - 1)), abs(effect) / deviation * seeds**0.5
    # Of the wrong sign: below 1e-11 from there on, where scipy may give no number.
    wrong_sign = float(nct.cdf(-bound, seeds - 1, shift)) if shift < 5 else 0.0
    return float(nct.sf(bound, seeds - 1, shift)) + wrong_sign


def seeds_needed(effect: float, deviation: float, wanted: float = POWER) -> int | None:
    """The least number of pairs with the power ``wanted``; None where even MOST_SEEDS have less."""
    if not math.isfinite(deviation) or power(effect, deviation, MOST_SEEDS) < wanted:
        return None
    low, high = 1, MOST_SEEDS  # too few, enough: power rises with the seeds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, deviation, middle) >= wanted else (middle, high)
    return high


def detectable(deviation: float, seeds: int, wanted: float = POWER) -> float:
    """The least true mean that ``seeds`` pairs find with the power ``wanted``; infinity for fewer than two."""
    if seeds < 2 or not math.isfinite(deviation):
        return math.inf
    low, high = 0.0, 100.0  # in deviations
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, 1.0, seeds) >= wanted else (middle, high)
    return high * deviation


@dataclass(frozen=True)
class Parts:
    """Variance of a single seed's true value, and of a single repeat around it."""

    between: float
    within: float

    def best_repeats(self, seed_cost: float, repeat_cost: float) -> int:
        """Repeats for each seed that make the mean over all seeds most exact for what they cost: the k that makes
        (between + within / k) x (seed_cost + k x repeat_cost) least."""
        if self.between <= 0:
            return 100
        return max(1, round((self.within / self.between * seed_cost / repeat_cost) ** 0.5))


def variance_parts(repeats_by_seed: Sequence[Sequence[float]]) -> Parts | None:
    """One-way analysis of variance of equally many repeats of each seed; None without two of each."""
    counts = {len(repeats) for repeats in repeats_by_seed}
    if len(repeats_by_seed) < 2 or len(counts) != 1 or min(counts) < 2:
        return None
    within = statistics.fmean(statistics.variance(repeats) for repeats in repeats_by_seed)
    of_means = statistics.variance([statistics.fmean(repeats) for repeats in repeats_by_seed])
    return Parts(max(0.0, of_means - within / counts.pop()), within)
