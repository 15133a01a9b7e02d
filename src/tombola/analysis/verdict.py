"""Verdicts: a claim with its number, and the rule by which the intervals of its parts decide on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import polars as pl

from tombola.analysis.winners import UNBOUNDED, Bounds, mean_with_interval

Verdict = Literal["holds", "holds in part", "does not hold", "not testable"]


@dataclass(frozen=True)
class Claim:
    """A claim with its evidence and verdict; it is "not testable" until `decide` gives another verdict and the reason.

    Args:
        number: the number of the claim and a letter for its part, such as "4b".
        statement: what is claimed.
        paper: what the paper measured, in words.
        verdict: what the study's tickets say about it.
        reason: why, in one sentence.
        measure: what `value` is.
        value: the number that decides, a mean over seeds. low, high: its 95 % interval; None where there is none.
        chance: what chance would give. noise: the noise floor, what another data order alone gives.
        seeds: the number of seeds.
        needs: what is missing for a verdict, see `need`; empty where no further training would give one.
    """

    number: str
    statement: str
    paper: str
    verdict: Verdict = "not testable"
    reason: str = ""
    measure: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    noise: float | None = None
    seeds: int = 0
    needs: str = ""

    def add_measure(self, measure: str, values: Sequence[float], within: Bounds = UNBOUNDED) -> Claim:
        """Add the number that decides: the mean of these values, one for each seed, with its interval.

        Args:
            measure: what the number is.
            values: the value of each seed.
            within: the smallest and the largest possible value.
        """
        if not values:
            return self
        mean, low, high = mean_with_interval(values, within)
        return replace(self, measure=measure, value=mean, low=low, high=high, seeds=len(values))

    def add_baselines(self, *, chance: float | None = None, noise: float | None = None) -> Claim:
        """Add what chance and another data order give."""
        return replace(self, chance=chance, noise=noise)

    def decide(self, verdict: Verdict, reason: str, needs: str = "") -> Claim:
        """Return the claim with its verdict, and with what is missing if it is not testable."""
        return replace(self, verdict=verdict, reason=reason, needs=needs if verdict == "not testable" else "")


def to_frame(claims: Iterable[Claim]) -> pl.DataFrame:
    """Return claims as a table whose columns are the fields of `Claim`."""
    kinds = {"value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "chance": pl.Float64, "noise": pl.Float64}
    names = [each.name for each in fields(Claim)]
    return pl.DataFrame(
        [[getattr(claim, name) for name in names] for claim in claims],
        {name: kinds.get(name, pl.Int64 if name == "seeds" else pl.String) for name in names},
        orient="row",
    )


def describe(claim: Claim) -> dict[str, str]:
    """Return the evidence of a claim in words: verdict, ours, chance, noise floor and the paper's number, where known.

    >>> claim = Claim("4b", "They differ.", "not measured", "holds", "they do", "points", 2.0, 1.0, 3.0, 0.0, 61.0, 3)
    >>> describe(claim)["ours"]
    '2 (95 % 1 to 3) points; 3 seeds'
    """
    found = {"verdict": f"{claim.verdict}; {claim.reason}."}
    if claim.value is not None:
        seeds = f"{claim.seeds} seed{'s' if claim.seeds != 1 else ''}"
        interval = format_interval(claim.low, claim.high, ".4g")
        found["ours"] = f"{claim.value:.4g}{interval} {claim.measure}; {seeds}"
    if claim.chance is not None:
        found["chance"] = f"{claim.chance:.4g}"
    if claim.noise is not None:
        found["noise floor"] = f"{claim.noise:.4g}"
    return found | {"paper": claim.paper}


def is_above(values: Sequence[float], limit: float) -> bool | None:
    """Return whether the interval of a mean lies above a limit; None if there is none, or if it contains the limit."""
    _, low, high = mean_with_interval(values)
    if low is None or high is None:
        return None
    return True if low > limit else False if high <= limit else None


def is_below(values: Sequence[float], limit: float) -> bool | None:
    """Return whether the interval of a mean lies below a limit, as `is_above` does."""
    return is_above([-value for value in values], -limit)


def compare(
    parts: Mapping[str, Sequence[float]], limit: float, form: str, within: Bounds = UNBOUNDED
) -> dict[str, bool | None]:
    """Return for each part, in words with its mean and interval, whether it is above a limit; None if that is open."""
    return {f"{name} {format_mean(values, form, within)}": is_above(values, limit) for name, values in parts.items()}


def need(field: str, *values: object) -> str:
    """Return what would make a claim testable: a field of the study and its values, or "reinit" and the level.

    >>> need("levels", 20)
    'levels 20'
    """
    return " ".join(map(str, (field, *values)))


def conclude(more_seeds: str, parts: Mapping[str, bool | None], about: str = "") -> tuple[Verdict, str, str]:
    """Return what `Claim.decide` takes, from the parts of a claim.

    Args:
        more_seeds: what is needed where an interval is missing or contains both answers, see `need`.
        parts: each part in words, and whether it agrees with the claim; None if that is open.
        about: what the parts are.
    """
    answers = list(parts.values())
    text = f"{about}: {', '.join(parts)}" if about else ", ".join(parts)
    if None in answers:
        if not any("(95 %" in part for part in parts):
            text += "; one seed gives no interval"
        else:
            text += f"; {'the interval contains' if len(answers) == 1 else 'some intervals contain'} both answers"
    if True in answers:
        return "holds" if all(answers) else "holds in part", text, ""
    return "not testable" if None in answers else "does not hold", text, more_seeds


def count_seeds(agree: Sequence[bool], text: str) -> tuple[Verdict, str]:
    """Return verdict and reason of a claim that each seed agrees with or not."""
    found: Verdict = "holds" if all(agree) else "holds in part" if any(agree) else "does not hold"
    return found, f"{text}; in {sum(agree)} of {len(agree)} {'seeds' if len(agree) > 1 else 'seed'}"


def format_interval(low: float | None, high: float | None, form: str) -> str:
    """Format an interval, with a space before it; nothing if there is none.

    >>> format_interval(0.25, 0.75, ".1f"), format_interval(None, None, ".1f")
    (' (95 % 0.2 to 0.8)', '')
    """
    return "" if low is None or high is None else f" (95 % {_number(low, form)} to {_number(high, form)})"


def _number(value: float, form: str) -> str:
    """Format a number; a number that is rounded to zero has no minus.

    >>> _number(-0.001, "+.2f"), _number(-0.01, ".2f")
    ('+0.00', '-0.01')
    """
    text = f"{value:{form}}"
    return f"{0:{form}}" if float(text) == 0 else text


def format_mean(values: Sequence[float], form: str, within: Bounds = UNBOUNDED) -> str:
    """Format the mean of the values of all seeds, with its interval if there is one."""
    mean, low, high = mean_with_interval(values, within)
    return f"{_number(mean, form)}{format_interval(low, high, form)}"
