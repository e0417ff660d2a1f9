"""Whether a system is worse than another one for all users or for a group: a gate for releases."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import pandas as pd

from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import significance, slices
from seqfair_jax.report.contents import Contents
from seqfair_jax.report.verdict import listed, signed

WORSE, NOT_WORSE, UNKNOWN = "worse", "not worse", "unknown"
LEVEL = 0.05  # the error rate of each side


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Gate:
    """A row against a reference row, over all users and in each judged group.

    `outcome` and the outcomes of the groups are "worse", "not worse" or "unknown": see `judge`.
    """

    metric: str
    margin: float  # the loss that is allowed
    subject: str  # the name of the row that is judged
    reference: str  # that of the row that it is compared with
    groups: pd.DataFrame  # slice, users, mean, reference, difference, low, high, outcome
    min_users: int
    not_judged: Mapping[str, int]  # the slices that have fewer users, and how many

    @property
    def outcome(self) -> str:
        """The first of "worse", "unknown" and "not worse" that is the outcome of some slice."""
        found = set(self.groups["outcome"])
        return next(outcome for outcome in (WORSE, UNKNOWN, NOT_WORSE) if outcome in found)

    def failure(self, *, fail_if_unknown: bool = False) -> str:
        """Why the gate fails, in one line; "" if it does not.

        Args:
            fail_if_unknown: whether a group whose outcome is unknown fails too.
        """
        what = f"{self.metric} by more than {self.margin:g}"
        parts = {WORSE: f"{self.subject} is below {self.reference} in {what} for"}
        if fail_if_unknown:
            parts[UNKNOWN] = (
                f"it is unknown whether {self.subject} is below {self.reference} in {what} for"
            )
        found = [f"{part} {self._named(outcome)}" for outcome, part in parts.items()
                 if (self.groups["outcome"] == outcome).any()]  # fmt: skip
        return "; ".join(found)

    def passed(self) -> str:
        """What a gate that did not fail shows, in one line."""
        unknown = int((self.groups["outcome"] == UNKNOWN).sum())
        if not unknown:
            return (
                "passed: a loss above the margin is ruled out for all users and all judged groups"
            )
        return (
            f"passed: no loss above the margin is shown. {unknown} of {len(self.groups)} outcomes "
            "are unknown, so --fail_if_unknown would fail"
        )

    def record(self) -> dict[str, Any]:
        """All of it as a JSON object, the content of `gate.json`."""
        return {
            "metric": self.metric,
            "margin": self.margin,
            "subject": self.subject,
            "reference": self.reference,
            "outcome": self.outcome,
            "confidence": _confidences(len(self.groups)),
            "groups": self.groups.to_dict("records"),
            "min_users": self.min_users,
            "not_judged": dict(self.not_judged),
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """The table, what its columns mean, and the outcome."""
        shown = self.groups.assign(slice=self.groups["slice"].map(slices.full_label))
        numbers = dict.fromkeys(("difference", "low", "high"), signed)
        means = dict.fromkeys(("mean", "reference"), "{:.4f}".format)
        table = shown.to_string(index=False, formatters=numbers | means)
        low, high = (f"{100 * part:.4g} %" for part in _confidences(len(shown)).values())
        tests = f"corrected for {len(shown)} outcomes" if len(shown) > 1 else "one outcome"
        lines = [
            f"{self.metric} of {self.subject} minus that of {self.reference}; a loss of at most "
            f"{self.margin:g} is allowed",
            table,
            "low, high: the true difference is above low and below high, with a confidence of "
            f"{low} and {high} ({tests})",
            f"A bound is wide where fewer than {significance.FEWEST_VALUES} users lose (low) or "
            "gain (high) more than the margin: it then allows for a few large differences.",
            f"worse: high is below {0 - self.margin:g}. not worse: low is at least "
            f"{0 - self.margin:g}. unknown: neither.",
        ]
        if self.not_judged:
            small = [f"{slices.full_label(name)} ({users:,})"
                     for name, users in self.not_judged.items()]  # fmt: skip
            lines.append(
                f"Not judged, because they have fewer than {self.min_users} test users: "
                f"{listed(small)}."
            )
        why = self.failure(fail_if_unknown=True)
        return "\n".join([*lines, f"Outcome: {self.outcome}{f' ({why})' if why else ''}"])

    def _named(self, outcome: str) -> str:
        found = self.groups["slice"][self.groups["outcome"] == outcome]
        return listed([slices.full_label(name) for name in found])


def judge(contents: Contents, subject: str, margin: float) -> Gate:
    """Judge a row against the reference of a report's contents.

    For K slices, all users and the judged groups of every family, let d be the mean difference of
    the users' metrics, row minus reference, and low and high its one-sided bounds at 95 % and at
    1 - 0.05 / K (`significance.bounds`). A slice is

        worse      if high < -margin,
        not worse  if low >= -margin,
        unknown    otherwise.

    If no slice has a true loss above the margin, one is called worse with a probability of at most
    5 % (Bonferroni). If some slice has, all are called not worse with a probability of at most 5 %,
    for any K: all K must be shown, so no correction is needed (an intersection-union test).

    Args:
        contents: with a reference.
        subject: the name of another row; both have metrics of each user.
        margin: the loss of the metric that is allowed.

    Raises:
        UserError: if the row is the reference, or as `check_margin`.
    """
    check_margin(margin, "margin")
    if subject == contents.reference:
        raise UserError(
            f"the gate compares {subject} with itself; name another row as the reference"
        )
    tables = {}
    for name in (subject, contents.reference):
        read = contents.row(name).per_user
        assert read is not None
        tables[name] = read()
    ours, theirs = (significance.seed_mean(of, contents.metric) for of in tables.values())
    members = significance.slice_members(next(iter(tables[subject].values())))
    of_families = [slices.groups_in(contents.sizes, family) for family in contents.families]
    is_judged = {name for family in contents.families for name in contents.judged(family)}
    groups = [name for names in of_families for name in names]
    judged = [slices.OVERALL, *(name for name in groups if name in is_judged)]
    confidence = _confidences(len(judged))
    found = []
    for name in judged:
        own, other = ours[members[name]], theirs[members[name]]
        gap = significance.bounds(
            own - other, lower=confidence["low"], upper=confidence["high"], margin=margin
        )
        outcome = WORSE if gap.high < -margin else NOT_WORSE if gap.low >= -margin else UNKNOWN
        found.append(
            {
                "slice": name,
                "users": len(own),
                "mean": float(own.mean()),
                "reference": float(other.mean()),
                **gap._asdict(),
                "outcome": outcome,
            }
        )
    return Gate(
        contents.metric,
        float(margin),
        subject,
        contents.reference,
        pd.DataFrame(found),
        contents.min_users,
        {name: contents.sizes[name] for name in groups if name not in is_judged},
    )


def check_margin(margin: Any, named: str) -> None:
    """Refuse a margin that no metric can have.

    Args:
        margin: the allowed loss.
        named: what messages call it.

    Raises:
        UserError: if it is not a number from 0 to below 1.
    """
    is_number = isinstance(margin, Real) and not isinstance(margin, bool)
    if not is_number or not math.isfinite(margin) or not 0 <= margin < 1:
        raise UserError(
            f"{named} is {margin}: expected the loss of the metric that is allowed, a number from "
            "0 to below 1, such as 0.01"
        )


def only_reference(others: Sequence[str]) -> str:
    """The reference if none is named: the only other row.

    Args:
        others: the rows beside the judged one, without the baselines.

    Raises:
        UserError: if there is none, or several.
    """
    if len(others) != 1:
        found = f"there are {', '.join(map(repr, others))}" if others else "there is no other row"
        raise UserError(
            f"the gate needs one row to compare with, and {found}; give --with=DIR or "
            "--recommendations=FILE, and name the row as --baseline=NAME (in Python reference)"
        )
    return others[0]


def _confidences(slices_judged: int) -> dict[str, float]:
    """Of the lower and the upper bound."""
    return {"low": 1 - LEVEL, "high": 1 - LEVEL / slices_judged}
