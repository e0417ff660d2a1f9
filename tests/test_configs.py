import importlib.util
import math
from pathlib import Path

import pytest

from seqfair_jax.sweeps import grid, search
from seqfair_jax.config import default_config, parse_arguments, plan_runs, resolve

CONFIGS = Path(__file__).parents[1] / "configs"
SWEEPS = {"paper_rr", "paper_ml1m"}
SEARCHES = {"backbone_rr", "backbone_ml1m"}
OTHERS = {"paper", *SWEEPS, *SEARCHES}
FILES = sorted(path for path in CONFIGS.glob("*.py") if path.stem not in OTHERS)


def load(name, arg=None):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg), module.__doc__


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch):
    monkeypatch.syspath_prepend(CONFIGS.parent)


def test_there_is_a_config_for_each_method_and_data_set():
    methods = ("erm", "cb", "cb_log", "ipw", "ipw_log", "gdro", "sdro", "cvar")
    expected = {f"{data}_{method}" for data in ("rr", "ml1m") for method in methods}
    assert {path.stem for path in FILES} == expected | {"demo", "own_log"}


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_every_config_is_valid_and_names_its_command(name):
    config, doc = load(name)
    resolve(config)
    assert f"python -m seqfair_jax.main --config=configs/{name}.py" in doc


@pytest.mark.parametrize("name", sorted(SWEEPS))
def test_every_sweep_is_valid_and_names_its_command(name):
    config, doc = load(name, "scale=small,groups=pop33+seq33")
    base, settings = grid.split_config(config)
    resolve(base)
    assert settings.families == ("pop33", "seq33")
    assert f"python -m seqfair_jax.reproduce --config=configs/{name}.py" in doc


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_every_search_is_valid_and_names_its_command(name):
    config, doc = load(name)
    assert f"python -m seqfair_jax.search --config=configs/{name}.py" in doc
    base, grid, order = search.split_config(config)
    resolve(base)
    # Appendix B: every combination, stopped after 200 epochs without a better validation.
    assert math.prod(map(len, grid.values())) == 216
    assert base.train.early_stop_epochs == 200
    assert not order
    assert set(grid) == {
        "model.dim", "model.ff_dim", "model.num_blocks", "model.num_heads", "model.dropout",
        "train.batch_size",
    }  # fmt: skip
    base, grid, order = search.split_config(load(name, "scale=small")[0])
    base.update_from_flattened_dict({key: values[0] for key, values in grid.items()})
    assert resolve(base).train.decay_steps == base.train.epochs * base.train.steps_per_epoch
    assert set(order) == set(grid)
    assert set(order) >= {"model.tie_embeddings", "model.init_scale", "train.learning_rate"}


@pytest.mark.parametrize(
    ("name", "dropout", "batch_size", "epochs", "mask_seen", "valid_users"),
    [("rr_sdro", 0.2, 128, 1000, False, 10_000), ("ml1m_sdro", 0.5, 256, 700, True, None)],
)
def test_the_papers_settings(name, dropout, batch_size, epochs, mask_seen, valid_users):
    config = resolve(load(name)[0])
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
    }
    train = config.train
    assert (train.batch_size, train.epochs, train.steps_per_epoch) == (batch_size, epochs, 128)
    assert (train.learning_rate, train.weight_decay, train.clip_norm) == (1e-3, 0, 0)
    assert train.early_stop_epochs == 0
    assert config.evaluate.mask_seen is mask_seen
    assert config.data.valid_users == valid_users
    assert config.objective.absent_groups == "decay"
    assert config.objective.count_by == "rows"
    assert config.objective.group_family == "pop33"


def test_arguments_of_the_papers_configs():
    config = load("rr_gdro", "groups=pop2060,init=0.05,tie=1")[0]
    assert config.groups == ("pop2060",)
    assert (config.model.init_scale, config.model.tie_embeddings) == (0.05, True)
    small = load("rr_gdro", "scale=small,groups=seq33+pop33")[0]
    assert (small.model.dim, small.model.num_blocks, small.model.init_scale) == (64, 2, 0.1)
    assert resolve(small).objective.group_family == "seq33"
    with pytest.raises(ValueError, match="did you mean 'groups'"):
        load("rr_gdro", "group=pop33")
    with pytest.raises(ValueError, match="scale=big: expected paper or small"):
        load("rr_gdro", "scale=big")


@pytest.mark.parametrize("name", ["own_log", "rr_cvar"])
def test_the_rate_falls_over_however_many_epochs_are_asked_for(name):
    config = load(name, "scale=small" if name == "rr_cvar" else None)[0]
    config.train.epochs = 40
    assert resolve(config).train.decay_steps == 40 * 256
    config.train.decay_steps = 0
    assert resolve(config).train.decay_steps == 0


def test_parse_arguments():
    assert parse_arguments("a=3,b=x", a=1, b="y", c=0.5).to_dict() == {"a": 3, "b": "x", "c": 0.5}
    for text in ("a=x", "a"):
        with pytest.raises(ValueError, match="expected a=VALUE with a int"):
            parse_arguments(text, a=1)


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
        ({"model.max_len": 1}, "model.max_len is 1: expected 2 or more"),
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
    with pytest.raises(ValueError, match=message):
        resolve(config)


def test_unknown_keys_are_named_with_the_closest():
    config = default_config()
    config.train.unlock()
    config.train.epoch = 3
    with pytest.raises(ValueError, match=r"train\.epoch \(did you mean 'epochs'\?\)"):
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
