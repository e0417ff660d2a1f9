"""Every setting of a run, with its default, its meaning and its check."""

import math
import numbers

from ml_collections import ConfigDict

from seqfair_jax import objectives
from seqfair_jax.data import synthetic
from seqfair_jax.data.files import MEMBERS, is_encoding
from seqfair_jax.data.groups import MISSING_GROUP
from seqfair_jax.data.split import SPLITS, TARGETS
from seqfair_jax.data.times import is_time_format
from seqfair_jax.model.sampled_loss import KINDS
from seqfair_jax.model.sasrec import MAX_DROPOUT, PRECISIONS
from seqfair_jax.model.softmax_loss import DEFAULT_MAX_LOGITS
from seqfair_jax.settings import Check, Setting, above, between, build, number, whole

DATA_NAMES = (*MEMBERS, "csv", "synthetic")
UNEQUAL_NUMBERS = Check(
    "unequal numbers",
    lambda values: (
        all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values)
        and len(set(values)) == len(values) > 0
    ),
)
_SEEDS = Check(
    "unequal integers from 0 to 2**32 - 1",
    lambda seeds: (
        all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        and len(set(seeds)) == len(seeds) > 0
    ),
)
_CUTOFFS = Check(
    "whole numbers, 1 or more",
    lambda values: all(type(k) is int and k >= 1 for k in values) and len(values) > 0,
)
_SHARE = Check("a share between 0 and 1", lambda value: 0 < value < 1)
_DELIMITER = Check(
    "one character, such as ';', or tab",
    lambda text: len(text.encode()) <= 1 and text not in tuple('"\r\n'),
)
_ENCODING = Check("an encoding that Python knows, such as cp1252 or utf-16", is_encoding)
_TIME_FORMAT = Check(
    "a strptime format with a year, such as '%d.%m.%Y %H:%M'",
    lambda text: not text or is_time_format(text),
)

# What each part of a config is about, in the order of the help.
PARTS = {
    "": "Runs",
    "data": "The log",
    "data.columns": "The log's columns",
    "data.synthetic": "The synthetic log",
    "model": "The model",
    "objective": "The objective",
    "train": "Training",
    "train.mesh": "The devices of a training",
    "select": "The choice of epochs",
    "evaluate": "The test",
    "search": "A search",  # `sweeps.search_plan`
    "sweep": "A sweep",  # `sweeps.grid`
}


def settings() -> tuple[Setting, ...]:
    """Every setting of a run, in the order of the help."""
    return (*_RUNS, *_DATA, *_SYNTHETIC, *_MODEL, *_objective(), *_TRAIN, *_SELECT, *_EVALUATE)


def default_config() -> ConfigDict:
    """The settings that measure best on two cores (docs/results): the recipe of every config.

    D 64, 2 blocks, one item embedding for input and output with small initial values, and Adam at
    0.01 that falls to 0 over 6 epochs of 256 steps. A larger log needs more epochs.
    """
    config = build(settings())
    decay_over_training(config)
    return config


def decay_over_training(config: ConfigDict) -> None:
    """Let the learning rate fall to 0 over all steps.

    Sets a reference, so `train.decay_steps` follows later changes of the epochs and their steps.
    """
    train = config.train
    train.decay_steps = train.get_ref("epochs") * train.get_ref("steps_per_epoch")


_RUNS = (
    Setting("seeds", (0,), "One run is trained for each seed.", _SEEDS),
    Setting(
        "groups",
        ("pop33", "seq33"),
        "The group families to evaluate: built-in ones, or those of `data.group_file`.",
        resumable=True,
    ),
)
_DATA = (
    Setting("data.name", "synthetic", "Which log is read.", choices=DATA_NAMES),
    Setting(
        "data.title",
        "",
        "What tables and reports call the log. If empty, the name of its file or folder.",
        resumable=True,
    ),
    Setting(
        "data.path",
        None,
        "The log: a file, a folder of parts, or a pattern such as `'logs/2024-*.csv.gz'`.",
        kind=str,
        is_path=True,
        resumable=True,
    ),
    # Resumable, since a name can be spelled in several ways; the log itself is compared.
    Setting(
        "data.columns.user_id",
        "",
        "The user column. If empty, it is found by the usual names.",
        resumable=True,
    ),
    Setting("data.columns.item_id", "", "The item column.", resumable=True),
    Setting("data.columns.timestamp", "", "The time column.", resumable=True),
    Setting(
        "data.columns.event",
        "",
        "The column of events, which `data.events` selects from.",
        resumable=True,
    ),
    Setting(
        "data.columns.rating",
        "",
        "The column of ratings, for `data.min_rating`.",
        resumable=True,
    ),
    Setting(
        "data.delimiter",
        "",
        "What separates the columns of a CSV file. If empty, it is detected.",
        _DELIMITER,
        resumable=True,
    ),
    Setting(
        "data.encoding",
        "",
        "The encoding of the log and of `data.group_file` if they are text. If empty, what the "
        "file's mark says, or UTF-8.",
        _ENCODING,
        resumable=True,
    ),
    Setting(
        "data.time_format",
        "",
        "How times are written, such as `%d.%m.%Y %H:%M`: a strptime format. If empty, times are "
        "numbers or ISO dates.",
        _TIME_FORMAT,
    ),
    Setting("data.events", (), "Read only these events, such as `view,cart`. If empty, read all."),
    Setting(
        "data.min_rating",
        None,
        "Read only rows with this rating or a higher one.",
        Check("a finite number", math.isfinite),
        kind=float,
    ),
    Setting(
        "data.since",
        None,
        "The first time to read: an ISO date, or a number if the log has numbers.",
        kind=str,
    ),
    Setting("data.until", None, "Rows at this time or later are not read.", kind=str),
    Setting(
        "data.missing",
        "error",
        "What to do with a row without user, item or time: `error` stops with an error, `drop` "
        "leaves the row out and counts it.",
        choices=("error", "drop"),
    ),
    Setting(
        "data.repeats",
        "keep",
        "What to do with a row that has the user, item and time of an earlier row: `keep` keeps "
        "it, `drop` leaves it out and counts it.",
        choices=("keep", "drop"),
    ),
    Setting(
        "data.min_interactions",
        5,
        "The number of distinct items that each user needs, and of distinct users that each item "
        "needs (k-core). 1 turns the filter off.",
        whole(0),
    ),
    Setting(
        "data.split",
        "leave_one_out",
        "What is held out: each user's last rows, all rows after a point in time, or the rows of "
        "`data.valid_path` and `data.test_path`.",
        choices=SPLITS,
    ),
    Setting(
        "data.targets",
        "first",
        "Of a split by time or by files: judge each user's first later event, or every later item.",
        choices=TARGETS,
    ),
    Setting(
        "data.test_from",
        None,
        "Of a split by time: test rows are at this time or later. An ISO date, or a number as in "
        "the log.",
        kind=str,
    ),
    Setting(
        "data.valid_from",
        None,
        "Of a split by time: validation rows are from this time until `data.test_from`.",
        kind=str,
    ),
    Setting("data.test_share", 0.1, "Without `data.test_from`: the share of test rows.", _SHARE),
    Setting(
        "data.valid_share",
        0.1,
        "Without `data.valid_from`: the share of validation rows.",
        _SHARE,
    ),
    Setting(
        "data.valid_path",
        None,
        "Of a split by files: the validation rows. A file, a folder or a pattern.",
        kind=str,
        is_path=True,
        resumable=True,
    ),
    Setting(
        "data.test_path",
        None,
        "Of a split by files: the test rows.",
        kind=str,
        is_path=True,
        resumable=True,
    ),
    Setting(
        "data.valid_users",
        10_000,
        "The most users to validate on. They are drawn if there are more. 0: all.",
        whole(0),
    ),
    Setting("data.split_seed", 42, "The seed that draws the validation users.", whole(0)),
    Setting(
        "data.group_file",
        None,
        "Your own user groups: a row for each user and a column for each family.",
        kind=str,
        is_path=True,
        resumable=True,  # the groups themselves are compared with the checkpoint's
    ),
    Setting(
        "data.missing_group",
        "unknown",
        "Where users without a value in the group file are: in a group `unknown`, or in none.",
        choices=tuple(MISSING_GROUP),
    ),
    Setting(
        "data.cache_dir",
        None,
        "The folder where prepared logs are stored. If empty, they are not stored.",
        kind=str,
        is_path=True,
        resumable=True,
        shown="your cache folder",
    ),
)
_SYNTHETIC = tuple(
    setting._replace(key=f"data.synthetic.{setting.key}") for setting in synthetic.SETTINGS
)
_MODEL = (
    Setting("model.dim", 64, "The width. A multiple of `model.num_heads`.", whole(1)),
    Setting("model.ff_dim", 64, "The width of the feed-forward layers.", whole(1)),
    Setting(
        "model.gated",
        False,
        "Blocks with gates, RMSNorm and SwiGLU (LiGR), not those of SASRec.",
    ),
    Setting("model.num_blocks", 2, "The number of transformer blocks.", whole(1)),
    Setting("model.num_heads", 1, "The number of attention heads.", whole(1)),
    Setting("model.dropout", 0.2, "The dropout rate.", between(0, MAX_DROPOUT)),
    Setting(
        "model.max_len",
        200,
        "The window: the model reads a begin token and the newest `model.max_len` - 2 items.",
        whole(2),
    ),
    Setting(
        "model.position_bias",
        False,
        "Add a learned number to each attention logit by how many tokens the two tokens are apart.",
    ),
    Setting("model.tie_embeddings", True, "Use one item embedding for input and output."),
    Setting(
        "model.item_bias",
        False,
        "Add a learned number to each item's score. It starts as log(1 + n) less the mean of all "
        "items, where n is the number of the item's training rows.",
    ),
    Setting(
        "model.init_scale", 0.1, "The standard deviation of the initial embeddings.", number(0)
    ),
    Setting(
        "model.dtype",
        "float32",
        "The precision of the computations. Parameters are always float32.",
        choices=tuple(PRECISIONS),
    ),
    Setting(
        "model.pointer",
        False,
        "Mix the scores of the catalogue with a pointer to the user's own items, for logs where "
        "users return to items.",
    ),
    Setting(
        "model.neighbours",
        0,
        "How many neighbours of each item of the history are mixed with the scores of the "
        "catalogue: the items that were nearest to it in training. 0: none.",
        whole(0),
    ),
)


def _objective() -> tuple[Setting, ...]:
    known = tuple(objectives.METHODS)
    return (
        Setting("objective.name", "erm", "The objective.", choices=known),
        Setting(
            "objective.group_family",
            "",
            "The group family that the objective uses. If empty, the first of `groups`.",
        ),
        Setting(
            "objective.user_loss",
            "sum",
            "What has equal weight in the loss: with `sum` every target, as in the paper's text; "
            "with `mean` every user, as in the paper's tables. With `mean`, a target of a user "
            "with many targets counts less.",
            choices=objectives.USER_LOSSES,
        ),
        *(
            Setting(
                f"objective.{name}",
                (hparam.default,),
                hparam.help,
                UNEQUAL_NUMBERS._replace(expected=f"unequal numbers {hparam.range}"),
            )
            for name, hparam in objectives.hparams().items()
        ),
        *(
            Setting(f"objective.{name}", option.default, option.help, choices=option.choices)
            for name, option in objectives.options().items()
        ),
    )


_TRAIN = (
    Setting(
        "train.init_from",
        "",
        "The folder of a finished run to start from. If empty, parameters are random.",
        is_path=True,
    ),
    # Without a value, so that a run of a version without these two can be resumed.
    Setting(
        "train.refit",
        None,
        "The folder of a finished run to train again on all rows of its log, with its settings.",
        kind=str,
        is_path=True,
    ),
    Setting(
        "train.refit_rule",
        None,
        "Of `train.refit`: the rule, `overall` or `worst_group`, that chose the run's epoch. If "
        "empty, `overall`.",
        kind=str,
    ),
    Setting("train.batch_size", 128, "The number of users in a batch.", whole(1)),
    Setting(
        "train.epochs",
        6,
        "The number of epochs. The model is validated after each.",
        whole(1),
        resumable=True,
    ),
    Setting("train.steps_per_epoch", 256, "The number of steps in an epoch.", whole(1)),
    Setting("train.learning_rate", 0.01, "Adam's learning rate at the start.", above(0)),
    Setting(
        "train.decay_steps",
        0,
        "The learning rate falls to 0 over this many steps by a cosine. 0: it is constant.",
        whole(0),
        shown="all steps",  # `decay_over_training`
    ),
    Setting(
        "train.random_windows",
        False,
        "In each step, train on a random window of `model.max_len` - 1 rows of a longer history, "
        "not on the newest window.",
    ),
    Setting("train.weight_decay", 0.0, "The decoupled weight decay.", number(0)),
    Setting(
        "train.average_decay",
        0.0,
        "Validate and keep the average of the parameters over all steps: each step multiplies it "
        "by this number and adds its own parameters times the rest. 0: no average.",
        between(0, 0.99999),
    ),
    Setting("train.clip_norm", 0.0, "The largest norm of the gradient. 0: any.", number(0)),
    Setting(
        "train.early_stop_epochs",
        0,
        "Stop after this many epochs without a better validation score. 0: never.",
        whole(0),
    ),
    Setting(
        "train.loss",
        "full",
        "The loss of a target: the softmax over all items (`full`), or a loss over the target and "
        "a few other items (`sampled`), which is faster for a large catalogue. Validation and "
        "test always rank all items.",
        choices=("full", "sampled"),
    ),
    Setting(
        "train.sampled_loss",
        "softmax",
        "Of `train.loss=sampled`: `softmax` estimates the full softmax by the log-q correction, "
        "`gbce` is the calibrated binary cross-entropy of gSASRec.",
        choices=KINDS,
    ),
    Setting(
        "train.negatives",
        4096,
        "Of `train.loss=sampled`: the items k that are drawn in each step, uniformly, for all "
        "targets of the batch.",
        whole(1),
    ),
    Setting(
        "train.gbce_t",
        0.75,
        "Of `train.sampled_loss=gbce`: the calibration t. 0 is the plain binary cross-entropy, 1 "
        "corrects it fully for the sampling.",
        between(0, 1),
    ),
    Setting(
        "train.max_logits",
        DEFAULT_MAX_LOGITS,
        "The most logits, tokens times items, that a run has in memory. Less saves memory.",
        whole(1),
    ),
    Setting(
        "train.runs_axis",
        "auto",
        "How the runs of a grid train: side by side (`vmap`) or one after another (`map`). "
        "`auto` is `map` on a CPU.",
        choices=("auto", "vmap", "map"),
    ),
    Setting(
        "train.mesh.run",
        1,
        "The number of parts into which the runs of a grid are divided. Each part has its own "
        "devices.",
        whole(1),
        resumable=True,
    ),
    Setting(
        "train.mesh.data",
        1,
        "The number of devices that share the users of a batch, and the rows of the log.",
        whole(1),
        resumable=True,
    ),
    Setting(
        "train.mesh.catalogue",
        1,
        "The number of devices that share the item tables and the logits.",
        whole(1),
        resumable=True,
    ),
    Setting(
        "train.segment_seconds",
        5.0,
        "How many seconds the device works before signals are checked.",
        number(0),
        resumable=True,
    ),
    Setting(
        "train.checkpoint_minutes",
        5.0,
        "The minutes between checkpoints.",
        number(0),
        resumable=True,
    ),
)
_SELECT = (
    Setting(
        "select.metric", "NDCG@20", "The validation metric that chooses epochs and hyperparameters."
    ),
    Setting(
        "select.min_users",
        20,
        "Groups with fewer validation users are ignored when the worst group is chosen. Reports "
        "call groups with fewer test users too small to judge, and the lowest mean and the gap in "
        "`summary.json` ignore them.",
        whole(1),
    ),
)
_EVALUATE = (
    Setting("evaluate.cutoffs", (20,), "The cut-offs of the metrics.", _CUTOFFS, resumable=True),
    # Not resumable, since the best epochs were chosen under it.
    Setting(
        "evaluate.mask_seen",
        False,
        "Never recommend the items of a user's history. Targets among them are still ranked.",
    ),
    Setting(
        "evaluate.batch_size", 256, "The number of users ranked at once.", whole(1), resumable=True
    ),
    Setting(
        "evaluate.neighbour_draws",
        20,
        "How many values the baseline `neighbours` tries on the validation users. 0: leave it out.",
        whole(0),
        resumable=True,
    ),
    Setting(
        "evaluate.ease_items",
        5000,
        "The largest catalogue of the baseline `ease`. Its time grows with the cube of the items, "
        "and its memory with their square. 0: leave it out.",
        whole(0),
        resumable=True,
    ),
)

PATHS = tuple(setting.key for setting in settings() if setting.is_path)
