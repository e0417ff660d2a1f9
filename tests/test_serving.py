import dataclasses
import itertools
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
import reference
from runs import small

import seqfair_jax
from seqfair_jax import results, serving, workdir
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.evaluation.ranking import make_ranker
from seqfair_jax.run import run
from seqfair_jax.serving import catalogue, recommender
from seqfair_jax.serving.recommender import recommend
from seqfair_jax.training import checkpoint

MAX_LEN = 7
ODD_USERS = ['a "quote", a comma', "ünï", "07", "NA"]


def make_log(integers=False):
    """Users with 4 to 12 rows; one test row and one validation row have an item of their own."""
    rng = np.random.default_rng(3)
    rows = [(u, i) for u in range(40) for i in rng.integers(25, size=rng.integers(4, 13))]
    log = pd.DataFrame(rows, columns=["user_id", "item_id"])
    last = log.groupby("user_id").tail(1).index
    log.loc[last[5], "item_id"] = 901
    log.loc[last[6] - 1, "item_id"] = 902
    if not integers:
        names = dict(enumerate(ODD_USERS)) | {u: f"u{u}" for u in range(len(ODD_USERS), 40)}
        log["user_id"] = log["user_id"].map(names)
        log["item_id"] = "i" + log["item_id"].astype(str)
    log["timestamp"] = range(len(log))
    return log.sample(frac=1, random_state=0)


def make_config(path, **changes):
    shared = {
        "data.name": "csv",
        "data.path": str(path),
        "data.min_interactions": 1,
        "model.max_len": MAX_LEN,
        "model.init_scale": 1.0,
        "train.epochs": 1,
        "train.steps_per_epoch": 2,
        "evaluate.cutoffs": (5, 20),
        "evaluate.batch_size": 16,
    }
    return small(**(shared | changes))


def make_run(folder, **changes):
    """A finished run whose log is gone, and the log."""
    log = make_log()
    path = folder / "log.csv"
    log.to_csv(path, index=False)
    run(make_config(path, **changes), folder / "run")
    path.unlink()
    return folder / "run", log


@pytest.fixture(scope="module")
def run_and_log(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("serving"), **{"model.item_bias": True})


@pytest.fixture(scope="module")
def trained(run_and_log):
    return serving.load(run_and_log[0])


@pytest.fixture
def copied(run_and_log, tmp_path):
    return shutil.copytree(run_and_log[0], tmp_path / "copy")


def lists_of(trained, histories=None, **options):
    """All lists, as (item, score) pairs of each user."""
    histories = trained.histories if histories is None else histories
    found = []
    for block in recommend(trained, histories, **options):
        assert block.first == len(found)
        assert block.items.dtype == np.int32
        assert block.scores.dtype == np.float32
        for items, scores in zip(block.items, block.scores, strict=True):
            real = scores > -np.inf
            assert not real[real.argmin() :].any() or real.all()
            found.append(list(zip(items[real].tolist(), scores[real].tolist(), strict=True)))
    return found


def reference_list(trained, history, k, masked=(), candidates=None):
    """One user's list, by the float64 model and a plain sort."""
    tree = jax.tree.map(np.float64, trained.params["params"])
    inputs = [None, *history[-(MAX_LEN - 2) :]]
    hidden = reference.sasrec(tree, inputs, num_blocks=1, num_heads=1)[-1]
    scores = [
        (item, float(score))
        for item, score in enumerate(reference.scores(tree, hidden))
        if item not in masked and (candidates is None or item in candidates)
    ]
    return sorted(scores, key=lambda pair: (-pair[1], pair[0]))[:k]


def assert_same_lists(found, expected):
    assert [[i for i, _ in pairs] for pairs in found] == [[i for i, _ in p] for p in expected]
    for pairs, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            [s for _, s in pairs], [s for _, s in wanted], rtol=1e-4, atol=1e-5
        )


# The files.


@pytest.mark.parametrize(
    "split",
    [
        {},
        {"data.valid_users": 7},
        {"data.split": "time"},
        {"data.split": "time", "data.targets": "every", "data.valid_users": 9},
    ],
    ids=["leave_one_out", "few_validate", "first_later_event", "every_later_event"],
)
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "text"])
def test_a_folder_has_the_arrays_of_its_split(tmp_path, split, integers):
    log = make_log(integers).assign(timestamp=lambda rows: rows["timestamp"] * 7919 % 400)
    log.to_csv(tmp_path / "log.csv", index=False)
    config = make_config(tmp_path / "log.csv", **split)
    assert_folder_has(tmp_path / "run", config, load_dataset(config.data))


def test_a_folder_has_the_arrays_of_a_split_by_files(tmp_path):
    log = make_log()
    names = ("path", "valid_path", "test_path")
    for name, part in zip(names, (log[:200], log[200:250], log[250:]), strict=True):
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    paths = {f"data.{name}": str(tmp_path / f"{name}.csv") for name in names}
    config = make_config("", **paths, **{"data.split": "files", "data.targets": "every"})
    assert_folder_has(tmp_path / "run", config, load_dataset(config.data))


def assert_folder_has(folder, config, dataset):
    """The folder's data set has every array of the original, in the same type."""
    catalogue.write(folder, dataset)
    workdir.write_json(folder / workdir.CONFIG, workdir.jsonable(config.to_dict()))
    of_log = results.dataset_summary(dataset, config)
    summary = {"schema_version": workdir.SCHEMA_VERSION, "dataset": of_log}
    workdir.write_json(folder / workdir.SUMMARY, summary)
    found = catalogue.read_dataset(folder)
    assert_same(found, dataset)
    assert results.dataset_summary(dataset, config)["split"] == found.split


def assert_same(found, expected):
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if dataclasses.is_dataclass(theirs):
            assert_same(ours, theirs)
        elif isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype, field.name
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
        elif field.name == "counts":
            assert all(theirs.get(key, value) == value for key, value in ours.items())
        else:
            assert ours == theirs, field.name


def test_the_run_has_every_item_and_the_whole_history_of_every_user(run_and_log):
    folder, log = run_and_log
    sequences = {
        u: list(rows.sort_values("timestamp").item_id) for u, rows in log.groupby("user_id")
    }
    in_training = {item for items in sequences.values() for item in items[:-2]}
    items = pd.read_parquet(folder / "items.parquet")
    assert list(items.item_id) == sorted(in_training)
    counts = pd.Series([i for s in sequences.values() for i in s[:-2]]).value_counts()
    assert list(items.training_rows) == [counts[i] for i in sorted(in_training)]
    users = pd.read_parquet(folder / "histories.parquet")
    assert list(users.user_id) == sorted(sequences, key=str.encode)
    for user in users.itertuples():
        known = [item for item in sequences[user.user_id] if item in in_training]
        assert list(items.item_id[user.items]) == known
        assert user.items.dtype == np.int32
        assert user.unknown_items == len(sequences[user.user_id]) - len(known)
    assert users.unknown_items.sum() >= 2


def test_ids_have_the_type_of_the_log(tmp_path):
    make_log(integers=True).to_csv(tmp_path / "log.csv", index=False)
    dataset = load_dataset(make_config(tmp_path / "log.csv").data)
    catalogue.write(tmp_path, dataset)
    item_ids, user_ids, histories = catalogue.read(tmp_path)
    assert user_ids.dtype == item_ids.dtype == np.int64
    np.testing.assert_array_equal(item_ids, dataset.item_ids)
    np.testing.assert_array_equal(user_ids, dataset.user_ids)
    jax.tree.map(np.testing.assert_array_equal, histories, catalogue.whole_histories(dataset))


@pytest.mark.parametrize("name", ["items.parquet", "histories.parquet"])
def test_a_changed_file_is_refused_by_name(name, copied):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"{name} changed since the run finished"):
        serving.load(copied)


# Loading.


@pytest.mark.parametrize("rule", ["overall", "worst_group"])
def test_a_run_is_loaded_without_its_log(rule, run_and_log):
    folder, _ = run_and_log
    found = serving.load(str(folder), rule=rule)
    stored, _ = checkpoint.load(workdir.best_checkpoint(folder, rule), found.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, stored)
    assert found.run == "seed=0"
    assert found.mask_seen is False
    assert found.config.model.max_len == found.model.max_len == MAX_LEN


@pytest.fixture(scope="module")
def grid(run_and_log, tmp_path_factory):
    """A grid of two values and two seeds, made of copies of one run; 0.3 is selected."""
    folder = tmp_path_factory.mktemp("grid")
    names = [f"alpha={alpha},seed={seed}" for alpha in (0.9, 0.3) for seed in (4, 2)]
    runs = []
    for name, part in zip(names, workdir.run_folders(folder, names), strict=True):
        shutil.copytree(run_and_log[0], part)
        alpha, seed = name.removeprefix("alpha=").split(",seed=")
        own = {"run": name, "hparams": {"alpha": float(alpha)}, "seed": int(seed)}
        runs.append(own | {"status": "finished"})
        write_summary(part, workdir.read_summary(part) | own)
    whole = workdir.read_summary(run_and_log[0]) | {"selected": {"hparams": {"alpha": 0.3}}}
    write_summary(folder, whole | {"runs": runs})
    return folder


def write_summary(folder, summary):
    workdir.write_json(folder / "summary.json", summary)
    workdir.finish(folder, {})


def test_of_a_grid_the_first_seed_of_the_selected_values_is_loaded(grid):
    assert serving.load(grid).run == "alpha=0.3,seed=4"
    assert serving.load(grid, run="alpha=0.9,seed=2").run == "alpha=0.9,seed=2"
    assert serving.load(grid / "runs" / "alpha=0.9,seed=2").run == "alpha=0.9,seed=2"
    with pytest.raises(UserError, match="no run 'alpha=0.7'; there are alpha=0.9,seed=4, alpha"):
        serving.load(grid, run="alpha=0.7")


def test_a_failed_run_is_skipped_and_refused(grid, tmp_path):
    folder = shutil.copytree(grid, tmp_path / "grid")
    whole = workdir.read_summary(folder)
    whole["runs"][2]["status"] = "failed at step 1"
    write_summary(folder, whole)
    part = folder / "runs" / "alpha=0.3,seed=4"
    write_summary(part, workdir.read_summary(part) | {"status": "failed at step 1"})
    assert serving.load(folder).run == "alpha=0.3,seed=2"
    with pytest.raises(UserError, match=r"alpha=0\.3,seed=4 failed at step 1, so it has no"):
        serving.load(folder, run="alpha=0.3,seed=4")


def test_a_grid_of_diverged_runs_is_refused(grid, tmp_path):
    folder = shutil.copytree(grid, tmp_path / "grid")
    whole = workdir.read_summary(folder)
    runs = [run | {"status": "failed at step 1"} for run in whole["runs"]]
    write_summary(folder, whole | {"runs": runs, "selected": None})
    with pytest.raises(
        UserError, match=r"each run diverged \(alpha=0\.9,seed=4 failed at step 1, "
    ):
        serving.load(folder)


def test_a_changed_grid_is_refused(grid, tmp_path):
    folder = shutil.copytree(grid, tmp_path / "grid")
    whole = workdir.read_summary(folder)
    workdir.write_json(folder / "summary.json", whole | {"selected": {"hparams": {"alpha": 0.9}}})
    with pytest.raises(UserError, match=r"summary\.json changed since the run finished"):
        serving.load(folder)


def without(*names):
    def remove(folder):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def damaged_checkpoint(folder):
    (folder / "checkpoints" / "best_overall" / "progress.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without("finished.json"), {}, r"no finished\.json; name the --workdir"),
        (without("summary.json"), {}, r"no summary\.json"),
        (without("items.parquet"), {}, r"items\.parquet is missing since the run finished"),
        (damaged_checkpoint, {}, r"best_overall is damaged or missing.*repeats the test"),
        (without("checkpoints"), {}, r"best_overall is damaged or missing"),
        (lambda folder: (folder / "jobs" / "erm").mkdir(parents=True), {}, r"jobs/JOB.*erm"),
        (lambda folder: None, {"rule": "best"}, "rule is 'best': expected overall or worst_group"),
        (lambda folder: None, {"run": "seed=1"}, "no run 'seed=1'; there are seed=0"),
    ],
)
def test_a_run_that_cannot_be_used_is_refused(change, options, message, copied):
    change(copied)
    with pytest.raises(UserError, match=message):
        serving.load(copied, **options)


def test_a_run_without_the_settings_of_later_versions_has_their_defaults(finished, tmp_path):
    folder = shutil.copytree(finished().folder, tmp_path / "old")
    settings = workdir.read_json(folder / workdir.CONFIG)
    for key in ("gated", "item_bias"):
        assert settings["model"].pop(key) is False
    workdir.write_json(folder / workdir.CONFIG, settings)
    workdir.finish(folder, workdir.finished_inputs(folder))
    old, new = seqfair_jax.load(folder), seqfair_jax.load(finished().folder)
    pd.testing.assert_frame_equal(old.recommend(k=3), new.recommend(k=3), check_exact=True)
    pd.testing.assert_frame_equal(old.evaluate(), new.evaluate(), check_exact=True)


# Recommending.


@pytest.mark.parametrize("mask_seen", [False, True])
def test_lists_match_the_reference_one_user_at_a_time(mask_seen, trained):
    places = np.append(np.arange(40), -1)  # the last has no items
    histories = trained.histories.select(places)
    candidates = np.array([0, 3, 4, 9, 10, 16, 21], np.int32)
    for some in (None, candidates):
        expected = []
        for user in range(41):
            history = histories.items[
                histories.offsets[user] : histories.offsets[user + 1]
            ].tolist()
            masked = set(history) if mask_seen else ()
            expected.append(reference_list(trained, history, 6, masked, some))
        found = lists_of(trained, histories, k=6, mask_seen=mask_seen, candidates=some)
        assert_same_lists(found, expected)
    assert max(np.diff(histories.offsets)) > MAX_LEN
    if mask_seen:
        assert min(map(len, found)) < 6  # some users are left with fewer


@pytest.mark.parametrize("mask_seen", [False, True])
def test_lists_of_the_test_history_are_those_of_the_evaluation(mask_seen, trained, tmp_path):
    make_log().to_csv(tmp_path / "log.csv", index=False)
    dataset = load_dataset(make_config(tmp_path / "log.csv").data)
    rank = make_ranker(trained.model, dataset, "test", mask_seen=False, batch_size=16, top_k=20)
    expected = rank(trained.params, "test").top_items.tolist()
    histories = catalogue.Histories(dataset.items, dataset.offsets)
    found = lists_of(trained, histories, k=20, mask_seen=mask_seen)
    if mask_seen:  # the evaluation keeps the target, even if it was seen
        seen = [set(dataset.items[slice(*dataset.offsets[u : u + 2])].tolist()) for u in range(40)]
        expected = [[i for i in row if i not in seen[u]][:5] for u, row in enumerate(expected)]
    assert [
        [i for i, _ in pairs][: len(row)] for pairs, row in zip(found, expected, strict=True)
    ] == (expected)


def with_params(trained, change):
    return serving.TrainedModel(**(vars(trained) | {"params": change(trained.params)}))


def with_position_bias(trained):
    """The model with a random bias by distance."""
    model = trained.model.clone(position_bias=True)
    block = trained.params["params"]["block_0"]
    bias = np.random.default_rng(2).normal(size=(model.num_heads, 32)).astype(np.float32)
    params = trained.params["params"] | {"block_0": {**block, "position_bias": bias}}
    return dataclasses.replace(trained, model=model, params={"params": params})


def test_a_position_bias_recommends_what_it_is_tested_by(trained, monkeypatch):
    """In batches of all histories, and with the short ones apart."""
    biased = with_position_bias(trained)
    dataset = catalogue.read_dataset(trained.folder)
    histories = catalogue.Histories(dataset.items, dataset.offsets)
    rows = [dataset.items[a:b].tolist() for a, b in itertools.pairwise(dataset.offsets)]
    expected = [reference_list(biased, row, 6) for row in rows]
    assert expected != [reference_list(trained, row, 6) for row in rows]
    rank = make_ranker(biased.model, dataset, "test", mask_seen=False, batch_size=16, top_k=6)
    tested = rank(biased.params, "test").top_items.tolist()
    assert tested == [[item for item, _ in pairs] for pairs in expected]
    assert_same_lists(lists_of(biased, histories, k=6, mask_seen=False), expected)
    monkeypatch.setattr("seqfair_jax.evaluation.ranking._SHORT", 5)
    monkeypatch.setattr("seqfair_jax.evaluation.ranking._MANY", 0)
    assert_same_lists(lists_of(biased, histories, k=6, mask_seen=False), expected)


def test_a_run_of_an_earlier_version_has_no_parts_of_later_ones(trained, copied):
    config = workdir.read_json(copied / workdir.CONFIG)
    for key in ("gated", "position_bias", "pointer", "neighbours"):
        assert not config["model"].pop(key)
    workdir.write_json(copied / workdir.CONFIG, config)
    workdir.finish(copied, workdir.finished_inputs(copied))
    earlier = serving.load(copied)
    assert earlier.model == trained.model
    assert lists_of(earlier, k=5) == lists_of(trained, k=5)


def test_ties_are_in_the_order_of_the_vocabulary(trained):
    constant = with_params(trained, lambda params: jax.tree.map(np.zeros_like, params))
    assert {tuple(pairs) for pairs in lists_of(constant, k=3)} == {((0, 0), (1, 0), (2, 0))}
    some = np.array([3, 5, 8, 9], np.int32)
    found = lists_of(constant, k=3, candidates=some)
    assert {tuple(pairs) for pairs in found} == {((3, 0), (5, 0), (8, 0))}


def test_neither_blocks_nor_batches_change_the_lists(trained, monkeypatch):
    whole = lists_of(trained, k=4, mask_seen=True)
    monkeypatch.setattr(recommender, "_BLOCK_ROWS", 50)  # blocks of 12 users
    monkeypatch.setattr("seqfair_jax.evaluation.ranking._TOKENS", 64)
    cut = lists_of(trained, k=4, mask_seen=True, batch_size=6)
    assert_same_lists(cut, whole)
    monkeypatch.setattr("seqfair_jax.evaluation.ranking._SHORT", 5)
    monkeypatch.setattr("seqfair_jax.evaluation.ranking._MANY", 0)
    apart = lists_of(trained, k=4, mask_seen=True)  # short histories are encoded apart
    assert_same_lists(apart, whole)


def test_few_programs_serve_any_histories(trained):
    encode, score = recommender._encode, recommender._top_items
    lists_of(trained, k=7, mask_seen=False, batch_size=3)
    before = encode._cache_size(), score._cache_size()
    for places in (np.arange(5), np.arange(39), np.full(8, -1)):
        lists_of(trained, trained.histories.select(places), k=7, mask_seen=False, batch_size=3)
    assert (encode._cache_size(), score._cache_size()) == before
    lists_of(trained, k=7, mask_seen=True, batch_size=3)
    assert encode._cache_size() == before[0]
    # Pairs to mask are padded to a power of two: 3 users have 12 to 36 rows.
    assert score._cache_size() - before[1] <= 3


def test_a_list_has_no_more_than_the_catalogue(trained):
    num_items = len(trained.item_ids)
    assert {len(pairs) for pairs in lists_of(trained, k=1000)} == {num_items}
    assert all(
        len(pairs) == num_items - len(set(trained.histories.items[slice(a, b)].tolist()))
        for pairs, a, b in zip(
            lists_of(trained, k=1000, mask_seen=True),
            trained.histories.offsets[:-1],
            trained.histories.offsets[1:],
            strict=True,
        )
    )


def test_a_score_that_is_not_finite_is_an_error(trained):
    broken = with_params(trained, lambda params: jax.tree.map(lambda x: x * np.nan, params))
    with pytest.raises(DivergedError, match="run seed=0: a score is not finite"):
        lists_of(broken, k=3)


def test_a_batch_is_no_larger_than_the_users(trained):
    assert_same_lists(lists_of(trained, k=5, batch_size=10**12), lists_of(trained, k=5))
