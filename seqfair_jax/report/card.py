"""The model card of an exported run, as Markdown: its data, its figures by group and its limits.

The functions here prepare sentences and tables; `card.md.j2` is the text of the card.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd

from seqfair_jax import workdir
from seqfair_jax.config import PATHS, flatten
from seqfair_jax.data.split import describe_split
from seqfair_jax.data.times import with_date
from seqfair_jax.evaluation import significance, slices
from seqfair_jax.report import names, text
from seqfair_jax.report.rows import FEWEST_SHOWN, HIDDEN, judged_groups
from seqfair_jax.training.selection import RULES

_PERIOD = ("first_time", "last_time")  # of a split
SMALL_GROUP = 100  # users; the figures of smaller groups are marked


class Mean(NamedTuple):
    """The mean of a metric over the users of a slice, and its interval."""

    users: int
    mean: float
    low: float
    high: float


def model_card(
    folder: Path, rule: str, exported: Mapping[str, Any], *, show_small_groups: bool = False
) -> str:
    """The card of a run, as Markdown. Names from the data are escaped.

    A refit has no test: the figures of its card are those of the run that was judged.

    Args:
        folder: of the finished run.
        rule: the epoch that was exported, of `selection.RULES`.
        exported: what `serving.export.write` returned.
        show_small_groups: do not hide the figures of groups of fewer than `FEWEST_SHOWN` users.

    Raises:
        UserError: naming a file of the run that cannot be read.
    """
    summary = workdir.read_summary(folder)
    config = workdir.read_json(folder / workdir.CONFIG) or {}
    refit = summary.get("refit")
    tested, rule = (folder / workdir.JUDGED, refit["rule"]) if refit else (folder, rule)
    of_test = workdir.read_summary(tested)
    suffix = RULES[rule].suffix
    metric = config["select"]["metric"]
    table = pd.read_parquet(workdir.per_user(tested, suffix))
    rows = significance.describe(table, metric)
    found = {str(name): Mean(*row) for name, *row in rows.itertuples()}
    fewest = 0 if show_small_groups else FEWEST_SHOWN
    min_users = max(config["select"]["min_users"], fewest)
    few = {name for name, row in found.items() if name != slices.OVERALL and row.users < fewest}
    kinds = {slices.REPEAT, slices.NEW}  # each follows from the other one
    few |= kinds if few & kinds else set()
    shown = {name: row for name, row in found.items() if name not in few}
    baselines = {name: means[metric] for name, means in of_test["baselines"].items()}
    split = summary["dataset"]["split"]
    order = list(of_test["test" + suffix][metric])
    families = slices.families_in(order)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("seqfair_jax.report", ""),
        autoescape=False,  # Markdown has its own markup
        finalize=_escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("card.md.j2").render(
        fence=text.Markdown("```"),
        dataset=summary["dataset"],
        split=describe_split(split),
        method=names.of_summary(summary),
        summary=summary,
        best=of_test["best" + suffix],
        chosen="overall" if rule == "overall" else "for the worst group",
        refit=refit,
        judged_folder=Path(refit["folder"]).name if refit else None,  # paths are of this machine
        judged=of_test["dataset"],
        judged_split=describe_split(of_test["dataset"]["split"]),
        judged_period=[with_date(of_test["dataset"]["split"][key]) for key in _PERIOD],
        metric=metric,
        model=config["model"],
        mixture=text.Markdown(_mixture(config["model"])),
        exported=exported,
        overall=_group_table(
            found, shown, [slices.OVERALL, slices.REPEAT, slices.NEW], baselines, metric
        ),
        groups={
            slices.family_label(family): _group_table(
                found, shown, slices.groups_in(order, family), baselines, metric
            )
            for family in families
        },
        metrics=_metrics_table(of_test, suffix),
        worst=[_worst_group(shown, family, baselines, metric, min_users) for family in families],
        beaten=_beaten(shown, baselines),
        is_hidden=len(shown) < len(found),
        fewest_shown=FEWEST_SHOWN,
        small=[
            f"{slices.full_label(name)} ({found[name].users:,.0f} users)"
            for family in families
            for name in slices.groups_in(order, family)
            if name in found and found[name].users < SMALL_GROUP
        ],
        small_group=SMALL_GROUP,
        period=[with_date(split[key]) for key in _PERIOD],
        families=[slices.family_label(family) for family in families],
        popularity=_popularity(tested, of_test["recommended" + suffix]),
        settings=_settings_table(config),
    )


def _escaped(value: Any) -> Any:
    return text.escape_markdown(value) if isinstance(value, str) else value


def _mixture(model: Mapping[str, Any]) -> str:
    """What the softmax is mixed with; empty without a mixture. An earlier run has neither key."""
    parts = ["a pointer to the user's own items"] * bool(model.get("pointer"))
    parts += ["the items that were near the history's in training"] * bool(model.get("neighbours"))
    if not parts:
        return ""
    return (
        f"Its softmax over the items is mixed with {' and with '.join(parts)}, so a score is the "
        "logarithm of a probability. "
    )


def _settings_table(config: Mapping[str, Any]) -> text.Markdown:
    """The settings that were used, without paths."""
    is_drawn = config["data"]["name"] == "synthetic"
    rows = [
        [key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for key, value in flatten(config)
        if value not in (None, "", []) and key not in PATHS
        if is_drawn or not key.startswith("data.synthetic.")
    ]
    return text.Markdown(text.markdown_table(["setting", "value"], rows))


def _group_table(
    found: Mapping[str, Mean],
    shown: Collection[str],
    wanted: Sequence[str],
    baselines: Mapping[str, slices.Slices],
    metric: str,
) -> text.Markdown:
    """A row for each slice: its users, the mean with its interval, and the baselines' means.

    The figures of slices that are not in `shown` are hidden.
    """
    wanted = [name for name in wanted if name in found]
    rows = []
    for name, label in zip(wanted, slices.labels(wanted), strict=True):
        row = found[name]
        if name not in shown:
            rows.append([label, f"{row.users:,.0f}", HIDDEN, *["-"] * (1 + len(baselines))])
            continue
        own = [label, f"{row.users:,.0f}", f"{row.mean:.4f}", _interval(row)]
        rows.append(own + [_figure(means.get(name)) for means in baselines.values()])
    header = ["group", "users", metric, "95 % interval", *map(names.baseline_name, baselines)]
    return text.Markdown(text.markdown_table(header, rows))


def _metrics_table(summary: Mapping[str, Any], suffix: str) -> text.Markdown:
    """A row for each metric: over all users, of the model and of the baselines."""
    baselines = summary["baselines"]
    rows = [
        [metric, _figure(means[slices.OVERALL])]
        + [_figure(of[metric][slices.OVERALL]) for of in baselines.values()]
        for metric, means in summary["test" + suffix].items()
    ]
    header = ["metric", "model", *map(names.baseline_name, baselines)]
    return text.Markdown(text.markdown_table(header, rows))


def _worst_group(
    found: Mapping[str, Mean],
    family: str,
    baselines: Mapping[str, slices.Slices],
    metric: str,
    min_users: int,
) -> str:
    """A sentence about the group with the lowest mean, of a family's groups of `min_users`.

    Args:
        found: the slices whose figures are shown.
        family, baselines, metric: of the sentence.
        min_users: smaller groups are ignored.
    """
    sizes = {name: int(row.users) for name, row in found.items()}
    judged = judged_groups(sizes, family, min_users=min_users)
    if len(judged) < 2:
        only = f"only {slices.full_label(judged[0])}" if judged else "no group"
        return (
            f"{slices.family_label(family)}: {only} has at least {min_users:,} tested users, so "
            "none can be called worst."
        )
    worst = min(judged, key=lambda name: found[name].mean)
    row = found[worst]
    best = max(baselines, key=lambda name: baselines[name].get(worst) or 0)
    return (
        f"{slices.full_label(worst)}: {metric} is {row.mean:.4f} (95 % interval: "
        f"{_interval(row)}) for {row.users:,.0f} users, and {found[slices.OVERALL].mean:.4f} "
        f"for all users. The best untrained baseline of this group is "
        f"{names.baseline_name(best)} with {_figure(baselines[best].get(worst))}."
    )


def _beaten(found: Mapping[str, Mean], baselines: Mapping[str, slices.Slices]) -> list[str]:
    """The slices where an untrained baseline has a higher mean than the model, and which."""
    beaten = []
    for name, row in found.items():
        better = {of: means.get(name) or 0 for of, means in baselines.items()}
        best = max(better, key=better.__getitem__)
        if better[best] > row.mean:
            beaten.append(
                f"{slices.full_label(name)} ({names.baseline_name(best)} {better[best]:.4f}, "
                f"model {row.mean:.4f})"
            )
    return beaten


def _popularity(folder: Path, recommended: Mapping[str, slices.Slices]) -> dict[str, str]:
    """How popular the recommended items are, beside the items of the training rows.

    Args:
        folder: of the run.
        recommended: of `summary.json`.
    """
    rows = pd.read_parquet(folder / workdir.ITEMS)["training_rows"].to_numpy(np.float64)
    overall = {name: means[slices.OVERALL] for name, means in recommended.items()}
    shown = {name: value for name, value in overall.items() if value is not None}
    return {
        "coverage": next(f"{100 * v:.1f} %" for k, v in shown.items() if k.startswith("coverage@")),
        "cutoff": next(k.partition("@")[2] for k in shown if k.startswith("coverage@")),
        "recommended": next(
            f"{v:,.1f}" for k, v in shown.items() if k.startswith("mean_popularity@")
        ),
        "viewed": f"{(rows**2).sum() / rows.sum():,.1f}",
        "average": f"{rows.mean():,.1f}",
    }


def _interval(row: Mean) -> str:
    return "none, too few hits" if np.isnan(row.low) else f"{row.low:.4f} to {row.high:.4f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
