import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pandas as pd
import pytest
from test_run import small

from seqfair_jax import workdir
from seqfair_jax.paper import plans, settings as paper
from seqfair_jax.report import runs as report_runs
from seqfair_jax.sweeps import cost as costs
from seqfair_jax.sweeps import grid, jobs
from seqfair_jax.config import plan_runs, resolve
from seqfair_jax.training.experiment import build_experiment
from seqfair_jax.paper.reproduce import reproduce

TESTS = Path(__file__).parent


def tiny(**changes):
    config = small()
    config.sweep = grid.default_sweep()
    config.sweep.methods = ("erm", "gdro", "cvar")
    config.sweep.families = ("pop33", "seq33")
    config.sweep.alpha = (0.3, 0.6)
    config.sweep.step_size = (0.01,)
    config.update_from_flattened_dict(changes)
    return config


def planned(config, runs_per_job=1000):
    return grid.plan(*grid.split_config(config), runs_per_job=runs_per_job)


@pytest.mark.parametrize("data_set", [paper.retailrocket, paper.ml1m])
def test_the_papers_85_runs_and_their_sharing(data_set):
    planned = planned(plans.sweep(data_set, None))
    runs = {job.name: len(plan_runs(job.config)) for job in planned}
    assert sum(runs.values()) == 85
    assert len(planned) == 28
    assert [runs[name] for name in ("erm", "cb", "cb_log", "cvar")] == [1, 1, 1, 10]
    for family in ("pop33", "pop2060", "pop1080", "seq33", "seq2060", "seq1080"):
        assert [runs[f"{m}-{family}"] for m in ("ipw", "ipw_log", "gdro", "sdro")] == [1, 1, 5, 5]
    assert all(len(job.config.groups) == 6 for job in planned)


@pytest.mark.parametrize(
    ("seeds", "most", "sizes"),
    [((0,), 4, [4, 4, 2]), ((0, 1, 2), 7, [6] * 5), ((0, 1, 2), 2, [2, 1] * 10)],
)
def test_no_call_holds_more_runs_than_allowed_and_none_is_lost(seeds, most, sizes):
    config = plans.sweep(paper.retailrocket, None)
    config.seeds = seeds
    planned = [job for job in planned(config, most) if job.method == "cvar"]
    runs = [plan_runs(job.config) for job in planned]
    assert [len(part) for part in runs] == sizes
    pairs = {(run.hparams["alpha"], run.seed) for part in runs for run in part}
    assert len(pairs) == 10 * len(seeds)
    assert len({job.name for job in planned}) == len(planned)


def seeds_of(planned):
    return {job.name: tuple(run.seed for run in plan_runs(job.config)) for job in planned}


def test_values_are_tried_on_the_first_seeds_and_the_chosen_go_on_with_the_rest():
    config = tiny(**{
        "seeds": (0, 1, 2), "sweep.choice_seeds": 1, "sweep.one_seed_methods": ("gdro",),
    })  # fmt: skip
    base, settings = grid.split_config(config)
    first = grid.plan(base, settings, runs_per_job=8)
    assert seeds_of(first) == {
        "erm": (0,), "gdro-pop33": (0,), "gdro-seq33": (0,), "cvar": (0, 0)
    }  # fmt: skip
    chosen = [
        ("erm", None, {}),
        ("gdro", "pop33", {"step_size": 0.01}),
        ("cvar", None, {"alpha": 0.6}),
        ("cvar", None, {"alpha": 0.3}),
    ]
    more = grid.plan_chosen(base, settings, chosen, runs_per_job=8)
    # Another choice is another job.
    assert seeds_of(more) == dict.fromkeys(
        ("erm-more_seeds", "cvar-alpha=0.6-more_seeds", "cvar-alpha=0.3-more_seeds"), (1, 2)
    )
    assert more[1].config.objective.alpha == (0.6,)
    assert grid.choice_seeds(base, settings) == (0,)
    # Without the setting every seed tries every value, and nothing is left.
    base, settings = grid.split_config(tiny(seeds=(0, 1, 2)))
    assert seeds_of(grid.plan(base, settings, runs_per_job=8))["cvar"] == (0, 1, 2, 0, 1, 2)
    assert grid.plan_chosen(base, settings, chosen, runs_per_job=8) == []


def test_intersections_train_the_named_methods_at_the_first_familys_values():
    config = tiny(**{
        "seeds": (3, 4),
        "sweep.methods": ("erm", "ipw", "gdro"),
        "sweep.step_size": (0.01, 0.1),
        "sweep.intersections": ("pop33*seq33,pop33&seq33",),
        "sweep.intersection_methods": ("gdro",),
    })  # fmt: skip
    base, settings = grid.split_config(config)
    planned = grid.plan(base, settings, runs_per_job=8)
    assert list(seeds_of(planned)) == ["erm", "ipw-pop33", "ipw-seq33", "gdro-pop33", "gdro-seq33"]
    chosen = [
        ("erm", None, {}),
        ("ipw", "pop33", {}),
        ("gdro", "pop33", {"step_size": 0.1}),
        ("gdro", "seq33", {"step_size": 0.01}),
    ]
    more = grid.plan_chosen(base, settings, chosen, runs_per_job=8)
    assert seeds_of(more) == {
        "gdro-pop33xseq33-step_size=0.1": (3,),
        "gdro-pop33andseq33-step_size=0.1": (3,),
    }
    assert more[1].config.objective.group_family == "pop33&seq33"
    assert {job.config.objective.step_size for job in more} == {(0.1,)}
    # The union's groups are judged as those of its parts.
    assert base.groups == ("pop33", "seq33", "pop33*seq33")


def test_the_hash_of_the_settings_does_not_depend_on_where_the_log_lies():
    def of(**changes):
        return grid.config_hash(*grid.split_config(tiny(**changes)))

    assert len(of()) == 12
    assert of() == of(**{"data.path": "elsewhere"})
    assert len({of(), of(seeds=(1,)), of(**{"sweep.alpha": (0.3,)})}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep.methods": ("erm", "xyz")}, "sweep.methods: 'xyz' is unknown"),
        ({"sweep.alpha": ()}, "sweep.alpha is empty"),
        ({"sweep.runs_per_job": -1}, "sweep.runs_per_job is -1"),
        ({"sweep.methods": ("erm", "erm")}, "sweep.methods is .*expected each name once"),
        ({"sweep.intersections": ("pop33*pop2060",)}, "'pop33.pop2060' is not made of two or more"),
        ({"sweep.intersections": ("seq33",)}, "'seq33' is not made of two or more"),
        ({"sweep.choice_seeds": 2}, "sweep.choice_seeds is 2: expected 0 to 1"),
        ({"sweep.one_seed_methods": ("xyz",)}, "sweep.one_seed_methods: 'xyz' is unknown"),
        ({"sweep.intersection_methods": ("cvar",)}, "cvar looks at no groups"),
        ({"sweep.methods": ("cvar",)}, "expected erm among them"),
        ({"objective.alpha": (0.3,)}, "objective.alpha is .*those of sweep.alpha"),
    ],
)
def test_bad_sweeps_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        grid.split_config(tiny(**changes))
    with pytest.raises(ValueError, match="no `sweep`"):
        grid.split_config(small())


def test_names_given_on_the_command_line_are_split():
    _, settings = grid.split_config(tiny(**{"sweep.methods": ("erm,cvar",)}))
    assert settings.methods == ("erm", "cvar")


def test_memory_and_cost_of_a_plan():
    config = tiny()
    base, settings = grid.split_config(config)
    experiment = build_experiment(resolve(base))
    assert costs.measure_runs_per_job(experiment) > 100  # of a few kilobytes each
    planned = grid.plan(base, settings, runs_per_job=2)
    cost = costs.estimate(planned, experiment, 2)
    assert (cost.runs, cost.steps) == (5, 5 * 2 * 5)
    assert cost.seconds > 0
    assert cost.flop > 0


def test_the_plan_is_printed_and_nothing_made(tmp_path, capsys):
    config = tiny(**{"seeds": (0, 1), "sweep.choice_seeds": 1})
    reproduce(config, tmp_path / "none", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "erm: seed=0",
        "gdro-pop33: step_size=0.01 seed=0",
        "gdro-seq33: step_size=0.01 seed=0",
        "cvar: alpha=0.3,0.6 seed=0",
        "erm-more_seeds: the values that validate best, seed=1",
    ]
    assert lines[-1].startswith("8 planned, 9 runs, 90 steps, ")
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    reproduce(tiny(), folder)
    return folder


def test_tables_and_figures_of_a_sweep(finished, capsys):
    tables = finished / "tables"
    names = {path.name for path in tables.iterdir()}
    for rule in ("overall", "worst_group"):
        for slug in (
            "popularity_groups",
            "sequence-length_groups",
            "intersecting_groups",
            "repeat_and_new_targets",
        ):
            assert f"{rule}-{slug}.csv" in names
        assert {f"{rule}.md", f"{rule}.tex", f"{rule}-change.png", f"{rule}-change.pdf"} <= names
    assert {"table_1.md", "table_1a.csv", "table_1b.csv"} <= names
    summary = workdir.read_json(finished / "jobs" / "erm" / "summary.json")
    assert pd.read_csv(tables / "table_1b.csv")["users"].tolist() == [summary["dataset"]["users"]]
    assert "| pop33 | niche/diverse/popular |" in (tables / "table_1.md").read_text()
    results = pd.read_csv(tables / "results.csv", keep_default_na=False, na_values=[""])
    chosen = results[(results["rule"] == "overall") & (results["slice"] == "overall")]
    assert list(chosen["method"])[:4] == ["erm", "gdro", "gdro", "cvar"]
    means = {}
    for alpha in (0.3, 0.6):
        folder = finished / "jobs" / "cvar" / "runs" / f"alpha={alpha:g},seed=0"
        rows = pd.read_json(folder / "metrics.jsonl", lines=True)
        means[alpha] = rows["val/NDCG@20/overall"].max()
    best = max(means, key=means.get)
    cvar = chosen[chosen["method"] == "cvar"].iloc[0]
    assert cvar["hparams"] == f"alpha={best:g}"
    per_user = pd.read_parquet(
        finished / "jobs" / "cvar" / "runs" / f"alpha={best:g},seed=0" / "per_user.parquet"
    )
    assert cvar["value"] == pytest.approx(per_user["NDCG@20"].mean())


def test_a_finished_sweep_trains_nothing_again(finished, monkeypatch, capsys):
    before = (finished / "tables" / "overall.md").read_text()
    monkeypatch.setattr(worker, "run", lambda *_: pytest.fail("trained again"))
    reproduce(tiny(), finished)
    assert (finished / "tables" / "overall.md").read_text() == before
    with pytest.raises(ValueError, match="was begun with"):
        reproduce(tiny(**{"sweep.runs_per_job": 1}), finished)
    with pytest.raises(ValueError, match=r"train\.learning_rate"):
        reproduce(tiny(**{"train.learning_rate": 0.5}), finished)


def test_a_whole_sweep_beyond_the_paper_shared_by_two_processes(tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(_SHARED.format(paths=[str(TESTS.parent), str(TESTS)]))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, script, tmp_path / "sweep"]
    both = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    printed = []
    for process in both:
        out, error = process.communicate(timeout=400)
        assert process.returncode == 0, error
        printed.append(out)
    # Each job was trained by one of them, and both ended with the table.
    names = {path.name for path in (tmp_path / "sweep" / "jobs").iterdir()}
    chosen_alphas = {name for name in names if name.startswith("cvar-alpha=")}
    assert names == chosen_alphas | {
        "erm", "erm-more_seeds", "gdro-pop33", "gdro-pop33-step_size=0.01-more_seeds",
        "gdro-seq33", "gdro-seq33-step_size=0.01-more_seeds",
        "gdro-pop33andseq33-step_size=0.01", "cvar",
    }  # fmt: skip
    assert 1 <= len(chosen_alphas) <= 2  # as the two rules agree or not
    trained = re.findall(r"^\[\d+/\d+\] (.+)$", "\n".join(printed), re.MULTILINE)
    assert sorted(trained) == sorted(names)
    assert all("| GDRO_pop33&seq33 |" in out for out in printed)

    tables = tmp_path / "sweep" / "tables"
    results = pd.read_csv(tables / "results.csv", keep_default_na=False, na_values=[""])
    overall = results[results["slice"] == "overall"]
    methods = overall[(overall["rule"] == "overall") & ~overall["method"].str.startswith("[")]
    families = methods["group_family"].fillna("").tolist()
    assert families == ["", "pop33", "seq33", "", "pop33&seq33"]
    assert methods["seeds"].tolist() == [2, 2, 2, 2, 1]
    assert methods["sd"].notna().tolist() == [True, True, True, True, False]
    # Chosen on the first seed alone, though both are reported.
    val = {}
    for alpha in (0.3, 0.6):
        run_folder = tmp_path / "sweep" / "jobs" / "cvar" / "runs" / f"alpha={alpha:g},seed=0"
        rows = pd.read_json(run_folder / "metrics.jsonl", lines=True)
        val[alpha] = rows["val/NDCG@20/overall"].max()
    [hparams] = methods.loc[methods["method"] == "cvar", "hparams"]
    assert hparams == f"alpha={max(val, key=val.get):g}"
    # The general report takes a sweep's folders too, and both seeds of ERM for the baseline.
    planned = sorted((tmp_path / "sweep" / "jobs").iterdir())
    rows = report_runs.compare_folders(planned, tmp_path / "sweep" / "jobs" / "erm", "NDCG@20")
    assert not rows["name"].str.startswith("erm").any()
    one = rows[(rows["slice"] == "overall") & (rows["name"] == f"cvar {hparams}")]
    [sweeps] = methods.loc[methods["method"] == "cvar", "difference"]
    assert one["difference"].item() == pytest.approx(sweeps)
    claims_text = (tables / "overall-claims.md").read_text()
    assert "`cvar` - `gdro(pop33&seq33)`" in claims_text
    assert "`gdro(pop33&seq33)` - `gdro(pop33)`" in claims_text
    assert "settings " in claims_text.splitlines()[2]


def test_a_call_that_another_process_holds_is_waited_for(finished, tmp_path, monkeypatch, capsys):
    job = planned(tiny())[0]
    naps = []

    def nap(_):
        naps.append(1)
        if len(naps) == 2:  # the other process ends, its job done
            folder = tmp_path / "jobs" / job.name
            folder.mkdir(parents=True)
            for name in ("config.json", "summary.json"):
                (folder / name).write_text((finished / "jobs" / job.name / name).read_text())

    monkeypatch.setattr(jobs.time, "sleep", nap)
    monkeypatch.setattr(worker, "run", lambda *_: pytest.fail("trained what another holds"))
    with workdir.lock(workdir.job_lock(tmp_path, job.name)) as ours:
        assert ours
        assert jobs.work([job], tmp_path) == {}
    assert len(naps) == 2
    assert capsys.readouterr().out.count("waiting for 1 planned of other processes") == 1


def test_an_unfinished_call_of_another_config_stops_the_work_before_it_begins(
    tmp_path, monkeypatch
):
    planned = planned(tiny())
    others = planned(tiny(**{"train.learning_rate": 0.5}))
    folder = tmp_path / "jobs" / others[-1].name
    folder.mkdir(parents=True)
    workdir.write_json(folder / "config.json", workdir.jsonable(others[-1].config.to_dict()))
    monkeypatch.setattr(worker, "run", lambda *_: pytest.fail("trained beside another config"))
    with pytest.raises(ValueError, match=r"another config.*train\.learning_rate \(0\.5 there"):
        jobs.work(planned, tmp_path)


def test_what_failed_here_and_another_process_finished_is_no_failure(finished, tmp_path):
    planned = planned(tiny())[:2]
    errors = {job.name: "diverged" for job in planned}
    assert jobs.failures(errors, planned, finished) == ""
    lines = jobs.failures(errors, planned, tmp_path).splitlines()
    assert lines == ["2 of 2 planned failed:", "  erm: diverged", "  gdro-pop33: diverged"]
    assert jobs.done(planned, finished) == planned
    assert jobs.done(planned, tmp_path) == []


def test_without_erm_the_failures_are_told_instead_of_tables(tmp_path, monkeypatch):
    def run(config, folder):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(worker, "run", run)
    with pytest.raises(SystemExit, match=r"no tables.*\n4 of 4 planned failed:\n  erm: RESOURCE"):
        reproduce(tiny(), tmp_path)


def test_a_failing_call_is_reported_when_the_others_are_done(finished, tmp_path, monkeypatch):
    real = jobs.run

    def run(config, folder):
        if config.objective.name == "gdro":
            raise FloatingPointError("diverged")
        return real(config, folder)

    monkeypatch.setattr(worker, "run", run)
    with pytest.raises(SystemExit, match=r"2 of 4 planned failed:\n  gdro-pop33: diverged"):
        reproduce(tiny(), tmp_path)
    text = (tmp_path / "tables" / "overall.md").read_text()
    assert "| CVaR |" in text
    assert "GDRO" not in text


_SHARED = """
import sys
sys.path[:0] = {paths!r}
from test_reproduce import tiny
from seqfair_jax.paper.reproduce import reproduce
reproduce(tiny(**{{
    "seeds": (0, 1), "sweep.choice_seeds": 1,
    "sweep.intersections": ("pop33&seq33",),
}}), sys.argv[1])
"""

_KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
left = int(sys.argv[1])

def counting(real):
    def move(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return move

os.replace, os.rename = counting(os.replace), counting(os.rename)
from test_reproduce import tiny
from seqfair_jax.paper.reproduce import reproduce
reproduce(tiny(), sys.argv[2])
"""


def test_killed_at_ten_moments_it_ends_with_the_same_tables(finished, tmp_path):
    # Every durable write is a rename, so kills before the n-th of them are spread over planning,
    # training, checkpoints, tests and tables; the numbers grow, so that every life gets further.
    script = tmp_path / "sweep.py"
    script.write_text(_KILLED.format(paths=[str(TESTS.parent), str(TESTS)]))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    folder = tmp_path / "sweep"

    def live(moves):
        return subprocess.run(
            [sys.executable, script, str(moves), folder], env=environment, capture_output=True
        )

    kills = [live(moves) for moves in (1, 5, 8, 11, 14, 17, 17, 17, 17, 12)]
    assert [life.returncode for life in kills] == [-signal.SIGKILL] * 10
    last = live(0)
    assert last.returncode == 0, last.stderr.decode()
    for name in ("results.csv", "overall.md", "worst_group.tex"):
        assert (folder / "tables" / name).read_text() == (finished / "tables" / name).read_text()
    assert not list(folder.rglob("*.unfinished*"))
