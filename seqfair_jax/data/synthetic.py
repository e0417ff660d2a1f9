"""A seeded synthetic log, in which mainstream and niche users follow different rules."""

import math

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax.errors import UserError
from seqfair_jax.settings import Check, Setting, above, number, whole

_MIN_LENGTH = 5  # of a user, the default k of the k-core filter


def _share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _distribution(values: tuple[float, ...]) -> bool:
    return all(map(_share, values)) and abs(math.fsum(values) - 1) < 1e-6


_SHARE = Check("a share between 0 and 1", _share)
_DISTRIBUTION = Check("shares that add up to 1", _distribution)
SETTINGS = (
    Setting("seed", 0, "The seed of the log.", whole(0)),
    Setting("num_users", 12_000, "The number of users.", whole(1)),
    Setting("num_items", 300, "The number of items.", whole(2)),
    Setting("head_share", 0.2, "The head's share of the items. The tail is the rest.", _SHARE),
    Setting(
        "kinds",
        (0.6, 0.1, 0.3),
        "The shares of mainstream, mixed and niche users.",
        _DISTRIBUTION,
    ),
    Setting(
        "tail_shares",
        (0.02, 0.5, 0.98),
        "How often each kind of user goes by the tail's rule.",
        Check("shares between 0 and 1", lambda shares: all(map(_share, shares))),
    ),
    Setting("popular_zipf", 1.0, "The exponent of the popularity of all items.", number(0)),
    Setting("tail_zipf", 0.3, "The exponent of popularity in the tail's rule.", number(0)),
    Setting(
        "lags",
        (0.1, 0.1, 0.8),
        "How often an item follows the last item, the second last, and so on.",
        _DISTRIBUTION,
    ),
    Setting("follow", 0.8, "The chance that an item follows an earlier one.", _SHARE),
    Setting("num_successors", 2, "The number of an item's successors by each rule.", whole(1)),
    Setting("repeat", 0.03, "The chance that an item is one that the user had before.", _SHARE),
    Setting("mean_length", 16.0, "The mean number of a user's items.", above(0)),
    Setting(
        "length_spread", 0.7, "The standard deviation of the logarithm of that number.", number(0)
    ),
    Setting("max_length", 150, "The most items of a user.", whole(_MIN_LENGTH)),
)


def default_settings() -> dict[str, int | float | tuple[float, ...]]:
    """The settings of `generate`; a config's `data.synthetic`."""
    return {setting.key: setting.default for setting in SETTINGS}


def generate(config: ConfigDict) -> pd.DataFrame:
    """Draw a log; a pure function of the settings.

    The sequences are those of a mixture transition distribution (Raftery 1985): an item follows
    one of the last few items. Users of different kinds go by different rules.

    Items 0 to V-1 are numbered by popularity; the first H, a share head_share, are the head. There
    are two rules, the popular one (s = 0) and the tail's (s = 1):

        p_0(i) ∝ (i + 1)^-popular_zipf          over all items
        p_1(i) ∝ (i + 1 - H)^-tail_zipf         over the tail, i >= H
        S_s(i) = m items drawn from p_s         the successors of item i, fixed for the log

    A user has a kind k ~ pi and a log-normal number of items. Item t of its sequence x is drawn
    so, with s = 1 with chance tau_k, else 0:

        follow       x_t ~ uniform over S_s(x_{t-l}), with the lag l ~ lambda
        repeat       x_t ~ uniform over x_1 .. x_{t-1}
        the rest     x_t ~ p_s, and also where an item that old does not exist

    What each part is for:

    - The lags make the order of the history matter. By default most items follow the third last
      one. So the last item alone says little, and it is not enough to count which items are near
      each other.
    - The two rules give the same item different successors for different users. The kind is not
      in the log; the history shows it. A narrow model cannot learn both rules in full. The mean
      loss favours the rule of the many, and an objective that weighs niche users more favours
      theirs.
    - Users of all kinds follow an earlier item equally often, and have equally long sequences. So
      niche users are served worst since their rule is rarer and spreads over more items.

    Args:
        config: see `SETTINGS`.

    Returns:
        columns user_id, item_id, timestamp (the place in the user's sequence).

    Raises:
        UserError: naming a setting out of range.

    Source:
        Raftery, A model for high-order Markov chains, Journal of the Royal Statistical Society
        B 47 (1985), 528-539. The rules by kind of user are this package's own.
    """
    _check(config)
    rng = np.random.default_rng(config.seed)
    num_users, num_items = config.num_users, config.num_items
    tail_place = np.arange(num_items) - _head_size(config)
    popularity = np.stack(
        [
            (1.0 + np.arange(num_items)) ** -config.popular_zipf,
            np.where(tail_place >= 0, (1.0 + tail_place.clip(0)) ** -config.tail_zipf, 0.0),
        ]
    )
    popularity /= popularity.sum(axis=1, keepdims=True)
    cumulative = popularity.cumsum(axis=1)
    successors = np.stack(
        [rng.choice(num_items, (num_items, config.num_successors), p=p) for p in popularity]
    )

    kind = rng.choice(len(config.kinds), num_users, p=_normalised(config.kinds))
    tail_share = np.asarray(config.tail_shares)[kind]
    spread = config.length_spread
    log_mean = math.log(config.mean_length) - spread**2 / 2
    lengths = rng.lognormal(log_mean, spread, num_users).round().astype(int)
    lengths = np.clip(lengths, _MIN_LENGTH, config.max_length)

    user, lags = np.arange(num_users), _normalised(config.lags)
    sequences = np.empty((num_users, lengths.max()), np.int64)
    for step in range(sequences.shape[1]):
        rule = (rng.random(num_users) < tail_share).astype(int)
        chance = rng.random(num_users)
        fresh = np.empty(num_users, np.int64)
        for law in (0, 1):
            drawn = np.searchsorted(cumulative[law], chance[rule == law])
            fresh[rule == law] = drawn.clip(max=num_items - 1)  # the last sum may be below 1
        choice = rng.random(num_users)
        lag = 1 + rng.choice(len(config.lags), num_users, p=lags)
        which = rng.integers(config.num_successors, size=num_users)
        earlier = rng.integers(max(step, 1), size=num_users)
        follows = (choice < config.follow) & (lag <= step)
        repeats = (choice >= config.follow) & (choice < config.follow + config.repeat) & (step > 0)
        followed = sequences[user, (step - lag).clip(0)] if step else fresh
        sequences[:, step] = np.select(
            [follows, repeats],
            [successors[rule, followed, which], sequences[user, earlier]],
            fresh,
        )
    real = np.arange(sequences.shape[1])[None, :] < lengths[:, None]
    user_id, timestamp = np.nonzero(real)
    return pd.DataFrame({"user_id": user_id, "item_id": sequences[real], "timestamp": timestamp})


def _normalised(shares: tuple[float, ...]) -> np.ndarray:
    """Shares that add up to 1 exactly enough for numpy, which is stricter than the check."""
    return np.asarray(shares, float) / math.fsum(shares)


def _head_size(config: ConfigDict) -> int:
    return round(config.head_share * config.num_items)


def _check(config: ConfigDict) -> None:
    for setting in SETTINGS:
        setting._replace(key=f"data.synthetic.{setting.key}").require(config[setting.key])
    checks = {
        "head_share": (_head_size(config) < config.num_items, "a share that leaves some items"),
        "follow": (config.follow + config.repeat <= 1, "follow + repeat at most 1"),
        "kinds": (len(config.kinds) == len(config.tail_shares), "as many shares as tail_shares"),
    }
    for key, (good, expected) in checks.items():
        if not good:
            raise UserError(f"data.synthetic.{key} is {config[key]}: expected {expected}")
