"""The experiments on a data set: the paper's sweep over methods, one over all objectives of the
package, and the search for the model."""

from collections.abc import Callable

from ml_collections import ConfigDict

from seqfair_jax.data.groups import PRODUCT, UNION
from seqfair_jax.objectives.builtin import BUILT_IN
from seqfair_jax.objectives.field import FIELD
from seqfair_jax.paper.settings import at_paper_size
from seqfair_jax.sweeps.grid import default_sweep
from seqfair_jax.sweeps.search_plan import add_space, empty_search

DataSet = Callable[[str, str | None], ConfigDict]  # one of `settings`


def sweep(data_set: DataSet, arg: str | None) -> ConfigDict:
    """All of the paper's experiments on a data set, for `seqfair reproduce`: 85 runs.

    `scale=small` has fewer values. On Retailrocket it chooses them with one seed, trains the chosen
    ones with three seeds, and adds objectives over intersecting groups. On MovieLens-1M, whose runs
    take longer, it trains ERM, CVaR, GDRO and SDRO with one seed.
    """
    given = {"groups"} & {part.partition("=")[0] for part in (arg or "").split(",")}
    config = data_set("erm", arg)
    config.sweep = default_sweep()
    if at_paper_size(arg):  # section 3.1 and appendix B
        config.sweep.alpha = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
        config.sweep.step_size = (1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
        config.sweep.radius = (1.0,)
        if given:
            config.sweep.families = config.groups
        return config
    config.sweep.families = config.groups
    config.sweep.alpha = (0.5, 0.8, 0.95)
    config.sweep.step_size = (1e-3, 1e-2)
    config.sweep.radius = (0.1,)
    config.sweep.runs_per_job = 1
    if config.data.name == "ml1m":
        config.sweep.methods = ("erm", "cvar", "gdro", "sdro")
        return config
    config.seeds = (0, 1, 2)
    config.sweep.methods += ("chi2",)
    config.sweep.one_seed_methods = ("cb", "cb_log", "ipw", "ipw_log", "chi2")
    config.sweep.choice_seeds = 1
    if len(config.groups) > 1:
        config.sweep.intersections = tuple(sign.join(config.groups) for sign in (PRODUCT, UNION))
    return config


def field(data_set: DataSet, arg: str | None) -> ConfigDict:
    """All objectives of the package on a data set, for `seqfair reproduce`.

    Each tries the values that it declares (`HParam.search`), and group methods train on each family
    of `groups`. IPW counts users: by rows it would be ERM, since the groups of the paper's families
    have equal numbers of rows. `scale=small` chooses the values with one seed, and trains the
    chosen ones with three.
    """
    config = data_set("erm", arg)
    config.objective.count_by = "users"
    config.sweep = default_sweep()
    config.sweep.methods = tuple(method.name for method in (*BUILT_IN, *FIELD))
    config.sweep.families = config.groups
    if not at_paper_size(arg):
        config.seeds = (0, 1, 2)
        config.sweep.choice_seeds = 1
        config.sweep.runs_per_job = 1
    return config


def backbone(data_set: DataSet, arg: str | None) -> ConfigDict:
    """The search for a data set's model by ERM's validation score, for `seqfair search`.

    At the paper's size it tries every combination of appendix B, and stops a run after 200 epochs
    without a better validation NDCG@20. `scale=small` draws from lists around the small model, and
    trains for a few epochs.
    """
    config = data_set("erm", arg)
    config.search = empty_search()
    if at_paper_size(arg):
        config.train.early_stop_epochs = 200
        config.search.sampler = "grid"
        config.search.prune = False
        texts = {
            "model.dim": "128,256",
            "model.ff_dim": "128,256",
            "model.num_blocks": "1,2,3",
            "model.num_heads": "1,2,4",
            "model.dropout": "0.1,0.2,0.5",
            "train.batch_size": "128,256",
        }
    else:
        config.train.epochs = 5
        texts = {
            "model.dim": "32,64,96",
            "model.num_blocks": "1,2,3",
            "model.num_heads": "1,2",
            "model.dropout": "0:0.5",
            "model.tie_embeddings": "true,false",
            "model.init_scale": "0.02:0.5:log",
            "train.learning_rate": "0.002:0.02:log",
        }
        if config.data.name == "ml1m":
            config.train.epochs = 6
            texts["train.learning_rate"] = "0.004:0.04:log"
    add_space(config.search.space, texts)
    return config
