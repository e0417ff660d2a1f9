import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqfair_jax import objectives
from seqfair_jax.config import default_config, parse_arguments, plan_runs, resolve
from seqfair_jax.config.files import load_config
from seqfair_jax.errors import HelpRequested, UserError
from seqfair_jax.sweeps import grid, search_plan

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
SWEEPS = ("paper_ml1m", "paper_rr", "field_ml1m", "field_rr")
SEARCHES = ("backbone_ml1m", "backbone_rr")
OF_ONE_METHOD = [name for name in NAMES if name not in (*SWEEPS, *SEARCHES)]


def load(name, arguments=None):
    return load_config(f"{CONFIGS / name}.py" + (f":{arguments}" if arguments else ""))


def docstring(name):
    return (CONFIGS / f"{name}.py").read_text().split('"""')[1]


def test_there_is_a_config_for_each_method_and_data_set():
    methods = ("erm", "cb", "cb_log", "ipw", "ipw_log", "gdro", "sdro", "cvar")
    expected = {f"{data}_{method}" for data in ("rr", "ml1m") for method in methods}
    assert set(OF_ONE_METHOD) == expected | {"demo", "ml100k", "own_log"}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads_from_another_folder(name, tmp_path, monkeypatch):
    """Without the checkout on the path, as `seqfair` starts."""
    root = CONFIGS.parent
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != root])
    monkeypatch.chdir(tmp_path)
    assert not any(name.split(".")[0] == "configs" for name in sys.modules)
    config = load(name)
    assert resolve_runs(config).seeds == (0,)


def resolve_runs(config):
    """The resolved settings of a config's runs."""
    if "sweep" in config:
        config = grid.split_sweep(config)[0]
    elif "search" in config:
        config = search_plan.split_search(config).base
    return resolve(config)


@pytest.mark.parametrize("name", OF_ONE_METHOD)
def test_every_config_names_its_command(name):
    assert re.search(rf"seqfair train --config={name}[ :]", docstring(name))


def test_a_config_of_one_method_does_not_import_sweeps_or_plots():
    code = """
import sys
from seqfair_jax.config.files import load_config
import seqfair_jax.commands.train
for file in sys.argv[1:]:
    load_config(file)
avoided = ("seqfair_jax.sweeps", "seqfair_jax.report.html", "matplotlib")
print([name for name in sys.modules if name.startswith(avoided)])
"""
    files = [str(CONFIGS / f"{name}.py") for name in OF_ONE_METHOD]
    command = [sys.executable, "-c", code, *files]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_is_valid_and_names_its_command(name):
    base, settings = grid.split_sweep(load(name, "scale=small,groups=pop33+seq33"))
    resolve(base)
    assert settings.families == ("pop33", "seq33")
    assert re.search(rf"seqfair reproduce --config={name}[ :]", docstring(name))


@pytest.mark.parametrize("name", ["field_ml1m", "field_rr"])
def test_the_sweep_of_all_objectives_trains_each_with_its_values(name):
    base, sweep = grid.split_sweep(load(name, "scale=small,groups=seq33"))
    assert base.objective.count_by == "users"  # by rows, IPW is ERM on seq33
    jobs = grid.plan(base, sweep, runs_per_job=50)
    assert {job.method for job in jobs} == set(objectives.METHODS)
    for method in objectives.METHODS.values():
        runs = [run for job in jobs if job.method == method.name for run in plan_runs(job.config)]
        tried = {tuple(run.hparams.values()) for run in runs}
        values = [hparam.search or (hparam.default,) for hparam in method.hparams]
        assert tried == set(itertools.product(*values))
        assert len(runs) == len(tried)  # with one seed


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_is_valid_and_names_its_command(name):
    assert f"seqfair search --config={name} " in docstring(name)
    plan = search_plan.split_search(load(name))
    resolve(plan.base)
    # Appendix B: every combination, stopped after 200 epochs without a better validation.
    assert len(plan.first()) == 216
    assert plan.base.train.early_stop_epochs == 200
    assert (plan.sampler, plan.prune) == ("grid", False)
    assert set(plan.space) == {
        "model.dim", "model.ff_dim", "model.num_blocks", "model.num_heads", "model.dropout",
        "train.batch_size",
    }  # fmt: skip
    plan = search_plan.split_search(load(name, "scale=small"))
    assert (plan.sampler, plan.prune) == ("tpe", True)
    config = resolve(plan.config(plan.first()[0]))
    assert config.train.decay_steps == config.train.epochs * config.train.steps_per_epoch
    assert set(plan.space) >= {"model.tie_embeddings", "model.init_scale", "train.learning_rate"}


@pytest.mark.parametrize(
    ("name", "dropout", "batch_size", "epochs", "mask_seen", "valid_users"),
    [
        ("rr_sdro", 0.2, 128, 1000, False, 10_000),
        ("ml1m_sdro", 0.5, 256, 700, True, 0),  # 0: all of them
    ],
)
def test_the_papers_settings(name, dropout, batch_size, epochs, mask_seen, valid_users):
    config = resolve(load(name))
    model = config.model.to_dict()
    assert model == {
        "dim": 256,
        "ff_dim": 256,
        "num_blocks": 3,
        "num_heads": 1,
        "dropout": dropout,
        "max_len": 200,
        "tie_embeddings": False,
        "init_scale": 1.0,
        "dtype": "float32",
        "gated": False,
        "position_bias": False,
        "item_bias": False,
        "pointer": False,
        "neighbours": 0,
    }
    train = config.train
    assert (train.random_windows, train.average_decay) == (False, 0)
    assert (train.batch_size, train.epochs, train.steps_per_epoch) == (batch_size, epochs, 128)
    assert (train.learning_rate, train.weight_decay, train.clip_norm) == (1e-3, 0, 0)
    assert train.decay_steps == 0  # a constant rate
    assert train.early_stop_epochs == 0
    assert config.evaluate.mask_seen is mask_seen
    assert config.data.valid_users == valid_users
    assert config.objective.absent_groups == "decay"
    assert config.objective.count_by == "rows"
    assert config.objective.group_family == "pop33"


def differences(config, other):
    config, other = resolve(config), resolve(other)
    parts = ("model", "train", "evaluate", "select")
    return {
        f"{part}.{key}": value
        for part in parts
        for key, value in config[part].items()
        if other[part][key] != value
    }


def test_the_small_size_is_the_default_recipe():
    recipe = default_config()
    assert differences(load("rr_cvar", "scale=small"), recipe) == {}
    assert differences(load("own_log", "method=cvar"), recipe) == {}
    train = resolve(recipe).train
    assert (train.learning_rate, train.epochs, train.steps_per_epoch) == (0.01, 6, 256)
    assert train.decay_steps == 6 * 256
    assert recipe.model.init_scale == 0.1
    # MovieLens-1M has its own search.
    assert differences(load("ml1m_cvar", "scale=small"), recipe) == {
        "model.dropout": 0.1, "train.learning_rate": 0.02, "train.batch_size": 64,
        "train.epochs": 16, "train.decay_steps": 16 * 256, "evaluate.mask_seen": True,
    }  # fmt: skip


def test_arguments_of_the_papers_configs():
    config = load("rr_gdro", "groups=pop2060,init=0.05,tie=1")
    assert config.groups == ("pop2060",)
    assert (config.model.init_scale, config.model.tie_embeddings) == (0.05, True)
    small = load("rr_gdro", "scale=small,groups=seq33+pop33")
    assert (small.model.dim, small.model.num_blocks, small.model.init_scale) == (64, 2, 0.1)
    assert resolve(small).objective.group_family == "seq33"
    with pytest.raises(UserError, match="did you mean 'groups'"):
        load("rr_gdro", "group=pop33")
    with pytest.raises(UserError, match="scale=big: expected paper or small"):
        load("rr_gdro", "scale=big")
    assert load("rr_gdro").objective.user_loss == "mean"
    assert load("rr_gdro", "loss=text").objective.user_loss == "sum"
    with pytest.raises(UserError, match="loss=table: expected tables or text"):
        load("rr_gdro", "loss=table")
    with pytest.raises(UserError, match="model=mix: expected plain, mixture or best"):
        load("rr_gdro", "model=mix")
    parts = [
        (load(name, "model=mixture").model.pointer, load(name, "model=mixture").model.neighbours)
        for name in ("rr_gdro", "ml1m_erm", "own_log")
    ]
    assert parts == [(True, 256), (False, 256), (True, 256)]
    assert not load("rr_gdro").model.pointer
    best = load("ml1m_erm", "scale=small,model=best")
    assert (best.model.pointer, best.model.neighbours, best.model.gated) == (False, 256, True)
    assert best.train.average_decay == load("own_log", "model=best").train.average_decay == 0.995
    assert best.model.dim == 128
    assert load("rr_gdro", "scale=small,model=best").train.batch_size == 256
    assert load("rr_gdro", "model=best").train.batch_size == 128
    with pytest.raises(UserError, match="model=mix: expected plain, mixture or best"):
        load("own_log", "model=mix")


@pytest.mark.parametrize("name", ["own_log", "rr_cvar"])
def test_the_rate_falls_over_all_epochs(name):
    config = load(name, "scale=small" if name == "rr_cvar" else None)
    config.train.epochs = 40
    assert resolve(config).train.decay_steps == 40 * 256
    config.train.decay_steps = 0
    assert resolve(config).train.decay_steps == 0


def test_parse_arguments():
    assert parse_arguments("a=3,b=x", a=1, b="y", c=0.5).to_dict() == {"a": 3, "b": "x", "c": 0.5}
    for text in ("a=x", "a"):
        with pytest.raises(UserError, match="expected a=VALUE with a whole number$"):
            parse_arguments(text, a=1)
    with pytest.raises(UserError, match="argument 'a=2': a is given twice"):
        parse_arguments("a=1,b=1,a=2", a=0, b=0)
    with pytest.raises(UserError, match=r"unknown key 'd'; known, with their defaults: a=1, b=y$"):
        parse_arguments("d=1", a=1, b="y")
    with pytest.raises(HelpRequested, match="this config, with their defaults: a=1, b=y$"):
        parse_arguments("help", a=1, b="y")
    with pytest.raises(HelpRequested, match="with their defaults: none$"):
        parse_arguments("help")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.name": "gdr"}, "objective.name is 'gdr'.*did you mean 'gdro'"),
        ({"data.name": "mnist"}, "data.name is 'mnist'"),
        ({"objective.alpha": (0.0,)}, "objective.alpha is 0.0"),
        ({"objective.alpha": (1.5,)}, "objective.alpha is 1.5"),
        ({"objective.step_size": (0.0,)}, "objective.step_size is 0.0"),
        ({"objective.step_size": (-1.0,)}, "objective.step_size is -1.0"),
        ({"objective.radius": (0.5, 0.5)}, "objective.radius.*unequal"),
        ({"objective.alpha": (0.1, 0.2)}, "objective.alpha has 2 values, but erm does not read"),
        ({"select.metric": "NDGC@20"}, "unknown metric 'NDGC@20'"),
        ({"model.max_len": 1}, "model.max_len is 1: expected a whole number, 2 or more"),
        ({"model.num_heads": 3}, "model.dim is 64: expected a multiple of model.num_heads"),
        ({"model.dropout": 1.0}, "model.dropout"),
        ({"model.dtype": "float16"}, "model.dtype is 'float16'.*did you mean"),
        ({"train.epochs": 0}, "train.epochs is 0"),
        ({"evaluate.cutoffs": (0,)}, "evaluate.cutoffs"),
        ({"seeds": (0, 0)}, "seeds"),
    ],
)
def test_bad_settings_are_named(changes, message):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_unknown_keys_are_named_with_the_closest():
    config = default_config()
    config.train.unlock()
    config.train.epoch = 3
    with pytest.raises(UserError, match=r"train\.epoch \(did you mean '?(train\.)?epochs'?\?\)"):
        resolve(config)


def test_resolve_changes_nothing_in_its_argument():
    config = default_config()
    before = config.to_json()
    config.groups = ("pop33,seq33",)
    assert resolve(config).groups == ("pop33", "seq33")
    assert config.groups == ("pop33,seq33",)
    config.groups = ("pop33", "seq33")
    assert config.to_json() == before


def test_the_grid_of_runs():
    config = default_config()
    config.objective.name = "sdro"
    config.objective.step_size = (0.1, 0.01)
    config.seeds = (4, 5)
    runs = plan_runs(resolve(config))
    assert [run.name for run in runs] == [
        "step_size=0.1,seed=4",
        "step_size=0.1,seed=5",
        "step_size=0.01,seed=4",
        "step_size=0.01,seed=5",
    ]
    assert runs[2].hparams["step_size"] == 0.01
