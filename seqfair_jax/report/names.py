"""What the rows of all tables are called: methods and baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

from seqfair_jax.config import format_value
from seqfair_jax.data.groups import decode_name
from seqfair_jax.evaluation import slices
from seqfair_jax.objectives import METHODS, Log


def method_name(
    method: str,
    family: str = "",
    hparams: Mapping[str, float] | None = None,
    *,
    form: str = "report",
    label: str | None = None,
    settings: Sequence[str] = (),
) -> str:
    """A method, the family of its loss, and in a report its values.

    Args:
        method: the name of an objective, or of a baseline.
        family: of the loss, canonical; "" for a method without groups.
        hparams: the values of the method's hyperparameters.
        form: "report": `GDRO (pop33, step_size 0.01)`. "key": `gdro(pop33)`, with the canonical
            name of the family. "paper": `GDRO_pop33`.
        label: of the method, for an objective that may not be registered here; None for that of
            the registered one.
        settings: `setting_text` of further settings, for "report".
    """
    if form == "key":
        return f"{method}({family})" if family else method
    if label is None:
        label = METHODS[method].label if method in METHODS else method
    if form == "paper":
        return f"{label}_{slices.family_label(family, times='×')}" if family else label
    values = [setting_text(key, format_value(value)) for key, value in (hparams or {}).items()]
    parts = [*([slices.family_label(family)] if family else []), *values, *settings]
    return f"{label} ({', '.join(parts)})" if parts else label


def of_summary(summary: Mapping[str, Any], settings: Sequence[str] = ()) -> str:
    """The "report" form of a run's `method_name`, from its `summary.json`."""
    family = summary["group_family"] if summary["needs_groups"] else ""
    return method_name(
        summary["method"],
        family,
        summary["hparams"],
        label=summary.get("label"),  # not in summaries of earlier versions
        settings=settings,
    )


def setting_text(key: str, value: object) -> str:
    """A setting in the name of a row: `step_size 0.01`."""
    return f"{key} {value}"


def values_text(hparams: Mapping[str, float]) -> str:
    """The values of hyperparameters: `step_size=0.01, stream_rate=0.1`."""
    return ", ".join(f"{key}={format_value(value)}" for key, value in hparams.items())


def logs(summary: Mapping[str, Any]) -> list[Log]:
    """What a run's objective logged by group, from its `summary.json`.

    So the objective need not be registered where the report is made.
    """
    if "logs" not in summary:  # made by an earlier version, which had the built-in objectives
        return list(METHODS[summary["method"]].logs)
    return [Log(**log) for log in summary["logs"]]


def decode_key(name: str) -> str:
    """A `method_name` of the form "key" with the family as its user wrote it."""
    return slices.printable(decode_name(name))


def baseline_name(name: str) -> str:
    """The row of a baseline without training: `[markov]`."""
    return f"[{name}]"


def is_baseline(name: str) -> bool:
    """Whether a row's name is a `baseline_name`."""
    return name.startswith("[")
