"""A seeded synthetic log on which mainstream, mixed and niche users differ in how hard they are."""

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax.errors import UserError
from seqfair_jax.settings import Check, Setting, above, number, whole


def _share(value: float) -> bool:
    return 0 <= value <= 1


_SHARE = Check("a share between 0 and 1", _share)
SETTINGS = (
    Setting("seed", 0, "The seed of the log.", whole(0)),
    Setting("num_users", 12_000, "The number of users.", whole(1)),
    Setting("num_items", 400, "The number of items.", whole(2)),
    Setting(
        "head_share",
        0.2,
        "The head's share of the items. Mainstream users draw from the head.",
        _SHARE,
    ),
    Setting("num_clusters", 4, "How many tastes the tail's items are split into.", whole(1)),
    Setting("kinds", (0.7, 0.1, 0.2), "The shares of mainstream, mixed and niche users."),
    Setting(
        "tail_shares",
        (0.02, 0.4, 0.98),
        "How often each kind of user turns to the tail.",
        Check("shares between 0 and 1", lambda shares: all(map(_share, shares))),
    ),
    Setting("zipf", 1.0, "The exponent of item popularity in the head and in a cluster."),
    Setting("follow", 0.75, "The chance that an item is a successor of the one before.", _SHARE),
    Setting(
        "num_successors",
        3,
        "The number of an item's successors towards the head, and as many towards the tail.",
        whole(1),
    ),
    Setting("successor_zipf", 0.7, "The exponent of item popularity among the successors."),
    Setting("repeat", 0.1, "The chance that an item is one that the user had before.", _SHARE),
    Setting("mean_length", 16.0, "The mean number of a user's items.", above(0)),
    Setting(
        "length_spread", 0.7, "The standard deviation of the logarithm of that number.", number(0)
    ),
    Setting("max_length", 150, "The most items of a user.", whole(5)),
)


def default_settings() -> dict[str, int | float | tuple[float, ...]]:
    """The settings of `generate`; a config's `data.synthetic`."""
    return {setting.key: setting.default for setting in SETTINGS}


def generate(config: ConfigDict) -> pd.DataFrame:
    """Draw a log; a pure function of the settings.

    Items are a head and a tail, the tail cut into clusters (tastes). A user is of one kind, which
    says how often it turns to the tail, and has one cluster of its own. Its sequence is a Markov
    chain. Each step turns to the tail or to the head. With chance `follow` the next item is one
    of the last item's successors for that turn, with chance `repeat` an earlier item of the user,
    else a new draw from the user's cluster or from the head. Popularity follows Zipf's law,
    lengths are log-normal.

    So the same item leads niche users and mainstream users to different next items. A small model
    learns one set of successors, and the objective decides whose. Item numbers are in order of
    popularity, the most popular first.

    Args:
        config: see `SETTINGS`.

    Returns:
        columns user_id, item_id, timestamp.

    Raises:
        UserError: naming a setting out of range.
    """
    _check(config)
    rng = np.random.default_rng(config.seed)
    num_head = round(config.head_share * config.num_items)
    num_users, clusters = config.num_users, config.num_clusters
    # Part 0 is the head, part 1 + c is cluster c.
    tail = num_head + np.arange(config.num_items - num_head)
    parts = [np.arange(num_head), *np.array_split(tail, clusters)]
    cumulative = [np.cumsum((1 + np.arange(len(items))) ** -config.zipf) for items in parts]
    popularity = (1 + np.arange(config.num_items)) ** -config.successor_zipf
    # Two sets of successors: row 0 for a step towards the head, row 1 towards the tail.
    successors = rng.choice(
        config.num_items,
        (2, config.num_items, config.num_successors),
        p=popularity / popularity.sum(),
    )

    kind = rng.choice(len(config.kinds), num_users, p=config.kinds)
    tail_share = np.asarray(config.tail_shares)[kind]
    own_part = 1 + rng.integers(clusters, size=num_users)
    spread = config.length_spread
    log_mean = np.log(config.mean_length) - spread**2 / 2
    lengths = rng.lognormal(log_mean, spread, num_users).round().astype(int)
    lengths = np.clip(lengths, 5, config.max_length)

    def fresh(to_tail):
        part = np.where(to_tail, own_part, 0)
        drawn = np.empty(num_users, np.int64)
        chance = rng.random(num_users)
        for k in range(clusters + 1):
            here = part == k
            place = np.searchsorted(cumulative[k], chance[here] * cumulative[k][-1])
            drawn[here] = parts[k][place]
        return drawn

    sequences = np.empty((num_users, lengths.max()), np.int64)
    sequences[:, 0] = fresh(rng.random(num_users) < tail_share)
    user = np.arange(num_users)
    for step in range(1, sequences.shape[1]):
        to_tail = rng.random(num_users) < tail_share
        which = rng.integers(config.num_successors, size=num_users)
        following = successors[to_tail.astype(int), sequences[:, step - 1], which]
        earlier = sequences[user, rng.integers(step, size=num_users)]
        choice = rng.random(num_users)
        sequences[:, step] = np.where(
            choice < config.follow,
            following,
            np.where(choice < config.follow + config.repeat, earlier, fresh(to_tail)),
        )
    real = np.arange(sequences.shape[1])[None, :] < lengths[:, None]
    user_id, timestamp = np.nonzero(real)
    return pd.DataFrame({"user_id": user_id, "item_id": sequences[real], "timestamp": timestamp})


def _check(config: ConfigDict) -> None:
    for setting in SETTINGS:
        setting._replace(key=f"data.synthetic.{setting.key}").require(config[setting.key])
    kinds = np.asarray(config.kinds, float)
    checks = {
        "follow": (config.follow + config.repeat <= 1, "follow + repeat at most 1"),
        "kinds": (
            len(kinds) == len(config.tail_shares)
            and (kinds >= 0).all()
            and abs(kinds.sum() - 1) < 1e-6,
            "shares that add up to 1, as many as tail_shares",
        ),
    }
    for key, (good, expected) in checks.items():
        if not good:
            raise UserError(f"data.synthetic.{key} is {config[key]}: expected {expected}")
