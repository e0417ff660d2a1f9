"""The verdict of a report: sentences that are computed from its numbers."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seqfair_jax.evaluation import significance, slices
from seqfair_jax.report.contents import EVALUATE, Contents, records
from seqfair_jax.report.rows import BASELINE, LIST, RUN

_NAMED = 6  # groups that a sentence names
_JUDGED = 4  # rows that have sentences of their own; the others are in the tables
_BETTER, _WORSE, _NONE = "It is better for", "It is worse for", "No difference was found for"


class Verdict(NamedTuple):
    """What the numbers say of a group family."""

    family: str  # canonical
    sentences: list[str]


def verdicts(contents: Contents) -> list[Verdict]:
    """For each family who is served worst, whether a method helps them, and what it costs whom.

    A difference counts if its q is below 0.05. Otherwise the sentence says that none was found, and
    still gives the difference and its interval.
    """
    found = []
    said: set[tuple[str, str]] = set()  # pairs whose difference over all users has a sentence
    for family in contents.families:
        found.append(Verdict(family, _Family(contents, family, said).sentences()))
    return found


def notes(contents: Contents) -> list[str]:
    """What a reader must know of all tables: missing tests, the reference, seeds, joined rows."""
    found = []
    if contents.problem:
        found.append(f"No tests were made. {contents.problem}.")
    elif contents.named_by == EVALUATE:
        found.append(
            f"The other rows are compared with {contents.reference}, as in `seqfair evaluate`. "
            "`seqfair report --baseline=NAME` names another row."
        )
    elif _is_best_baseline(contents):
        found.append(
            f"There is no ERM run. The methods are compared with {contents.reference}, the best "
            "baseline without training."
        )
    elif contents.erm_rows > 1:
        found.append(
            f"There are {contents.erm_rows} rows of ERM. All other rows are compared with "
            f"{contents.reference}, which has the highest {contents.metric} over all users in "
            "validation. `seqfair report --baseline=DIR` names another."
        )
    if (contents.tests["kind"] == RUN).any():
        trained = [row for row in contents.rows if row.kind == RUN]
        once = [row.name for row in trained if len(row.means) == 1]
        if once:
            of = "each method" if len(once) == len(trained) else listed(once)
            found.append(
                f"Trained with one seed: {of}. The intervals and q are over users, and do not say "
                "what another training would give. Train with --config.seeds=0,1,2."
            )
    both = [row.name for row in contents.rows if row.is_both]
    if both:
        found.append(
            f"In every seed of {listed(both)}, the epoch that is best for all users is also best "
            "for the worst group. So there is one row for both."
        )
    return found


def _is_best_baseline(contents: Contents) -> bool:
    """Whether nobody named the reference, and it is a baseline."""
    name = contents.reference
    return bool(name) and not contents.named_by and contents.row(name).kind == BASELINE


class _Family:
    """The sentences of one family."""

    def __init__(self, contents: Contents, family: str, said: set[tuple[str, str]]):
        self._contents, self._said = contents, said
        self._metric = contents.metric
        self._groups = slices.groups_in(contents.sizes, family)
        self._judged = contents.judged(family)
        labels = map(_named, slices.labels(self._groups))
        self._label = dict(zip(self._groups, labels, strict=True))
        self._label[slices.OVERALL] = "all users"
        self._family = slices.family_label(family)
        self._subjects = contents.subjects.get(family, [])
        self._chosen = contents.chosen.get(family)

    def sentences(self) -> list[str]:
        """All of them, in order."""
        if not self._contents.sizes:
            return ["No run succeeded, so there is no verdict."]
        found = self._none_is_worst()
        for name in self._subjects[:_JUDGED]:
            worst = None
            if len(self._judged) > 1:
                worst, sentence = self._worst(self._served_by(name))
                found.append(sentence)
            if name == self._subjects[0]:
                found += self._too_small()
            found += [*self._comparison(name, worst), *self._baselines(name)]
        if not self._subjects:
            found += self._too_small()
        if more := self._subjects[_JUDGED:]:
            found.append(f"The figures and tests of {listed(more)} are only in the tables.")
        return found

    def _none_is_worst(self) -> list[str]:
        """A sentence if fewer than two groups are large enough."""
        least = self._contents.min_users
        if len(self._judged) == 1:
            return [
                f"Only group {self._label[self._judged[0]]} has at least {least} test users, so no "
                "group can be called worst."
            ]
        if self._groups and not self._judged:
            return [f"No group has at least {least} test users, so none is judged."]
        return []

    def _served_by(self, name: str) -> str:
        """The row whose worst group the sentences on a subject are about.

        Of a method it is that of the run that it is compared with: does the method help this group?
        Of another system's lists it is their own.
        """
        reference = self._contents.reference
        is_compared = name == self._chosen and bool(reference)
        return reference if is_compared and self._contents.row(reference).kind == RUN else name

    def _comparison(self, name: str, worst: str | None) -> list[str]:
        """A subject against the reference."""
        contents = self._contents
        if name == contents.reference:
            is_run = contents.row(name).kind == RUN
            return [f"There is no other run to compare {name} with."] if is_run else []
        if contents.problem or not contents.reference:
            return []
        return [*(self._choice() if name == self._chosen else []), *self._change(name, worst)]

    def _worst(self, of: str) -> tuple[str, str]:
        """The group with the lowest mean, and the sentence about it.

        It is compared with the users of the other groups that are judged. Users who are only in
        groups that are too small, or in none, are in neither side: such a group may have the lowest
        mean of all.
        """
        row = self._contents.row(of)
        means = {
            name: np.mean([x for seed in row.means if (x := seed.get(name)) is not None] or np.nan)
            for name in self._judged
        }
        worst = min(means, key=lambda name: (np.isnan(means[name]), means[name]))
        label, users = self._label[worst], self._contents.sizes[worst]
        start = f"{self._metric} is {means[worst]:.4f} for its {users:,} test users"
        plain = f"With {of}, group {label} has the lowest {self._metric}: {start}."
        if row.per_user is None:
            return worst, plain
        tables = row.per_user()
        values = significance.seed_mean(tables, self._metric)
        groups = significance.slice_members(next(iter(tables.values())))
        members = groups.get(worst)
        rivals = {name: groups[name] for name in self._judged if name in groups and name != worst}
        if members is None or not rivals:
            return worst, plain
        rest = np.setdiff1d(np.concatenate(list(rivals.values())), members)
        if not len(rest):
            return worst, plain
        others = values[rest]
        if len(rest) + len(members) == len(values):
            other_side = users_of_it = "the other users"
        else:
            other_side = "the other judged groups"
            users_of_it = f"the users of {other_side}"
        # The worst of several groups is chosen by the same users: Bonferroni.
        confidence = 1 - 0.05 / len(self._judged)
        gap = significance.gap(values[members], others, confidence=confidence)
        end = f"{start} and {others.mean():.4f} for {users_of_it}, {_effect(gap._asdict())}."
        if gap.high < 0:
            # One group far above is enough for this. Is the worst below each of the others?
            near = []
            for name in sorted(rivals, key=means.__getitem__):
                rival = rivals[name]
                own, other = np.setdiff1d(members, rival), np.setdiff1d(rival, members)
                if len(own) and len(other):
                    between = significance.gap(values[own], values[other], confidence=confidence)
                    near += [] if between.high < 0 else [self._label[name]]
            if not near:
                return worst, f"With {of}, group {label} is served worst: {end}"
            return worst, (
                f"With {of}, group {label} has the lowest {self._metric}, but no difference from "
                f"{listed(near)} was found: {end}"
            )
        return worst, (
            f"With {of}, group {label} has the lowest {self._metric}, but no difference from "
            f"{other_side} was found: {end}"
        )

    def _too_small(self) -> list[str]:
        small = [name for name in self._groups if name not in self._judged]
        if not small or not self._judged:
            return []
        sizes = [f"{self._label[name]} ({self._contents.sizes[name]:,})" for name in small]
        return [
            f"Not judged, because they have fewer than {self._contents.min_users} test users: "
            f"{listed(sizes)}."
        ]

    def _choice(self) -> list[str]:
        contents = self._contents
        compared = contents.row(contents.reference).run
        others = [row for row in contents.rows if row.validation and row.run != compared]
        if len(others) < 2:
            return []
        is_run = self._is_run(contents.reference)
        scope = f"rows other than {contents.reference}" if is_run else "trained rows"
        return [
            f"The next sentences are about {self._chosen}. Of the {len(others)} {scope}, it has "
            f"the highest {self._metric} for its worst group in validation."
        ]

    def _is_run(self, name: str) -> bool:
        return bool(self._contents.row(name).validation)

    def _change(self, name: str, worst: str | None) -> list[str]:
        """A method against the reference: in the worst group, overall, and in the other groups."""
        reference = self._contents.reference
        tests = self._contents.tests
        at = {row["slice"]: row for row in records(tests[tests["name"] == name])}
        found = []
        wanted = [worst] if worst else []
        if (name, reference) not in self._said:
            self._said.add((name, reference))
            wanted.insert(0, slices.OVERALL)
        for where in wanted:
            if where in at:
                found.append(self._sentence(name, reference, where, at[where]))
        others = [name for name in self._judged if name != worst and name in at]
        gains = [where for where in others if at[where]["star"] and at[where]["difference"] > 0]
        losses = [where for where in others if at[where]["star"] and at[where]["difference"] < 0]
        changes = self._is_trained(name, reference)
        above = f"raises {self._metric}" if changes else f"is above {reference}"
        below = f"lowers {self._metric}" if changes else f"is below {reference}"
        if gains:
            found.append(f"{name} {above} for {self._effects(gains, at)}.")
        if losses:
            found.append(f"{name} {below} for {self._effects(losses, at)}.")
        elif others:
            groups = f"{'other ' if worst else ''}groups of {self._family}"
            found.append(
                f"For the {groups}, no loss from {name} was found."
                if changes
                else f"{name} was not found to be below {reference} for the {groups}."
            )
        return found

    def _is_trained(self, name: str, reference: str) -> bool:
        """Whether a difference is the effect of a method, and not one between two systems."""
        return LIST not in (self._contents.row(name).kind, self._contents.row(reference).kind)

    def _sentence(self, name: str, reference: str, where: str, row: dict[str, Any]) -> str:
        label = self._label[where]
        if not row["star"]:
            return (
                f"For {label}, no difference between {name} and {reference} was found: "
                f"{_effect(row)}.{self._seeds(name, where, row)}"
            )
        if not self._is_trained(name, reference):
            place = "above" if row["difference"] > 0 else "below"
            return (
                f"{name} is {place} {reference} for {label}: {self._metric} is {row['mean']:.4f} "
                f"against {row['baseline']:.4f}, {_effect(row)}."
            )
        verb = "raises" if row["difference"] > 0 else "lowers"
        return (
            f"{name} {verb} {self._metric} for {label} from {row['baseline']:.4f} ({reference}) to "
            f"{row['mean']:.4f}, {_effect(row)}.{self._seeds(name, where, row)}"
        )

    def _seeds(self, name: str, where: str, row: dict[str, Any]) -> str:
        """What the seeds say of a difference, or nothing."""
        table = self._contents.over_seeds
        found = records(table[(table["name"] == name) & (table["slice"] == where)])
        if not found:
            return ""
        [over] = found
        told = f" Over {over['seeds']} seeds: {over_seeds(over['difference'], over['half'])}"
        if row["star"] and abs(over["difference"]) <= over["half"]:
            told += ", so it may not be found with other seeds"
        return f"{told}."

    def _effects(self, names: Sequence[str], at: dict[str, dict[str, Any]]) -> str:
        return listed([f"{self._label[name]} ({_short(at[name])})" for name in names])

    def _baselines(self, subject: str) -> list[str]:
        """The subject against the best baseline of each group."""
        best = best_baselines(self._contents, subject, [slices.OVERALL, *self._judged])
        parts: dict[str, list[str]] = {_BETTER: [], _WORSE: [], _NONE: []}
        for where, row in best.items():
            part = _BETTER if row["difference"] > 0 else _WORSE
            told = f"{self._label[where]} ({row['name']}, {_short(row)})"
            parts[part if row["star"] else _NONE].append(told)
        sentences = [f"{part} {listed(told)}." for part, told in parts.items() if told]
        if not sentences:
            return []
        return [
            f"{subject} is compared with the baseline without training that is best for each "
            f"group. {' '.join(sentences)}"
        ]


def best_baselines(
    contents: Contents, subject: str, wanted: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The test of a row against the baseline with the highest mean, by slice.

    If that baseline is the report's reference, it is the test that the other sentences quote.
    """
    tests = contents.baseline_tests.get(subject, pd.DataFrame(columns=["slice"]))
    known = contents.tests[contents.tests["name"] == subject]
    found = {}
    for where in wanted:
        rows = records(tests[tests["slice"] == where])
        if not rows:
            continue
        found[where] = max(rows, key=lambda row: row["mean"])
        if found[where]["name"] == contents.reference:
            same = records(known[known["slice"] == where])
            found[where] |= {key: same[0][key] for key in ("star", "q") if same}
    return found


def _named(label: str) -> str:
    """A group's label in a sentence: in quotation marks if it is more than a word."""
    return label if re.fullmatch(r"[\w.*+-]*\w[\w.*+-]*", label) else f"'{label}'"


def _effect(row: dict[str, Any]) -> str:
    """`difference +0.0123, 95 % interval +0.0010 to +0.0236, q 0.003`."""
    shown = f"difference {signed(row['difference'])}"
    if np.isnan(row["low"]):
        few = "differ" if "q" in row else "have a value above 0"
        return f"{shown}, too few users {few} for an interval"
    shown += f", 95 % interval {interval(row)}"
    if "q" not in row:
        return shown
    return f"{shown}, q {row['q']:.3f}" if row["q"] >= 0.001 else f"{shown}, q below 0.001"


def _short(row: dict[str, Any]) -> str:
    """`+0.0123, 95 % interval +0.0010 to +0.0236`."""
    shown = signed(row["difference"])
    return shown if np.isnan(row["low"]) else f"{shown}, 95 % interval {interval(row)}"


def interval(row: dict[str, Any]) -> str:
    """The interval of a difference: `+0.0010 to +0.0236`; `-` without one."""
    return "-" if np.isnan(row["low"]) else f"{signed(row['low'])} to {signed(row['high'])}"


def signed(value: float) -> str:
    """A difference to four digits with its sign; 0 has none."""
    shown = f"{value:+.4f}"
    return shown if float(shown) else "0.0000"


def over_seeds(difference: float, half: float) -> str:
    """A mean difference over seeds, and the half-width of its 95 % interval: `+0.0449 ± 0.0060`."""
    return f"{signed(difference)} ± {half:.4f}"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMED
    if more > 1:
        return f"{', '.join(names[:_NAMED])} and {more} more"
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
