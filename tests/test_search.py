import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from runs import rows_of, small, train_command, write_config
from sweeps import Threads

from seqfair_jax import run as runs
from seqfair_jax import workdir
from seqfair_jax.config import flatten, resolve
from seqfair_jax.config.files import load_config
from seqfair_jax.errors import DivergedError, Interrupted, UserError
from seqfair_jax.run import run
from seqfair_jax.sweeps import jobs
from seqfair_jax.sweeps import search as searches
from seqfair_jax.sweeps import study as studies
from seqfair_jax.sweeps.search import search
from seqfair_jax.sweeps.search import train_command as printed_command
from seqfair_jax.sweeps.search_plan import add_defaults, add_space, empty_search, split_search

RATES = {"train.learning_rate": "0.0001:0.1:log", "model.dropout": "0:0.5"}


def searchable(space=RATES, config=None, **settings):
    """A tiny config that varies the settings of `space`, without recompilation where possible."""
    config = config or small(**{"train.epochs": 2, "train.steps_per_epoch": 2})
    config.search = empty_search()
    add_space(config.search.space, space)
    config.search.update(settings)
    return config


class Trainings:
    """Stands in for `run.train`: scores by the config, without training."""

    def __init__(self, score, epochs=2):
        self.score, self.epochs, self.points = score, epochs, []

    def __call__(self, config, folder, *, after_epoch):
        config = resolve(config)
        self.points.append((config.model.dropout, config.train.learning_rate))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        best = None
        for epoch in range(1, config.train.epochs + 1):
            scores = self.score(config, epoch)
            overall, worst = scores if isinstance(scores, tuple) else (scores, scores)
            record = {"epoch": epoch, "overall": overall, "worst_group": worst, "val": {}}
            if best is None or overall > best["overall"]:
                best = record
            snapshot = made(epoch, {"overall": best, "worst_group": record})
            if after_epoch(snapshot):
                break
        return None, snapshot


def made(epoch, *bests, failed=(-1,)):
    """What is read of a snapshot."""
    return types.SimpleNamespace(
        states=types.SimpleNamespace(failed_step=jnp.asarray(failed)),
        progress=types.SimpleNamespace(epoch=epoch, best=list(bests)),
    )


@pytest.fixture
def trainings(monkeypatch):
    def replace(score):
        found = Trainings(score)
        monkeypatch.setattr(runs, "train", found)
        monkeypatch.setattr(runs, "describe", lambda _: None)
        found.log_hash, found.groups_hash = "a", "g"
        monkeypatch.setattr("seqfair_jax.sweeps.search.build_experiment", lambda _: made_of(found))
        return found

    return replace


def peak(config, epoch):
    """Best at a rate of 0.01 and a dropout of 0.2; it rises with the epochs."""
    distance = abs(np.log10(config.train.learning_rate) + 2) + abs(config.model.dropout - 0.2)
    return float(np.exp(-distance)) * epoch / config.train.epochs


def made_of(trainings):
    """What is read of an experiment."""
    family = types.SimpleNamespace(name="pop33", hash=lambda: trainings.groups_hash)
    dataset = types.SimpleNamespace(log_hash=trainings.log_hash)
    return types.SimpleNamespace(families=[], loss_family=family, dataset=dataset)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"log_hash": "b"}, "another log .hash a then, b now"),
        ({"groups_hash": "h"}, "another groups of pop33 .hash g then, h now"),
    ],
)
def test_trials_of_other_inputs_are_not_compared(changed, message, trainings, tmp_path):
    found = trainings(peak)
    search(searchable(), tmp_path / "s", trials_wanted=1)
    vars(found).update(changed)
    with pytest.raises(UserError, match=message):
        search(searchable(), tmp_path / "s", trials_wanted=2)
    assert len(found.points) == 1


def test_trials_of_other_lengths_are_not_compared(trainings, tmp_path):
    found = trainings(peak)
    space = {"train.epochs": "0.5x,1x,2x"}
    search(searchable(space), tmp_path / "s", trials_wanted=1)
    longer = small(**{"train.epochs": 4, "train.steps_per_epoch": 2})
    with pytest.raises(UserError, match=r"train\.epochs \(2 there, 4 now\)"):
        search(searchable(space, longer), tmp_path / "s", trials_wanted=2)
    assert len(found.points) == 1


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A real search of three trials, over two seeds."""
    folder = tmp_path_factory.mktemp("search") / "run"
    changes = {"train.epochs": 2, "train.steps_per_epoch": 2, "seeds": (0, 1), "data.title": "shop"}
    config = searchable({"train.epochs": "1,2,3"}, small(**changes), sampler="grid")
    return folder, config, search(config, folder)


def test_trials_are_ranked_by_validation(searched, capsys, monkeypatch):
    folder, config, table = searched
    assert table["trial"].tolist() == [0, 1, 2]
    assert table["state"].tolist() == ["finished"] * 3
    assert table["train.epochs"].tolist() == [1, 2, 3]
    for _, row in table.iterrows():
        best = [
            max(row["val/NDCG@20/overall"] for row in rows_of(part))
            for part in sorted((folder / "trials" / str(row["trial"]) / "runs").iterdir())
        ]
        assert len(best) == 2
        assert row["val NDCG@20"] == pytest.approx(np.mean(best))
        assert row["epochs"] == row["train.epochs"]
    read = pd.read_csv(folder / "trials.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    assert not any("test" in column for column in table)
    assert not list(folder.rglob("per_user*"))
    assert not list(folder.rglob("summary.json"))
    # The best alone has checkpoints.
    best = int(table["val NDCG@20"].idxmax())
    assert [path.parent.name for path in folder.glob("trials/*/checkpoints")] == [str(best)]
    assert json.loads((folder / "best.json").read_text())["trial"] == best

    # The same command trains nothing again.
    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(search(config, folder), table)
    page = (folder / "search.md").read_text()
    assert page in capsys.readouterr().out
    assert page.startswith("# shop: erm by validation")


def test_the_best_is_tested(searched, tmp_path, capsys):
    folder, config, table = searched
    target = tmp_path / "copy"
    shutil.copytree(folder, target)
    search(config, target, train_best=True)
    best = target / "trials" / str(table["val NDCG@20"].idxmax())
    assert workdir.is_finished(best)
    assert "on the test targets" in capsys.readouterr().out
    by_hand = small(
        **{"train.epochs": int(table["train.epochs"][int(best.name)]),
           "train.steps_per_epoch": 2, "seeds": (0, 1)}
    )  # fmt: skip
    run(by_hand, tmp_path / "by_hand")
    for name in ("seed=0", "seed=1"):
        tested, again = (
            workdir.read_summary(part / "runs" / name) for part in (best, tmp_path / "by_hand")
        )
        assert tested["test"] == again["test"]


def test_the_first_trial_has_the_configs_own_values(tmp_path, trainings):
    found = trainings(peak)
    config = searchable()
    config.train.learning_rate = 0.00123456
    table = search(config, tmp_path, trials_wanted=4)
    assert found.points[0] == (0.0, 0.00123456)
    assert len(set(found.points)) == 4
    assert table["model.dropout"].tolist() == [point[0] for point in found.points]
    # The others have three significant digits.
    assert all(rate == float(f"{rate:.3g}") for _, rate in found.points[1:])


def test_tpe_finds_the_peak(tmp_path, trainings):
    trainings(peak)
    table = search(searchable(), tmp_path, trials_wanted=18)
    best = table.loc[table["val NDCG@20"].idxmax()]
    assert 0.005 < best["train.learning_rate"] < 0.02
    assert best["val NDCG@20"] > 0.8


def test_a_resumed_search_tries_the_same_values(tmp_path, trainings):
    whole = trainings(peak)
    expected = search(searchable(), tmp_path / "whole", trials_wanted=12)
    parts = trainings(peak)
    for number in (1, 5, 12):
        table = search(searchable(), tmp_path / "parts", trials_wanted=number)
    assert parts.points == whole.points
    unequal = ["seconds"]
    pd.testing.assert_frame_equal(table.drop(columns=unequal), expected.drop(columns=unequal))
    other = trainings(peak)
    search(searchable(seed=1), tmp_path / "other", trials_wanted=3)
    assert other.points[1:] != whole.points[1:3]


class Killed(BaseException):
    """The process ends, without any handler."""


def test_a_killed_trial_is_tried_again(tmp_path, trainings):
    whole = trainings(peak)
    expected = search(searchable(), tmp_path / "whole", trials_wanted=4)
    killed = trainings(peak)

    def kill(config, epoch):
        if len(killed.points) == 3 and epoch == 2:
            raise Killed
        return peak(config, epoch)

    killed.score = kill
    with pytest.raises(Killed):
        search(searchable(), tmp_path / "killed", trials_wanted=4)
    written = pd.read_csv(tmp_path / "killed" / "trials.csv")
    assert written["trial"].tolist() == [0, 1]  # written after each trial
    killed.score = peak
    table = search(searchable(), tmp_path / "killed", trials_wanted=4)
    assert killed.points == [*whole.points[:3], *whole.points[2:]]
    assert table["val NDCG@20"].tolist() == expected["val NDCG@20"].tolist()


def test_a_trial_that_kills_its_process_three_times_has_failed(tmp_path, trainings):
    def kill(config, epoch):
        if config.model.dropout == 0.5:
            raise Killed
        return peak(config, epoch)

    trainings(kill)
    config = searchable({"model.dropout": "0,0.5,0.2"}, sampler="grid")
    for _ in range(3):
        with pytest.raises(Killed):
            search(config, tmp_path)
    table = search(config, tmp_path)
    assert table["state"].tolist() == ["finished", "failed", "finished"]
    assert table["error"][1] == "its process ended without a result 3 times"


def test_a_signal_leaves_the_trial_to_the_next_command(tmp_path, trainings):
    config = searchable({"model.dropout": "0.1,0.2"}, sampler="grid")

    def interrupt(config, epoch):
        raise Interrupted("stopped", signal.SIGTERM)

    for _ in range(4):  # however often
        trainings(interrupt)
        with pytest.raises(SystemExit):
            search(config, tmp_path)
    trainings(peak)
    assert search(config, tmp_path)["state"].tolist() == ["finished"] * 2


def test_a_failing_trial_is_recorded(tmp_path, trainings, capsys):
    def diverge(config, epoch):
        if config.model.dropout == 0.5:
            raise DivergedError("every run diverged | a *loss*")
        return peak(config, epoch)

    trainings(diverge)
    config = searchable({"model.dropout": "0.1,0.5,0.2"}, sampler="grid")
    table = search(config, tmp_path)
    assert table["state"].tolist() == ["finished", "failed", "finished"]
    assert table["error"][1] == "every run diverged | a *loss*"
    assert r"trial 1 failed: every run diverged \| a \*loss\*" in capsys.readouterr().out
    trainings(lambda *_: pytest.fail("trained again"))
    search(config, tmp_path)

    config = searchable({"model.dropout": "0.5"}, sampler="grid")
    trainings(diverge)
    with pytest.raises(SystemExit, match=r"no trial has a validation score\n  trial 0: every run"):
        search(config, tmp_path / "none")


def test_a_trial_with_a_diverged_seed_has_failed(tmp_path, monkeypatch, trainings):
    record = {"epoch": 1, "overall": 0.9, "worst_group": 0.9, "val": {}}
    bests = [{"overall": record, "worst_group": record}] * 2
    trainings(peak)

    def train(config, folder, *, after_epoch):
        snapshot = made(1, *bests, failed=(-1, 7))
        assert after_epoch(snapshot)
        return None, snapshot

    monkeypatch.setattr(runs, "train", train)
    with pytest.raises(SystemExit, match="trial 0: diverged at step 7, 1 of 2 seeds"):
        search(searchable(), tmp_path, trials_wanted=1)


def test_a_trial_below_the_median_is_pruned(tmp_path, trainings):
    """Five finish before any is pruned. The sixth is the worst at half of its training."""

    def score(config, epoch):
        return (0.1 if config.model.dropout == 0.5 else 0.3 + config.model.dropout) * epoch

    values = "0.1,0.11,0.12,0.13,0.14,0.5,0.2"
    found = trainings(score)
    config = searchable({"model.dropout": values}, sampler="grid")
    config.train.epochs = 4
    table = search(config, tmp_path / "pruned")
    assert table["state"].tolist() == ["finished"] * 5 + ["pruned", "finished"]
    assert table["epochs"].tolist() == [4] * 5 + [2, 4]  # the first quarter is too early
    assert len(found.points) == 7
    config.search.prune = False
    table = search(config, tmp_path / "whole")
    assert table["epochs"].tolist() == [4] * 7


def test_trainings_of_unequal_lengths_compare_at_the_same_share(tmp_path, trainings):
    """At its second epoch of 8, the long training would be below those that have ended."""

    def score(config, epoch):
        return epoch / config.train.epochs * (1 + config.train.epochs / 100)

    trainings(score)
    config = searchable({"train.epochs": "2,3,4,5,6,8"}, sampler="grid")
    assert search(config, tmp_path)["state"].tolist() == ["finished"] * 6


def test_choice_by_the_worst_group(tmp_path, trainings):
    scores = {0.1: (0.5, 0.1), 0.2: (0.4, 0.3), 0.3: (0.3, 0.2)}
    trainings(lambda config, epoch: scores[config.model.dropout])
    config = searchable({"model.dropout": "0.1,0.2,0.3"}, sampler="grid")
    for by, best in (("overall", 0), ("worst_group", 1)):
        search(config, tmp_path / by, by=by)
        written = json.loads((tmp_path / by / "best.json").read_text())
        assert (written["trial"], written["by"]) == (best, by)
        first = (tmp_path / by / "search.md").read_text().splitlines()[4]
        assert first.startswith(f"| {best} | ")
    with pytest.raises(UserError, match=r"differ: --by \('overall' there, 'worst_group' now\)"):
        search(config, tmp_path / "overall", by="worst_group")


def test_equal_values_are_not_trained_twice(tmp_path, trainings):
    found = trainings(peak)
    table = search(searchable({"model.dropout": "0.1,0.2"}), tmp_path, trials_wanted=6)
    assert len(table) == 6
    assert len(found.points) == 2
    assert table.groupby("model.dropout")["val NDCG@20"].nunique().tolist() == [1, 1]


def test_the_time_ends_the_search_in_the_middle_of_a_trial(tmp_path, trainings, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("seqfair_jax.sweeps.search.time", types.SimpleNamespace(
        monotonic=lambda: now[0]
    ))  # fmt: skip

    def slow(config, epoch):
        now[0] += 1000
        return peak(config, epoch)

    found = trainings(slow)
    table = search(searchable(), tmp_path, hours=1.2)  # 4,320 s: two trials and a half
    assert table["state"].tolist() == ["finished", "finished", "unfinished"]
    assert len(found.points) == 3
    tested = []
    monkeypatch.setattr(runs, "run", lambda config, folder: tested.append(folder.name))
    table = search(searchable(), tmp_path, hours=0.01, train_best=True)
    assert tested == [str(table["val NDCG@20"].idxmax())]
    assert table["state"].tolist() == ["finished", "finished", "unfinished"]
    assert table["model.dropout"][2] == found.points[2][0]
    with pytest.raises(SystemExit, match="no trial finished in the time"):
        search(searchable(), tmp_path / "short", hours=0.1)


def test_the_printed_command_trains_the_best(tmp_path, trainings):
    (tmp_path / "a b").mkdir()
    file = write_config(tmp_path / "a b" / "mine.py", small())
    text = file.read_text().replace(
        "    return config", "    config.train.decay_steps = config.train.get_ref('epochs') * 5\n"
        "    return config"
    )  # fmt: skip
    file.write_text(text)
    config = load_config(str(file))
    config.seeds = (3, 4)
    config = searchable({"train.epochs": "3,4", "model.dropout": "0.25"}, config, sampler="grid")
    trainings(lambda config, epoch: config.train.epochs / 10)
    search(config, tmp_path / "search", config_name=str(file))
    best = json.loads((tmp_path / "search" / "best.json").read_text())
    assert best["command"] == (
        f"seqfair train '--config={file}' --config.seeds=3,4 --config.model.dropout=0.25 "
        f"--config.train.epochs=4 --workdir={tmp_path / 'search' / 'best'}"
    )
    assert best["config"]["train"]["decay_steps"] == 20
    page = (tmp_path / "search" / "search.md").read_text()
    assert page.endswith(
        f"    seqfair train '--config={file}' \\\n        --config.seeds=3,4 \\\n"
        "        --config.model.dropout=0.25 \\\n        --config.train.epochs=4 \\\n"
        f"        --workdir={tmp_path / 'search' / 'best'}\n"
    )
    pasted = page[page.index("    seqfair train") :].replace("seqfair", "printf '%s|'", 1)
    read = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, check=True)
    assert read.stdout.split("|")[:-1] == shlex.split(best["command"])[1:]
    loaded = load_config(str(file))
    loaded.update_from_flattened_dict({"seeds": (3, 4), "model.dropout": 0.25, "train.epochs": 4})
    assert workdir.jsonable(resolve(loaded).to_dict()) == best["config"]
    # Values with spaces are quoted.
    loaded.data.title = "my log"
    assert "'--config.data.title=my log'" in printed_command(loaded, str(file), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (searchable({}), r"search\.space is empty"),
        (searchable({"model.width": "1,2"}), r"search\.space\.model\.width is not a setting"),
        (searchable(sampler="grid"), r"dropout is '0:0\.5', but search\.sampler is grid"),
        (searchable(sampler="bayes"), r"search\.sampler is 'bayes'"),
        (searchable(seed=-1), r"search\.seed is -1"),
    ],
)
def test_bad_searches_are_named(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        search(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_other_errors_of_a_user(tmp_path, trainings, monkeypatch):
    trainings(peak)
    config = searchable()
    with pytest.raises(UserError, match=r"--by is 'worst'.*: expected overall or worst_group"):
        search(config, tmp_path / "a", by="worst")
    with pytest.raises(UserError, match="--trials is -1"):
        search(config, tmp_path / "a", trials_wanted=-1)
    config.search.unlock()
    config.search.points = 3
    with pytest.raises(UserError, match=r"search\.points is not a setting; known: prune, sampler"):
        search(config, tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"has other files and no search\.json"):
        search(searchable(), tmp_path / "a")
    search(searchable(), tmp_path / "b", trials_wanted=1)
    with pytest.raises(UserError, match=r"search\.seed \(0 there, 5 now\)"):
        search(searchable(seed=5), tmp_path / "b")
    with pytest.raises(UserError, match=r"model\.dim \(8 there, 4 now\)"):
        search(searchable(config=small(**{"model.dim": 4})), tmp_path / "b")
    (tmp_path / "b" / "study.db").write_text("not a database, but text" * 100)
    with pytest.raises(UserError, match=r"study\.db: the database of the search cannot be used"):
        search(searchable(), tmp_path / "b")
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "seqfair_jax.sweeps.study")
    monkeypatch.delattr("seqfair_jax.sweeps.study")
    with pytest.raises(UserError, match=r'needs optuna; pip install "seqfair_jax\[search\]"'):
        search(searchable(), tmp_path / "c", trials_wanted=1)
    assert not (tmp_path / "c").exists()


def test_any_folder_name(tmp_path, trainings):
    trainings(peak)
    folder = tmp_path / "a {b} %20?x=1#y &"
    search(searchable(), folder, trials_wanted=1)
    assert (folder / "study.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_only_the_plan(tmp_path, capsys):
    search(searchable(), tmp_path / "none", dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        "model.dropout: 0 to 0.5",
        "train.learning_rate: 0.0001 to 0.1, log scale",
        "first: model.dropout=0, train.learning_rate=0.001",
        "sampler tpe, 50 trials, seeds 0",
    ]
    config = searchable({"model.dim": "4,8", "model.dropout": "0,0.2,0.5"}, sampler="grid")
    search(config, tmp_path / "none", dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        "model.dim: 4, 8",
        "model.dropout: 0, 0.2, 0.5",
        "6 combinations",
        "sampler grid, 6 trials, seeds 0",
    ]
    assert not (tmp_path / "none").exists()


def test_any_config_can_be_searched():
    config = small("cvar")
    add_defaults(config)
    plan = split_search(config)
    assert {"train.learning_rate", "model.dim", "objective.alpha"} <= set(plan.space)
    assert plan.first()[0]["model.dim"] == 8
    # A config that names some settings has no others in its space.
    config = small()
    with config.unlocked():
        config.search = {"space": {"model": {"dim": "4,8"}}}
    add_defaults(config)
    assert set(split_search(config).space) == {"model.dim"}
    assert config.search.sampler == "tpe"
    assert "train.learning_rate" in dict(flatten(config.search.space.to_dict()))


def test_a_reference_follows_the_settings_of_each_trial():
    config = small()
    config.train.decay_steps = config.train.get_ref("epochs") * 3
    plan = split_search(searchable({"train.epochs": "2,4"}, config, sampler="grid"))
    assert [resolve(plan.config(p)).train.decay_steps for p in plan.first()] == [6, 12]
    assert plan.base.train.decay_steps == 6  # as it was


def test_a_config_with_a_search_trains(tmp_path, trainings):
    """So the command that a search prints works for its config too."""
    config = load_config("backbone_rr:scale=small")
    assert "search" in config
    assert resolve(config) == resolve(split_search(config).base)
    assert "search" in config
    trainings(peak)
    search(config, tmp_path, trials_wanted=1, config_name="backbone_rr:scale=small")
    command = json.loads((tmp_path / "best.json").read_text())["command"]
    assert command == f"seqfair train --config=backbone_rr:scale=small --workdir={tmp_path}/best"


def test_two_processes_never_work_on_one_trial(tmp_path):
    plan = split_search(searchable())
    options = {"sampler": "tpe", "seed": 0, "prune": True, "first": plan.first()}
    with (
        studies.opened(tmp_path, plan.space, **options) as one,
        studies.opened(tmp_path, plan.space, **options) as other,
    ):
        with one.claim(2) as first, other.claim(2) as second:
            assert (first.number, second.number) == (0, 1)
            with one.claim(2) as third:
                assert third is None
            assert one.others_work()
            other.finish(second, 0.5, {"overall": 0.5})
        assert not one.others_work()
        with other.claim(2) as again:  # the first claim ended without a result
            assert again.number == 0
            assert again.params == first.params
        assert one.best().number == 1


def test_a_trial_that_ends_before_its_lock_is_taken_is_not_claimed(tmp_path, monkeypatch):
    plan = split_search(searchable())
    options = {"sampler": "tpe", "seed": 0, "prune": True, "first": plan.first()}
    with (
        studies.opened(tmp_path, plan.space, **options) as one,
        studies.opened(tmp_path, plan.space, **options) as other,
    ):
        with other.claim(2) as trial:
            pass
        real = studies.Study.lock

        def lock(self, number, **options):
            if self is one and number == trial.number and one.best() is None:
                other.finish(trial, 0.5, {"overall": 0.5})
            return real(self, number, **options)

        monkeypatch.setattr(studies.Study, "lock", lock)
        with one.claim(2) as claimed:
            assert claimed.number == 1
        assert one.best().number == 0


def test_a_trial_without_its_values_is_not_in_the_table(tmp_path):
    """Another process writes the results while a trial gets its values."""
    plan = split_search(searchable())
    options = {"sampler": "tpe", "seed": 0, "prune": True, "first": plan.first()}
    with studies.opened(tmp_path, plan.space, **options) as study:
        study._study.ask()  # as `claim` does before it draws the values
        table = searches._write(plan, study, tmp_path, "overall", None)
        assert len(table) == 0
        with study.claim(1) as trial:
            assert trial.number == 0
            table = searches._write(plan, study, tmp_path, "overall", None)
        assert table["trial"].tolist() == [0]


def test_workers_find_what_one_process_finds(tmp_path, trainings, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)
    config = searchable({"model.dropout": "0.1,0.2,0.5,0.3,0.4"}, sampler="grid", prune=False)

    def score(config, epoch):
        if config.model.dropout == 0.5:
            raise DivergedError("diverged")
        return peak(config, epoch)

    trainings(score)
    expected = search(config, tmp_path / "one")
    tested = []
    monkeypatch.setattr(runs, "run", lambda config, folder: tested.append(folder.name))
    capsys.readouterr()
    with Threads() as workers:
        table = search(config, tmp_path / "many", train_best=True, workers=workers)
    unequal = ["seconds"]
    pd.testing.assert_frame_equal(table.drop(columns=unequal), expected.drop(columns=unequal))
    line = "[5 of 5 trials: 4 finished, 0 pruned, 1 failed, 0 unfinished; best so far "
    assert line in capsys.readouterr().out
    # A worker tests the best trial, and this process prints its table.
    assert tested == [str(table["val NDCG@20"].idxmax())] * 2


def test_workers_that_begin_after_the_time_train_nothing(tmp_path, trainings):
    found = trainings(peak)
    plan = split_search(searchable())
    for end, expected in ((time.time() - 1, 0), (time.time() + 3600, 2)):
        searches._work_elsewhere(plan, tmp_path, "overall", 2, end, None)
        assert len(found.points) == expected


def test_workers_that_all_fail_end_the_search(tmp_path, trainings, monkeypatch, caplog):
    trainings(peak)
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)

    def fail(*_, **__):
        raise UserError("the disk is full")

    real = studies.opened
    doors = iter([real, fail, fail])  # of this process, and of the workers
    monkeypatch.setattr(studies, "opened", lambda *args, **kwargs: next(doors)(*args, **kwargs))
    with Threads() as workers, pytest.raises(UserError, match="the disk is full"):
        search(searchable(), tmp_path, trials_wanted=2, workers=workers)
    assert caplog.text.count("a worker ended: the disk is full") == 2


def search_command(file, folder, trials):
    command = train_command(file, folder)
    command[command.index("train")] = "search"
    return [*command, f"--trials={trials}", "--config.search.space.model.dim=",
            "--config.search.space.model.num_blocks="]  # fmt: skip


@pytest.mark.slow
def test_sigkill_and_two_processes(tmp_path):
    file = write_config(tmp_path / "mine.py", small(**{"train.epochs": 2}))
    folder = tmp_path / "search"
    command = search_command(file, folder, 6)
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in victim.stdout:
        if re.match("trial 1: model", line):
            break
    time.sleep(1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    table = pd.read_csv(folder / "trials.csv")
    assert table["trial"].tolist() == [0, 1, 2, 3, 4, 5]
    assert set(table["state"]) <= {"finished", "pruned"}
    begun = [re.findall(r"^trial (\d): model", text, re.MULTILINE) for text in printed]
    assert sorted(begun[0] + begun[1]) == ["1", "2", "3", "4", "5"]
    assert all(begun)
