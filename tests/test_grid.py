import pandas as pd
import pytest
from runs import small
from sweeps import planned, tiny, write_results

from seqfair_jax import workdir
from seqfair_jax.config import plan_runs
from seqfair_jax.errors import UserError
from seqfair_jax.paper import choice, plans, settings
from seqfair_jax.sweeps import grid

# Families of a group file may have any of these names.
STRANGE = ["../../../../x", "a/b", "/etc/x", ".", "..", "~", "é/ü", "a b", "a:b", "a;b", "a\x00b"]
STRANGE += ["A", "a", "x" * 300, "x" * 299 + "y", ".hidden", "CON", "%2F", "/"]


@pytest.mark.parametrize("data_set", [settings.retailrocket, settings.ml1m])
def test_the_papers_85_runs_and_their_sharing(data_set):
    jobs = planned(plans.sweep(data_set, None))
    runs = {job.name: len(plan_runs(job.config)) for job in jobs}
    assert sum(runs.values()) == 85
    assert len(jobs) == 28
    assert [runs[name] for name in ("erm", "cb", "cb_log", "cvar")] == [1, 1, 1, 10]
    for family in ("pop33", "pop2060", "pop1080", "seq33", "seq2060", "seq1080"):
        assert [runs[f"{m}-{family}"] for m in ("ipw", "ipw_log", "gdro", "sdro")] == [1, 1, 5, 5]
    assert all(len(job.config.groups) == 6 for job in jobs)


@pytest.mark.parametrize(
    ("seeds", "most", "sizes"),
    [((0,), 4, [4, 4, 2]), ((0, 1, 2), 7, [6] * 5), ((0, 1, 2), 2, [2, 1] * 10)],
)
def test_no_job_has_more_runs_than_allowed_and_none_is_lost(seeds, most, sizes):
    config = plans.sweep(settings.retailrocket, None)
    config.seeds = seeds
    jobs = [job for job in planned(config, most) if job.method == "cvar"]
    runs = [plan_runs(job.config) for job in jobs]
    assert [len(part) for part in runs] == sizes
    pairs = {(run.hparams["alpha"], run.seed) for part in runs for run in part}
    assert len(pairs) == 10 * len(seeds)
    assert len({job.name for job in jobs}) == len(jobs)


def seeds_of(jobs):
    return {job.name: tuple(run.seed for run in plan_runs(job.config)) for job in jobs}


def test_first_seeds_try_every_value_and_the_others_train_the_chosen_ones():
    config = tiny(**{
        "seeds": (0, 1, 2), "sweep.choice_seeds": 1, "sweep.one_seed_methods": ("gdro",),
    })  # fmt: skip
    base, sweep = grid.split_sweep(config)
    first = grid.plan(base, sweep, runs_per_job=8)
    assert seeds_of(first) == {
        "erm": (0,), "gdro-pop33": (0,), "gdro-seq33": (0,), "cvar": (0, 0)
    }  # fmt: skip
    chosen = [
        ("erm", None, {}),
        ("gdro", "pop33", {"step_size": 0.01}),
        ("cvar", None, {"alpha": 0.6}),
        ("cvar", None, {"alpha": 0.3}),
    ]
    more = grid.plan_chosen(base, sweep, chosen, runs_per_job=8)
    # Another choice is another job.
    assert seeds_of(more) == dict.fromkeys(
        ("erm-more_seeds", "cvar-alpha=0.6-more_seeds", "cvar-alpha=0.3-more_seeds"), (1, 2)
    )
    assert more[1].config.objective.alpha == (0.6,)
    assert grid.choice_seeds(base, sweep) == (0,)
    # By default every seed tries every value, and there are no further jobs.
    base, sweep = grid.split_sweep(tiny(seeds=(0, 1, 2)))
    assert seeds_of(grid.plan(base, sweep, runs_per_job=8))["cvar"] == (0, 1, 2, 0, 1, 2)
    assert grid.plan_chosen(base, sweep, chosen, runs_per_job=8) == []


def intersections(**changes):
    return tiny(**{
        "seeds": (3, 4),
        "sweep.methods": ("erm", "ipw", "gdro"),
        "sweep.step_size": (0.01, 0.1),
        "sweep.intersections": ("pop33*seq33,pop33&seq33",),
        "sweep.intersection_methods": ("gdro",),
        **changes,
    })  # fmt: skip


def test_intersections_train_the_named_methods_at_the_first_familys_values():
    base, sweep = grid.split_sweep(intersections())
    jobs = grid.plan(base, sweep, runs_per_job=8)
    assert list(seeds_of(jobs)) == ["erm", "ipw-pop33", "ipw-seq33", "gdro-pop33", "gdro-seq33"]
    chosen = [
        ("erm", None, {}),
        ("ipw", "pop33", {}),
        ("gdro", "pop33", {"step_size": 0.1}),
        ("gdro", "seq33", {"step_size": 0.01}),
    ]
    more = grid.plan_chosen(base, sweep, chosen, runs_per_job=8)
    assert seeds_of(more) == {
        "gdro-pop33*seq33-step_size=0.1": (3,),
        "gdro-pop33&seq33-step_size=0.1": (3,),
    }
    assert more[1].config.objective.group_family == "pop33&seq33"
    assert {job.config.objective.step_size for job in more} == {(0.1,)}
    # The groups of the union are those of its parts.
    assert base.groups == ("pop33", "seq33", "pop33*seq33")


def test_an_intersection_keeps_the_first_familys_values_by_each_rule(tmp_path):
    """The two rules disagree about pop33, and each about its own choice on the intersection."""
    base, sweep = grid.split_sweep(intersections(seeds=(3,)))
    overall_of = {  # (family, step size): validation score by the rules overall and worst_group
        ("pop33", 0.01): (0.5, 0.1),
        ("pop33", 0.1): (0.4, 0.3),
        ("pop33&seq33", 0.01): (0.2, 0.9),
        ("pop33&seq33", 0.1): (0.8, 0.05),
    }

    def write(job):
        summaries = []
        for run in plan_runs(job.config):
            step_size = run.hparams["step_size"]
            overall, worst = overall_of[job.family, step_size]
            best = {"epoch": 1, "step": 1, "overall": overall, "worst_group": worst}
            summary = {"status": "finished", "hparams": {"step_size": step_size}}
            summary["group_family"] = job.family
            for suffix in ("", "_worst_group"):
                summary |= {f"best{suffix}": best, f"test{suffix}": {}}
            summaries.append(summary)
        write_results(workdir.job_folder(tmp_path, job.name), job.config, summaries)

    def choose(rule, jobs):
        results = [result for job in jobs for result in choice.read_job(job, tmp_path)]
        entries = choice.choose(results, rule, seeds=(3,), families=sweep.families)
        values = choice.choose_values(results, rule, seeds=(3,), families=sweep.families)
        assert values["gdro", "pop33"] == entries[0].hparams
        return {entry.family: entry.hparams["step_size"] for entry in entries}

    first = [job for job in grid.plan(base, sweep, runs_per_job=8) if job.name == "gdro-pop33"]
    for job in first:
        write(job)
    assert choose("overall", first) == {"pop33": 0.01}
    assert choose("worst_group", first) == {"pop33": 0.1}
    chosen = [("gdro", "pop33", {"step_size": value}) for value in (0.01, 0.1)]
    more = [job for job in grid.plan_chosen(base, sweep, chosen, runs_per_job=8) if "&" in job.name]
    assert len(more) == 2
    for job in more:
        write(job)
    assert choose("overall", [*first, *more]) == {"pop33": 0.01, "pop33&seq33": 0.01}
    assert choose("worst_group", [*first, *more]) == {"pop33": 0.1, "pop33&seq33": 0.1}


def test_only_the_first_seeds_choose_the_values(tmp_path):
    """The other seeds are of the chosen values alone, so their means do not compare."""

    def result(alpha, seed, overall):
        best = {"epoch": 1, "overall": overall, "worst_group": overall}
        own = {"hparams": {"alpha": alpha}, "seed": seed, "best": best}
        return choice.Result("cvar", "", {"status": "finished", "test": {}, **own}, tmp_path)

    results = [result(0.3, 0, 0.5), result(0.6, 0, 0.4), result(0.3, 1, 0.1), result(0.6, 1, 0.9)]
    for seeds, alpha in (((0,), 0.3), ((1,), 0.6), ((0, 1), 0.6)):
        chosen = choice.choose_values(results, "overall", seeds=seeds, families=())
        assert chosen == {("cvar", ""): {"alpha": alpha}}


def test_the_users_of_a_choice_are_those_of_its_rule(tmp_path):
    best = {"epoch": 1, "overall": 0.5, "worst_group": 0.5}
    summary = {"status": "finished", "hparams": {}, "seed": 3, "group_family": "pop33"}
    for suffix in ("", "_worst_group"):
        summary |= {f"best{suffix}": best, f"test{suffix}": {}}
        table = pd.DataFrame({"user_id": [0], "rule": [suffix]})
        workdir.write_parquet(workdir.per_user(tmp_path, suffix), table)
    for rule, suffix in (("overall", ""), ("worst_group", "_worst_group")):
        found = [choice.Result("erm", "", summary, tmp_path)]
        [entry] = choice.choose(found, rule, seeds=(3,), families=())
        assert entry.per_user[3]["rule"].tolist() == [suffix]


def test_a_choice_has_the_family_by_its_name_in_the_results(tmp_path):
    """The columns of tables have that name; a sweep may call the family as the group file does."""
    base, sweep = grid.split_sweep(
        tiny(**{"sweep.families": ("a=b", "pop33"), "sweep.intersections": ("a%3Db*pop33",)})
    )
    [job] = [job for job in grid.plan(base, sweep, runs_per_job=8) if job.name == "gdro-a=b"]
    best = {"epoch": 1, "overall": 0.5, "worst_group": 0.5}
    summary = {"status": "finished", "group_family": "a%3Db", "best": best, "test": {}}
    runs = [summary | {"hparams": run.hparams} for run in plan_runs(job.config)]
    write_results(workdir.job_folder(tmp_path, job.name), job.config, runs)
    results = choice.read_job(job, tmp_path)
    [entry] = choice.choose(results, "overall", seeds=base.seeds, families=sweep.families)
    assert (entry.family, entry.name) == ("a%3Db", "gdro(a%3Db)")


def test_values_that_differ_in_the_last_digit_have_their_own_names():
    close = (0.1234567, 0.1234568)
    config = tiny(**{
        "sweep.methods": ("erm", "cvar", "sdro"), "sweep.alpha": close,
        "sweep.stream_rate": close, "sweep.step_size": (0.1, 0.2, 0.3),
    })  # fmt: skip
    base, sweep = grid.split_sweep(config)
    jobs = grid.plan(base, sweep, runs_per_job=8)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert "sdro-pop33-stream_rate=0.1234567" in names
    assert "sdro-pop33-stream_rate=0.1234568" in names
    [cvar] = [job for job in jobs if job.method == "cvar"]
    runs = [run.name for run in plan_runs(cvar.config)]
    assert runs == ["alpha=0.1234567,seed=0", "alpha=0.1234568,seed=0"]
    config.seeds, config.sweep.choice_seeds = (0, 1), 1
    base, sweep = grid.split_sweep(config)
    chosen = [("cvar", None, {"alpha": value}) for value in close]
    more = grid.plan_chosen(base, sweep, chosen, runs_per_job=8)
    assert [job.name for job in more] == [
        "cvar-alpha=0.1234567-more_seeds", "cvar-alpha=0.1234568-more_seeds"
    ]  # fmt: skip


def test_families_of_any_name_stay_in_the_sweeps_folder(tmp_path):
    config = tiny(**{"sweep.families": tuple(STRANGE), "sweep.choice_seeds": 1, "seeds": (0, 1)})
    base, sweep = grid.split_sweep(config)
    chosen = [("gdro", family, {"step_size": 0.01}) for family in STRANGE]
    jobs = [
        *grid.plan(base, sweep, runs_per_job=1),
        *grid.plan_chosen(base, sweep, chosen, runs_per_job=1),
    ]
    assert len({job.name for job in jobs}) == len(jobs) == 3 + 2 * len(STRANGE)
    for path in (workdir.job_folder, workdir.job_lock):
        places = [path(tmp_path, job.name) for job in jobs]
        assert len(set(places)) == len(jobs)
        assert {place.parent.parent for place in places} == {tmp_path}
        for place in places:
            assert "\0" not in place.name
            assert len(place.name.encode()) < 200
            place.parent.mkdir(exist_ok=True)
            place.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"jobs", "locks"}


@pytest.mark.parametrize("name", ["", *STRANGE])
def test_runs_of_any_name_stay_in_their_folder(name, tmp_path):
    first, second = workdir.run_folders(tmp_path, [name, name + "'"])
    assert first.parent == second.parent == tmp_path / "runs"
    assert first != second
    first.mkdir(parents=True)
    second.mkdir()


def test_the_hash_of_the_settings_does_not_depend_on_where_the_log_is():
    def of(**changes):
        return grid.config_hash(*grid.split_sweep(tiny(**changes)))

    assert len(of()) == 12
    assert of() == of(**{"data.path": "elsewhere", "data.test_path": "there"})
    assert len({of(), of(seeds=(1,)), of(**{"sweep.alpha": (0.3,)})}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep.methods": ("erm", "xyz")}, "sweep.methods: 'xyz' is unknown"),
        ({"sweep.methods": ("erm", "cvra")}, "'cvra' is unknown .did you mean 'cvar'"),
        ({"sweep.alpha": ()}, "sweep.alpha is empty"),
        ({"sweep.alpha": (0.3, 0.3)}, r"sweep.alpha is \(0.3, 0.3\): expected unequal numbers"),
        ({"sweep.alpha": ("x",)}, r"sweep.alpha is \('x',\): expected unequal numbers"),
        ({"sweep.runs_per_job": -1}, "sweep.runs_per_job is -1"),
        ({"sweep.methods": ("erm", "erm")}, "sweep.methods is .*expected each name once"),
        ({"sweep.methods": ("erm,erm",)}, "sweep.methods is .*expected each name once"),
        ({"sweep.families": ("pop33", "pop33")}, "sweep.families is .*expected each name once"),
        ({"sweep.intersections": ("pop33*pop2060",)}, "'pop33.pop2060' does not combine two or"),
        ({"sweep.intersections": ("seq33",)}, "'seq33' does not combine two or more"),
        ({"train.mesh.run": 2}, "train.mesh.run is 2: expected 1"),
        ({"sweep.choice_seeds": 2}, "sweep.choice_seeds is 2: expected 0 to 1"),
        ({"sweep.one_seed_methods": ("xyz",)}, "sweep.one_seed_methods: 'xyz' is unknown"),
        ({"sweep.intersection_methods": ("cvar",)}, "cvar does not use groups"),
        ({"sweep.methods": ("cvar",)}, "expected erm among them"),
        ({"objective.alpha": (0.3,)}, "objective.alpha is .*a sweep ignores it; set sweep.alpha"),
        ({"objective.name": "cvar"}, "objective.name is cvar: a sweep ignores it; set sweep.meth"),
    ],
)
def test_bad_sweeps_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        grid.split_sweep(tiny(**changes))


def test_a_config_without_a_sweep_gets_that_of_the_paper_on_its_own_groups():
    config = small()
    grid.add_defaults(config)
    config.groups = ("pop2060",)  # as a flag does later
    for found in (config, small(groups=("pop2060",))):
        base, sweep = grid.split_sweep(found)
        assert base.groups == sweep.families == ("pop2060",)
        assert sweep.methods == grid.default_sweep().methods
    config.sweep.families = ("seq33",)
    assert config.groups == ("pop2060",)
    assert grid.split_sweep(config)[1].families == ("seq33",)


def test_names_given_on_the_command_line_are_split():
    _, sweep = grid.split_sweep(tiny(**{"sweep.methods": ("erm,cvar",)}))
    assert sweep.methods == ("erm", "cvar")
