import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from seqfair_jax import __main__, workdir
from seqfair_jax.report.card import model_card

METRIC = "NDCG@20"
_MIXTURE = ("pointer", "neighbours")  # settings of the model
EXPORTED = {
    "format": "jax", "shape": None, "run": "seed=0", "max_k": 80, "mask_seen": False,
    "items": 80, "parameters": 1234, "window": 12, "platforms": ["cpu"],
    "versions": {"seqfair_jax": "1.2.3", "jax": "4.5.6", "flatbuffers": "7"},
}  # fmt: skip


def rows_of(card, heading):
    """The cells of the tables below a line of the card, up to the next text."""
    lines = iter(card.splitlines())
    next(line for line in lines if line == heading)
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif table:
            break
    return table[:1] + table[2:]


@pytest.fixture(scope="module")
def folder(finished):
    return finished().folder


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


@pytest.fixture(scope="module")
def card(folder):
    return model_card(folder, "overall", EXPORTED)


@pytest.mark.parametrize("rule", ["overall", "worst_group"])
def test_every_group_has_its_size_its_mean_and_its_interval(rule, folder):
    card = model_card(folder, rule, EXPORTED)
    suffix = "" if rule == "overall" else "_worst_group"
    users = pd.read_parquet(folder / f"per_user{suffix}.parquet")
    baselines = workdir.read_summary(folder)["baselines"]
    header, *rows = rows_of(card, "Groups of pop33:")
    assert header == ["group", "users", METRIC, "95 % interval", *(f"[{b}]" for b in baselines)]
    assert {row[0] for row in rows} == set(users.pop33)
    for group, size, mean, interval, *others in rows:
        values = users[METRIC][users.pop33 == group]
        assert size == str(len(values))
        assert mean == f"{values.mean():.4f}"
        low, high = map(float, interval.split(" to "))
        assert low < values.mean() < high
        # About two standard errors on each side.
        assert (high - low) / 4 == pytest.approx(values.sem(), rel=0.15, abs=1e-3)
        expected = [means[METRIC][f"pop33={group}"] for means in baselines.values()]
        assert others == [f"{mean:.4f}" for mean in expected]
    [header, *rows] = rows_of(card, "All metrics, over all users:")
    assert [row[0] for row in rows] == list(baselines["markov"])
    [[_, size, mean, *_], *_] = rows_of(card, "## Results")[1:]
    assert (size, mean) == (str(len(users)), f"{users[METRIC].mean():.4f}")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"pointer": True, "neighbours": 0}, "mixed with a pointer to the user's own items, so"),
        ({"pointer": False, "neighbours": 9}, "mixed with the items that were near the history's"),
        ({"pointer": True, "neighbours": 9}, "own items and with the items that were near"),
        ({"pointer": False, "neighbours": 0}, None),
        ({}, None),  # of an earlier version
    ],
)
def test_the_card_says_what_the_softmax_is_mixed_with(model, expected, copied):
    config = workdir.read_json(copied / workdir.CONFIG)
    kept = {key: value for key, value in config["model"].items() if key not in _MIXTURE}
    workdir.write_json(copied / workdir.CONFIG, config | {"model": kept | model})
    card = model_card(copied, "overall", EXPORTED)
    assert "times. " in card
    assert (expected or "times. It was trained with") in card
    assert ("32-bit floats, and the neighbours of each item |" in card) == bool(
        model.get("neighbours")
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"gated": True}, "1 gated block of width 8"),
        ({"position_bias": True}, "1 block of width 8 and a bias of attention by distance"),
        ({}, "1 block of width 8"),
    ],
)
def test_the_card_says_what_the_blocks_have(model, expected, copied):
    config = workdir.read_json(copied / workdir.CONFIG)
    del config["model"]["gated"], config["model"]["position_bias"]  # as an earlier version
    workdir.write_json(copied / workdir.CONFIG, config | {"model": config["model"] | model})
    assert f"with {expected}. It sees" in model_card(copied, "overall", EXPORTED)


def test_the_card_names_item_biases(copied):
    sentence = "A learned number of each item is added to its score. "
    assert sentence not in model_card(copied, "overall", EXPORTED)
    config = workdir.read_json(copied / workdir.CONFIG)
    config["model"]["item_bias"] = True
    workdir.write_json(copied / workdir.CONFIG, config)
    assert sentence in model_card(copied, "overall", EXPORTED)


def test_the_worst_group_stands_beside_its_best_baseline(card, folder):
    users = pd.read_parquet(folder / "per_user.parquet")
    means = users.groupby("pop33")[METRIC].mean()
    worst = means.idxmin()
    baselines = workdir.read_summary(folder)["baselines"]
    best = max(baselines, key=lambda name: baselines[name][METRIC][f"pop33={worst}"])
    [line] = [line for line in card.splitlines() if line.startswith(f"- pop33={worst}: ")]
    assert f"{METRIC} is {means.min():.4f}" in line
    assert f"for {(users.pop33 == worst).sum()} users" in line
    assert f"[{best}] with {baselines[best][METRIC][f'pop33={worst}']:.4f}." in line


def test_small_groups_do_not_compete_for_the_worst(copied):
    config = workdir.read_json(copied / "config.json")
    users = pd.read_parquet(copied / "per_user.parquet")
    sizes = users.seq33.value_counts()
    means = users.groupby("seq33")[METRIC].mean()

    def line(least):
        config["select"]["min_users"] = least
        workdir.write_json(copied / "config.json", config)
        card = model_card(copied, "overall", EXPORTED)
        [found] = re.findall(r"^- (seq33.*(?:best untrained|called worst).*)$", card, re.MULTILINE)
        return found

    second = int(sizes.iloc[1])
    assert line(second).startswith(f"seq33={means[sizes.index[:2]].idxmin()}: NDCG@20 is ")
    assert line(second + 1) == (
        f"seq33: only seq33={sizes.index[0]} has at least {second + 1} tested users, so none can "
        "be called worst."
    )
    assert line(10_000).startswith("seq33: no group has at least 10,000 tested users, so none")


def test_figures_of_groups_of_few_users_are_hidden(copied):
    config = workdir.read_json(copied / "config.json")
    config["select"]["min_users"] = 1
    workdir.write_json(copied / "config.json", config)
    users = pd.read_parquet(copied / "per_user.parquet")
    users[METRIC] = 0.5
    users["seq33"] = "long"
    for group, size, value in (("short", 4, 0.1234), ("medium", 5, 0.2345)):
        users.loc[users.index[-size:], ["seq33", METRIC]] = group, value
        users = users.iloc[np.roll(np.arange(len(users)), size)].reset_index(drop=True)
    users.to_parquet(copied / "per_user.parquet")
    summary = workdir.read_summary(copied)
    for means in summary["baselines"].values():
        means[METRIC] |= {"seq33=short": 0.9876}
    workdir.write_json(copied / "summary.json", summary)
    card = model_card(copied, "overall", EXPORTED)
    header, *rows = rows_of(card, "Groups of seq33:")
    cells = {row[0]: row[1:] for row in rows}
    assert cells["short"] == ["4", "hidden: fewer than 5 users", *["-"] * (len(header) - 3)]
    assert cells["medium"][:2] == ["5", "0.2345"]
    assert "0.1234" not in card
    assert "0.9876" not in card
    assert "- seq33=medium: NDCG@20 is 0.2345 " in card
    assert "The figures of groups with fewer than 5 users are left out" in card
    card = model_card(copied, "overall", EXPORTED, show_small_groups=True)
    assert "hidden" not in card
    assert "are left out" not in card.partition("## Limits")[2]
    assert "- seq33=short: NDCG@20 is 0.1234 " in card
    assert "- seq33=short ([most_popular] 0.9876, model 0.1234)" in card


def test_it_says_where_a_baseline_is_better(copied):
    summary = workdir.read_summary(copied)
    for means in summary["baselines"].values():
        means[METRIC] = dict.fromkeys(means[METRIC], 0.0)
    workdir.write_json(copied / "summary.json", summary)
    card = model_card(copied, "overall", EXPORTED)
    assert "The model is better than every untrained baseline" in card
    summary["baselines"]["markov"][METRIC]["seq33=long"] = 0.75
    workdir.write_json(copied / "summary.json", summary)
    card = model_card(copied, "overall", EXPORTED)
    assert (
        "An untrained baseline has a higher figure than the model for (no test is made here):"
        in card
    )
    assert "- seq33=long ([markov] 0.7500, model 0." in card


def test_the_data_the_split_and_the_limits_are_said(card, folder):
    summary = workdir.read_summary(folder)
    assert f"`{summary['dataset']['log_hash']}`" in card
    found = summary["dataset"]
    assert f"`{found['log_hash']}`" in card
    assert f"has {found['users']} users, {found['items']} items and" in card.replace("\n", " ")
    assert re.search(r"interactions, from \d\S* to \d\S*\. \d", card)
    assert "Leave-one-out split" in card
    users = pd.read_parquet(folder / "per_user.parquet")
    small = users.pop33.value_counts()
    small = small[small < 100]
    for group, size in small.items():
        assert f"pop33={group} ({size} users)" in card
    counts = pd.read_parquet(folder / "items.parquet").training_rows
    stats = {name: means["overall"] for name, means in summary["recommended"].items()}
    assert f"{100 * stats['coverage@20']:.1f} % of the items" in card
    assert f"{stats['mean_popularity@20']:,.1f} training rows on average" in card
    assert f"{(counts**2).sum() / counts.sum():,.1f}, and an" in card
    settings = dict(rows_of(card, "## Settings")[1:])
    assert settings["model.dim"] == "8"
    assert settings["groups"] == "pop33, seq33"
    assert not {"data.path", "data.cache_dir", "data.group_file", "train.init_from"} & set(settings)


def test_the_card_of_an_onnx_program_says_what_it_needs(folder):
    versions = {"seqfair_jax": "1", "onnxruntime": "2.3", "jax2onnx": "4.5"}
    own = {"format": "onnx", "shape": [3, 1024], "platforms": ["onnxruntime"]}
    card = model_card(folder, "overall", EXPORTED | own | {"versions": versions})
    assert 'pip install "onnxruntime>=2.3" numpy' in card
    assert "It scores 3 histories at once" in card
    assert "items i32[3, 1024], lengths i32[3]" in card
    assert "params.npz" not in card


def test_names_from_the_data_are_no_markup(copied):
    bad = "<b>|`x`_*\n[a](b)"
    encoded = json.dumps(bad)[1:-1]
    text = (copied / "summary.json").read_text()
    text = text.replace("pop33=niche", f"pop33={encoded}")
    (copied / "summary.json").write_text(
        text.replace('"name": "synthetic"', f'"name": "{encoded}"')
    )
    users = pd.read_parquet(copied / "per_user.parquet")
    users["pop33"] = users["pop33"].replace("niche", bad)
    users.to_parquet(copied / "per_user.parquet")
    card = model_card(copied, "overall", EXPORTED)
    shown = r"\<b>\|\`x\`\_\*\\n[a\](b)"
    assert shown in [row[0] for row in rows_of(card, "Groups of pop33:")]
    assert {len(row) for row in rows_of(card, "Groups of pop33:")} == {10}
    assert f"# Model card: ERM on {shown}" in card.splitlines()
    assert "<b>" not in card.replace(r"\<b>", "")
    assert f"pop33={shown}" in card


def test_the_command_is_listed():
    assert "export" in __main__.COMMANDS
