"""Splits by time and by files, from the log to a finished run."""

import itertools
import shutil

import ir_measures
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from runs import DROPOUT, FILES, files_of, finish, rows_of, small
from test_ranking import MAX_LEN, make_model

from seqfair_jax import workdir
from seqfair_jax.config import default_config, resolve
from seqfair_jax.data import cache
from seqfair_jax.data.cache import load_dataset, source_hashes
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import Targets, by_part, by_time, describe_counts, describe_split
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import ranking
from seqfair_jax.evaluation.baselines import baseline_ranks
from seqfair_jax.evaluation.metrics import rank_metrics
from seqfair_jax.evaluation.slices import target_means
from seqfair_jax.report import text
from seqfair_jax.run import run
from seqfair_jax.serving.catalogue import whole_histories
from seqfair_jax.training import resume
from seqfair_jax.training.batches import Batches
from seqfair_jax.training.experiment import build_experiment
from seqfair_jax.training.segments import Segments
from seqfair_jax.training.step import initial_states

VALID, TEST = 60, 80  # points in time of `random_log`


def random_log(seed, users=25, items=14, rows=400):
    """Times from 0 to 99, many of them equal, in no order."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "user_id": rng.integers(users, size=rows),
            "item_id": rng.integers(items, size=rows),
            "timestamp": rng.integers(100, size=rows),
        }
    )
    later = frame["timestamp"] >= VALID
    # Some users and items are first seen later, and some users have one event.
    frame.loc[later & (rng.random(rows) < 0.1), "item_id"] += 100
    frame.loc[later & (rng.random(rows) < 0.1), "user_id"] += 100
    return frame


def split(frame, *, targets="every", valid_users=0, core=1, **changes):
    points = {"valid_from": str(VALID), "test_from": str(TEST)} | changes
    return by_time(
        log_from_table(frame),
        name="csv",
        valid_share=points.pop("valid_share", 0.1),
        test_share=points.pop("test_share", 0.1),
        targets=targets,
        min_interactions=core,
        num_valid_users=valid_users,
        split_seed=0,
        **points,
    )


def targets_of(targets):
    """(item id, known, repeat) of each user's targets, by place of the user."""
    found = {}
    for owner, *values in zip(targets.owners, targets.item_ids, targets.items >= 0,
                              targets.repeat, strict=True):  # fmt: skip
        found.setdefault(int(targets.users[owner]), []).append(tuple(v.item() for v in values))
    return found


# --- The split ---


@pytest.mark.parametrize("targets", ["first", "every"])
@pytest.mark.parametrize("core", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_a_split_by_time_matches_the_reference(seed, core, targets):
    frame = random_log(seed)
    parts = [int(t >= VALID) + int(t >= TEST) for t in frame["timestamp"]]
    rows = list(frame.itertuples(index=False, name=None))
    vocabulary, users, expected = reference.held_out(rows, parts, core, targets == "every")
    dataset = split(frame, core=core, targets=targets)
    assert dataset.item_ids.tolist() == vocabulary
    assert dataset.user_ids.tolist() == users
    whole = whole_histories(dataset)
    valid, test = targets_of(dataset.valid), targets_of(dataset.test)
    for place, user in enumerate(users):
        start, stop = dataset.offsets[place : place + 2]
        ids = dataset.item_ids[dataset.items[start:stop]].tolist()
        every = dataset.item_ids[whole.items[slice(*whole.offsets[place : place + 2])]].tolist()
        found = (ids[: dataset.train_lengths[place]], ids, every,
                 valid.get(place, []), test.get(place, []))  # fmt: skip
        assert found == expected[user]
    assert dataset.train_lengths.min() > 0
    assert len(dataset.valid.users) == dataset.split["validation_users"] == len(valid)
    assert (dataset.valid.sizes > 0).all()
    assert dataset.counts["new_users"] == len(
        set(frame["user_id"]) - set(frame.loc[frame["timestamp"] < VALID, "user_id"])
    )
    assert dataset.split["new_items"] == len(
        set(frame["item_id"]) - set(frame.loc[frame["timestamp"] < VALID, "item_id"])
    )
    counts = np.bincount(dataset.items[np.concatenate([
        np.arange(a, a + n) for a, n in zip(dataset.offsets, dataset.train_lengths, strict=False)
    ])], minlength=len(vocabulary))  # fmt: skip
    assert_array_equal(dataset.item_counts, counts)


def test_a_split_by_shares_never_divides_equal_times():
    times = [1, 2, 2, 3, 3, 3, 4, 5, 5, 6]
    frame = pd.DataFrame({"user_id": [1, 2] * 5, "item_id": 1, "timestamp": times})
    shares = {"valid_from": None, "test_from": None}
    found = split(frame, valid_share=0.3, test_share=0.3, **shares).split
    # 3 rows are at 5 or later; the next 3 would divide those of time 3: 1 row, or 4.
    assert (found["valid_from"], found["test_from"]) == ("3", "5")
    found = split(frame, valid_share=0.2, test_share=0.1, **shares).split
    assert (found["valid_from"], found["test_from"]) == ("5", "6")
    dates = frame.assign(timestamp=pd.to_datetime(frame["timestamp"], unit="D"))
    found = split(dates, valid_from=None, test_from="1970-01-06", valid_share=0.1).split
    assert (found["valid_from"], found["test_from"]) == (
        "1970-01-05T00:00:00", "1970-01-06T00:00:00"
    )  # fmt: skip
    again = split(dates, valid_from=found["valid_from"], test_from=found["test_from"])
    assert again.split == found | {"kind": "time"}
    found = split(frame, valid_from="4", test_from=None, test_share=0.9).split
    assert found["test_from"] == "5"  # the validation must keep some time


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_from": "80"}, "data.valid_from, 80, must be before data.test_from, 80"),
        ({"valid_from": "-5"}, r"no row is before data.valid_from \(-5, 80\); .*are 0 to 99"),
        ({"test_from": "100"}, r"no row is from data.test_from on \(60, 100\)"),
        ({"valid_from": "2020-01-01"}, "data.valid_from is 2020-01-01, a date, but the times"),
        ({"core": 99}, "nothing is left of [0-9]+ training rows after the 99-core filter"),
    ],
)
def test_points_that_leave_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        split(random_log(0), **changes)


def test_a_log_without_time_is_refused():
    frame = pd.DataFrame({"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": [4, 4, 5]})
    with pytest.raises(UserError, match="2 distinct times leave no room for data.test_share"):
        split(frame, valid_from=None, test_from=None)
    frame = pd.DataFrame({"user_id": [1, 1, 2], "item_id": [1, 2, 3], "timestamp": [4, 65, 90]})
    with pytest.raises(UserError, match="no user has both a training row and a test row"):
        split(frame)


def test_validation_users_are_drawn_from_those_who_can():
    everyone = split(random_log(1))
    some = split(random_log(1), valid_users=4)
    drawn = np.random.default_rng(0).choice(len(everyone.valid.users), 4, replace=False)
    assert_array_equal(some.valid.users, everyone.valid.users[np.sort(drawn)])
    assert targets_of(some.valid) == {
        user: found for user, found in targets_of(everyone.valid).items()
        if user in some.valid.users
    }  # fmt: skip
    assert_array_equal(some.items, everyone.items)  # nobody trains on rows of the validation
    assert some.log_hash == everyone.log_hash
    assert "4 users validate, drawn from" in "\n".join(describe_split(some.split))
    more = split(random_log(1), valid_users=10_000)
    assert_array_equal(more.valid.users, everyone.valid.users)


def test_the_hash_is_of_the_parts_too():
    frame = random_log(2)
    assert split(frame).log_hash != split(frame, valid_from=str(VALID - 1)).log_hash
    assert split(frame[::-1]).split == split(frame).split


def test_what_is_said_of_a_split():
    rows = [(1, 5, 1), (1, 6, 60), (1, 5, 60), (1, 5, 81), (2, 5, 3), (2, 5, 85), (2, 9, 85),
            (3, 5, 61), (3, 5, 90)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    dataset = split(frame)
    table = [line.split() for line in describe_counts(dataset.counts).splitlines()]
    assert table[1:] == [
        ["rows", "read", "9"],
        ["-", "of", "users", "without", "a", "training", "row", "2", "1", "0"],
        ["used", "7", "2", "3"],
    ]
    said = "\n".join(describe_split(dataset.split))
    for sentence in [
        "training rows are before 60, validation rows are from then until 80",
        "There are 2 training rows, 2 validation rows and 3 test rows of 2 users.",
        "1 user validates, and 2 users are tested.",
        "2 in the validation and 3 in the test",
        "1 user has no training row, so this user is not judged, and 2 items have none",
        "1 of the 3 users of the log has no figure in the test, because of the filter or the",
        "1 of the 3 test targets is an item that the model does not know. It counts as a miss.",
        "2 of the 5 targets have the same time as the user's row before.",
    ]:
        assert sentence in said
    known = dataset.split | {"unknown_test_targets": 0, "log_users": 2}
    said = describe_split(known)
    assert "The model knows the items of all test targets." in said
    assert "no figure" not in "\n".join(said)
    del known["log_users"]  # of an earlier version
    assert describe_split(known) == said


# --- Nothing leaks ---


def later_rows_changed(frame, change, point):
    """The log with other rows at and after a point in time."""
    rng = np.random.default_rng(9)
    late = (frame["timestamp"] >= point).to_numpy()
    before, after = frame[~late], frame[late].copy()
    if change == "items":
        after["item_id"] = rng.permutation(after["item_id"])
    elif change == "times":
        after["timestamp"] = rng.permutation(after["timestamp"])
    elif change == "users":
        after["user_id"] = rng.permutation(after["user_id"]) + rng.integers(0, 2, len(after))
    elif change == "deleted":
        after = after[rng.random(len(after)) < 0.5]
    elif change == "text":
        after["item_id"] = [f"item {i}" if i % 3 == 0 else str(i) for i in after["item_id"]]
        after["user_id"] = [f"user {i}" if i % 5 == 0 else str(i) for i in after["user_id"]]
    return pd.concat([after, before]).astype({"user_id": str, "item_id": str})


def first_steps(path):
    """All that training starts from, and the state after its first steps."""
    changes = {"data.name": "csv", "data.path": str(path), "data.split": "time",
               "data.valid_from": str(VALID), "data.test_from": str(TEST),
               "data.targets": "every", "data.min_interactions": 3}  # fmt: skip
    experiment = build_experiment(resolve(small("gdro", **changes, **DROPOUT)))
    batches = Batches([0], lengths=experiment.train_lengths, batch_size=8, steps=3,
                      vmap=experiment.vmap)(0)  # fmt: skip
    states = initial_states(experiment.task, seeds=[0], num_groups=experiment.num_groups)
    segments, start = Segments(experiment), 0
    while start < 3:
        states, start, _ = segments(states, batches, start, meanwhile=lambda: None)
    dataset = experiment.dataset
    groups = [family.membership for family in (*experiment.families, experiment.loss_family)]
    ids = [list(map(str, found.tolist())) for found in (dataset.user_ids, dataset.item_ids)]
    arrays = [dataset.train_lengths, dataset.item_counts, *groups, *batches]
    return ids, jax.tree.map(np.asarray, (experiment.data, arrays, states)), dataset


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "log.csv"
    random_log(4).to_csv(path, index=False)
    return first_steps(path)


@pytest.mark.parametrize("change", ["items", "times", "users", "deleted", "text"])
def test_no_later_row_changes_what_is_trained(change, tmp_path, unchanged):
    path = tmp_path / "log.csv"
    later_rows_changed(random_log(4), change, VALID).to_csv(path, index=False)
    (ids, trained, before), (other_ids, other_trained, after) = unchanged, first_steps(path)
    assert before.log_hash != after.log_hash
    assert ids == other_ids
    leaves, other_leaves = jax.tree.leaves(trained), jax.tree.leaves(other_trained)
    assert len(leaves) > 20
    for one, two in zip(leaves, other_leaves, strict=True):
        assert one.dtype == two.dtype
        assert_array_equal(one, two)


def test_no_test_row_changes_the_validation_or_a_history():
    frame = random_log(4)
    one = split(frame)
    two = split(later_rows_changed(frame, "items", TEST).astype({"user_id": int, "item_id": int}))
    assert one.log_hash != two.log_hash
    assert targets_of(one.valid) == targets_of(two.valid)
    for name in ("items", "offsets", "train_lengths", "item_counts"):
        assert_array_equal(getattr(one, name), getattr(two, name))


# --- Files ---


@pytest.fixture
def three_files(tmp_path):
    """The settings of a log in three files, which are a split by time of `random_log`."""
    frame = random_log(3)
    part = (frame["timestamp"] >= VALID).astype(int) + (frame["timestamp"] >= TEST)
    paths = {}
    for number, key in enumerate(("path", "valid_path", "test_path")):
        paths[key] = str(tmp_path / f"{key}.csv")
        frame[part == number].to_csv(paths[key], index=False)
    config = default_config().data
    config.update({"name": "csv", "split": "files", "targets": "every", "min_interactions": 2,
                   "cache_dir": str(tmp_path / "cache"), **paths})  # fmt: skip
    return config


def test_a_split_by_files_is_the_split_by_time_of_its_rows(three_files):
    found, expected = load_dataset(three_files), split(random_log(3), core=2, valid_users=20_000)
    assert found.user_ids.tolist() == expected.user_ids.tolist()
    assert found.item_ids.tolist() == expected.item_ids.tolist()
    assert targets_of(found.valid) == targets_of(expected.valid)
    assert targets_of(found.test) == targets_of(expected.test)
    for name in ("items", "offsets", "later_items", "later_offsets", "num_rows", "item_counts"):
        assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.log_hash == expected.log_hash
    raw = [key for key in found.counts if key.startswith(("raw", "rows", "repeated"))]
    assert {key: found.counts[key] for key in raw} == {key: expected.counts[key] for key in raw}
    assert "from their own files" in describe_split(found.split)[0]


def test_the_order_of_parts_is_that_of_the_files_not_of_time():
    rows = [(1, 7, 9), (1, 8, 1), (1, 9, 5)]
    log = log_from_table(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]))
    dataset = by_part(log, np.int8([0, 1, 2]), name="csv", targets="first", min_interactions=1,
                      num_valid_users=0, split_seed=0, split={"kind": "files"})  # fmt: skip
    assert dataset.item_ids.tolist() == [7]
    assert dataset.valid.item_ids.tolist() == [8]
    assert dataset.test.item_ids.tolist() == [9]


def test_only_a_changed_file_is_read_again(three_files, monkeypatch):
    reads = []
    real = cache.read_log
    monkeypatch.setattr(cache, "read_log", lambda name, paths, **k: reads.append(paths[0].name)
                        or real(name, paths, **k))  # fmt: skip
    load_dataset(three_files)
    assert reads == ["path.csv", "valid_path.csv", "test_path.csv"]
    three_files.targets = "first"
    load_dataset(three_files)
    three_files.split = "time"
    three_files.valid_path = three_files.test_path = None
    load_dataset(three_files)
    assert len(reads) == 3


def test_the_files_are_sources(three_files):
    hashes = source_hashes(three_files)
    assert list(hashes) == ["log", "valid_log", "test_log"]
    assert len(set(hashes.values())) == 3
    three_files.test_path += "x"
    with pytest.raises(UserError, match=r"data.test_path=.*test_path.csvx: no such file"):
        source_hashes(three_files)


def test_ids_of_numbers_and_of_text_in_several_files(three_files):
    with open(three_files.test_path, "a") as file:
        file.write("3,x,99\n")
    dataset = load_dataset(three_files)
    assert dataset.item_ids.dtype == dataset.test.item_ids.dtype == object
    assert dataset.item_ids.tolist() == [str(i) for i in range(14)]  # numbers in their order
    assert "x" in dataset.test.item_ids.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "files"}, "data.split is files, but data.valid_path is not set"),
        ({"split": "files", "valid_path": "v"}, "data.split is files, but data.test_path is not"),
        ({"test_path": "t"}, "data.test_path is set, but data.split is leave_one_out"),
        ({"split": "files", "test_from": "3"}, "data.test_from is set, but data.split is files"),
        ({"targets": "every"}, "data.targets is every, but data.split is leave_one_out"),
        ({"split": "tme"}, r"data.split is 'tme' \(did you mean 'time'"),
        ({"split": "time", "test_from": "soon"}, "data.test_from is 'soon': expected an ISO date"),
        ({"valid_share": 1.0}, "data.valid_share is 1.0: expected a share between 0 and 1"),
        ({"valid_share": 0.5, "test_share": 0.5}, "expected less than 1 together"),
        ({"name": "synthetic", "split": "files", "valid_path": "v", "test_path": "t"},
         "the synthetic log is one"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, message):
    config = default_config()
    config.data.update({"name": "csv", "path": "log.csv"} | changes)
    with pytest.raises(UserError, match=message):
        resolve(config)


# --- Ranks and metrics of several targets ---


def several_targets():
    """Users with 1 to 17 targets in the test; some targets are outside the vocabulary."""
    rng = np.random.default_rng(0)
    rows = [(user, item, time) for user in range(20)
            for time, item in enumerate(rng.integers(30, size=12))]  # fmt: skip
    rows += [
        (user, item, VALID + user % 2)
        for user in range(10)
        for item in (1, 2 + user, 500)[user % 3 :]
    ]
    rows += [(user, item, TEST) for user in range(20) for item in rng.permutation(40)[: user + 1]]
    return split(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]))


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("mask_seen", [False, True])
def test_ranks_match_the_reference(part, mask_seen):
    dataset = several_targets()
    model, params = make_model(dataset)
    # Some items have one vector, so their scores are equal.
    table = params["params"]["output_embedding"]
    table = table.at[5:15].set(table[4]).at[20:22].set(table[19])
    params = {"params": params["params"] | {"output_embedding": table}}
    rank = ranking.make_ranker(model, dataset, part, mask_seen=mask_seen, batch_size=4, top_k=3)
    found = rank(params, "x")
    targets = dataset.test if part == "test" else dataset.valid
    assert len(set(targets.sizes)) > 1
    assert len(ranking.make_queries(dataset, "test", max_len=MAX_LEN, mask_seen=mask_seen,
                                    batch_size=4).blocks) == 4  # fmt: skip
    weights = jax.tree.map(np.float64, params["params"])
    for place, user in enumerate(targets.users):
        start, stop = dataset.offsets[user : user + 2]
        stop = stop if part == "test" else start + dataset.train_lengths[user]
        history = dataset.items[start:stop]
        inputs = [None, *history[-(MAX_LEN - 2) :]]
        hidden = reference.sasrec(weights, inputs, num_blocks=1, num_heads=1)[-1]
        scores = weights["output_embedding"] @ hidden
        own = slice(*targets.offsets[place : place + 2])
        known = [item for item in targets.items[own].tolist() if item >= 0]
        masked = set(history.tolist()) - set(known) if mask_seen else set()
        expected = dict(zip(known, reference.set_ranks(scores, known, masked), strict=True))
        assert found.ranks[own].tolist() == [expected.get(i, 0) for i in targets.items[own]]
        allowed = [i for i in np.argsort(-scores, kind="stable") if i not in masked]
        assert_array_equal(found.top_items[place], allowed[:3])
        for name, ranks in baseline_ranks(
            dataset, part, mask_seen=mask_seen, k=len(scores)
        ).items():
            listed = baseline_list(dataset, name, history, masked, len(scores))
            places = {item: at for at, item in enumerate(listed, start=1)}
            assert ranks[own].tolist() == [places.get(i, 0) for i in targets.items[own]], name


def baseline_list(dataset, name, history, masked, k):
    """What a baseline recommends after a history, by plain loops."""
    pairs = {}
    for user in range(len(dataset.user_ids)):
        start = dataset.offsets[user]
        row = dataset.items[start : start + dataset.train_lengths[user]].tolist()
        for pair in itertools.pairwise(row):
            pairs[pair] = pairs.get(pair, 0) + 1
    lists = {
        "most_popular": sorted(range(len(dataset.item_ids)), key=lambda i: -dataset.item_counts[i]),
        "markov": [b for a, b in sorted(pairs, key=lambda p: -pairs[p]) if a == history[-1]],
        "last_viewed": list(dict.fromkeys(history[::-1].tolist())),
    }
    if name == "interleaved":
        lists["interleaved"] = []
        for place in range(k):
            for source in ("markov", "last_viewed"):
                lists["interleaved"] += lists[source][place : place + 1]
        lists["interleaved"] = list(dict.fromkeys(lists["interleaved"]))
    return [item for item in lists[name] if item not in masked][:k]


def test_tied_targets_have_ranks_one_after_another():
    scores = jnp.array([[1.0, 3.0, 3.0, 3.0, 0.0, 3.0]])
    found = ranking._count_ranks(scores, jnp.array([[5, 1, 4, -1]]))
    # Two of the items with score 3 are no targets; they come first.
    assert found.tolist() == [[4, 3, 6, 0]]
    assert reference.set_ranks(scores[0].tolist(), [5, 1, 4]) == [4, 3, 6]


def test_metrics_of_several_targets():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, size=40)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ranks = np.concatenate([rng.permutation(15)[:size] for size in sizes])  # 0 is a miss
    found = rank_metrics(ranks, [3, 10], offsets)
    qrels, scored = [], []
    for user, (start, stop) in enumerate(itertools.pairwise(offsets)):
        own = ranks[start:stop].tolist()
        for k in (3, 10):
            for name, value in reference.set_metrics(own, k).items():
                assert found[f"{name}@{k}"][user] == pytest.approx(value)
        qrels += [ir_measures.Qrel(str(user), f"target {rank}", 1) for rank in own]
        scored += [
            ir_measures.ScoredDoc(str(user), f"target {rank}" if rank in own else f"item {rank}",
                                  -float(rank))
            for rank in range(1, 15)
        ]  # fmt: skip
    names = {"NDCG@10": "nDCG@10", "Recall@3": "R@3", "MRR@10": "RR@10", "HitRate@3": "Success@3"}
    for ours, theirs in names.items():
        measure = ir_measures.parse_measure(theirs)
        for value in ir_measures.iter_calc([measure], qrels, scored):
            assert_allclose(found[ours][int(value.query_id)], value.value, atol=1e-12)
    # trec_eval divides average precision by n, also where that is above k.
    whole = rank_metrics(ranks, [14], offsets)["MAP@14"]
    for value in ir_measures.iter_calc([ir_measures.AP @ 14], qrels, scored):
        assert_allclose(whole[int(value.query_id)], value.value, atol=1e-12)


def test_one_target_is_the_special_case():
    ranks = np.array([1, 3, 4, 0])
    found = rank_metrics(ranks, [3])
    assert_allclose(found["NDCG@3"], [1, 0.5, 0, 0])
    assert_array_equal(found["HitRate@3"], found["Recall@3"])
    assert_array_equal(found["MAP@3"], found["MRR@3"])


def test_repeat_and_new_targets_are_judged_alone():
    ranks = np.array([1, 2, 0, 3, 1])
    targets = Targets(
        users=np.int32([0, 4, 7]),
        offsets=np.array([0, 3, 4, 5]),
        items=np.int32([5, 6, -1, 5, 2]),
        item_ids=np.array([5, 6, 9, 5, 2]),
        repeat=np.array([True, False, False, False, True]),
    )
    values, means = target_means(ranks, targets, [], [3], min_users=1)
    assert_allclose(values["Recall@3"], [2 / 3, 1, 1])
    assert means["Recall@3"]["target=repeat"] == 1  # users 0 and 7
    assert means["Recall@3"]["target=new"] == pytest.approx((1 / 2 + 1) / 2)  # users 0 and 4
    assert means["MRR@3"]["target=new"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    none = targets.take(np.zeros(5, bool))
    assert target_means(ranks[:0], none, [], [3], min_users=1)[1]["NDCG@3"]["overall"] is None


# --- Runs ---

EVERY = {"data.split": "time", "data.targets": "every", "train.segment_seconds": 0.0}


def test_a_run_on_a_split_by_time(finished):
    folder, summary, printed = finished("gdro", **EVERY)
    assert files_of(folder) == FILES
    described = summary["dataset"]["split"]
    assert described["kind"] == "time"
    assert "\n".join(describe_split(described)) in printed
    table = pd.read_parquet(folder / "per_user.parquet")
    assert len(table) == described["test_users"] < summary["dataset"]["users"]
    assert sum(map(len, table["target_item_id"])) == described["test_targets"]
    for row in table.itertuples():
        ranks = np.nan_to_num(np.asarray(row.rank, float)).astype(int).tolist()
        expected = reference.set_metrics(ranks, 20)
        found = table.loc[row.Index, [f"{name}@20" for name in expected]]
        assert_allclose(found.to_numpy(float), list(expected.values()))
    means = summary["test"]["NDCG@20"]
    assert means["overall"] == pytest.approx(table["NDCG@20"].mean())
    niche = table.loc[table["pop33"] == "niche", "NDCG@20"]
    assert means["pop33=niche"] == pytest.approx(niche.mean())
    stored = pd.read_parquet(folder / "split.parquet")
    assert len(stored) == summary["dataset"]["users"]
    tested = stored["test_target_item_id"].notna()
    assert tested.sum() == len(table)
    assert [list(x) for x in stored["test_target_item_id"][tested]] == [
        list(x) for x in table["target_item_id"]
    ]
    assert stored["validation_user"].sum() == described["validation_users"]
    histories = pd.read_parquet(folder / "histories.parquet")
    rows = histories["items"].map(len) + histories["unknown_items"]
    assert rows.sum() == summary["dataset"]["interactions"]
    printed = text.tables([folder], "MAP@20")
    assert "GDRO" in printed
    # A user who has a target of a kind counts for it.
    sizes = next(line for line in printed.splitlines() if line.startswith("test users")).split()
    kinds = [set(of_user) for of_user in table["repeat"]]
    assert sizes[-2:] == [str(sum(kind in found for found in kinds)) for kind in (True, False)]
    assert sum(map(len, kinds)) > len(kinds)  # some users have both
    with pytest.raises(UserError, match=r"data\.targets \('every' there, 'first' now\)"):
        run(small("gdro", **(EVERY | {"data.targets": "first"})), folder)


def test_a_run_on_the_first_later_event(finished):
    folder, summary, _ = finished(**{"data.split": "time"})
    table = pd.read_parquet(folder / "per_user.parquet")
    assert len(table) == summary["dataset"]["split"]["test_targets"]
    assert pd.api.types.is_integer_dtype(table["target_item_id"])
    assert_array_equal(table["HitRate@20"], table["Recall@20"])
    stored = pd.read_parquet(folder / "split.parquet").set_index("user_id")
    found = stored.loc[table["user_id"], "test_target_item_id"]
    assert found.tolist() == table["target_item_id"].tolist()


def test_a_resumed_run_of_a_split_by_time_gives_the_same_bits(tmp_path, monkeypatch, finished):
    whole = finished("gdro", **EVERY)
    save = resume.Saver.save

    def save_and_stop(self, snapshot):
        save(self, snapshot)
        if snapshot.progress.step == 7:
            raise KeyboardInterrupt

    config = small("gdro", **EVERY)
    monkeypatch.setattr(resume.Saver, "save", save_and_stop)
    with pytest.raises(SystemExit, match="the state of step 7 is saved"):
        run(small("gdro", **EVERY, **{"train.checkpoint_minutes": 0.0}), tmp_path)
    monkeypatch.undo()
    assert run(config, tmp_path)["test"] == whole.summary["test"]
    assert rows_of(tmp_path) == rows_of(whole.folder)
    one, two = (pd.read_parquet(f / "per_user.parquet") for f in (tmp_path, whole.folder))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_a_run_on_three_files(tmp_path, three_files, caplog):
    config = small(**{"train.batch_size": 4})
    config.data = three_files.copy_and_resolve_references()
    folder, summary, printed = finish(config, tmp_path / "run")
    assert summary["dataset"]["split"]["kind"] == "files"
    assert "Split by files" in printed
    assert set(workdir.finished_inputs(folder)) == {"log", "valid_log", "test_log"}
    moved = tmp_path / "moved.csv"
    shutil.move(three_files.valid_path, moved)
    config.data.valid_path = str(moved)  # only its content counts
    config.train.epochs = 3
    assert run(config, folder)["train"]["steps"] == 15
    moved.write_text(moved.read_text() + "1,2,70\n")
    run(config, folder)
    assert f"{moved} changed after this run finished" in caplog.text
