import pytest

from seqfair_jax.training.selection import (
    best_values,
    candidates,
    close_epoch,
    is_result,
    score,
    status,
)

NONE = {"overall": None, "worst_group": None}


def close(best, epoch, overall, worst, patience=0):
    return close_epoch(
        best, epoch, scores(overall), metric="NDCG@20", worst_group=worst, patience=patience
    )


def scores(overall):
    return {"NDCG@20": {"overall": overall}, "Recall@20": {"overall": 1.0}}


def test_the_first_epoch_is_the_best_so_far():
    choice = close(NONE, 1, 0.0, 0.0)
    first = {"epoch": 1, "overall": 0.0, "worst_group": 0.0, "val": scores(0.0)}
    assert choice.best == {"overall": first, "worst_group": first}
    assert choice.improved == {"overall": True, "worst_group": True}
    assert not choice.stops
    assert NONE == {"overall": None, "worst_group": None}  # the argument is not changed


@pytest.mark.parametrize(
    ("overall", "worst", "improved"),
    [
        (0.6, 0.1, (True, False)),
        (0.4, 0.3, (False, True)),
        (0.6, 0.3, (True, True)),
        (0.4, 0.1, (False, False)),
        (0.5, 0.2, (False, False)),  # of equal epochs the earlier one stays
        (0.6, 0.2, (True, True)),  # equal worst groups: the better mean
        (0.4, 0.2, (False, False)),
    ],
)
def test_each_rule_keeps_its_own_best_epoch(overall, worst, improved):
    first = close(NONE, 1, 0.5, 0.2).best
    choice = close(first, 2, overall, worst)
    assert choice.improved == dict(zip(("overall", "worst_group"), improved, strict=True))
    epochs = {rule: best["epoch"] for rule, best in choice.best.items()}
    assert epochs == {rule: 2 if better else 1 for rule, better in choice.improved.items()}


def test_a_run_stops_after_its_patience():
    best = close(NONE, 1, 0.5, 0.2, patience=2).best
    second = close(best, 2, 0.5, 0.9, patience=2)  # the worst group does not count
    assert not second.stops
    third = close(second.best, 3, 0.4, 0.2, patience=2)
    assert third.stops
    assert not close(second.best, 3, 0.6, 0.2, patience=2).stops
    assert not close(second.best, 99, 0.4, 0.2, patience=0).stops


def test_the_status_of_a_run():
    assert status(-1) == "finished"
    assert status(0) == "failed at step 0"
    assert status(12) == "failed at step 12"


def test_a_failed_run_is_no_result():
    finished = {"status": status(-1), "test": {}}
    assert is_result(finished)
    assert not is_result(finished, "worst_group")
    assert is_result(finished | {"test_worst_group": {}}, "worst_group")
    assert not is_result({"status": status(3), "test": {}})
    assert not is_result({"status": status(-1)})


def test_the_score_of_a_rule():
    overall = {"epoch": 1, "overall": 0.5, "worst_group": 0.1}
    worst = {"epoch": 2, "overall": 0.4, "worst_group": 0.2}
    summary = {"best": overall, "best_worst_group": worst}
    assert score(summary, "overall") == 0.5
    assert score(summary, "worst_group") == 0.2


def test_the_best_mean_over_seeds_wins():
    assert best_values({"a": [0.1, 0.5], "b": [0.4, 0.4], "c": [0.3, 0.3]}) == "b"
    assert best_values({"a": [0.3], "b": [0.3]}) == "a"  # the first of equal ones
    assert best_values({}) is None
    assert best_values({"a": [], "b": []}) is None


def test_values_that_lack_a_seed_are_no_candidates():
    assert candidates({"a": [0.9], "b": [0.1, 0.2], "c": [], "d": [0.3, 0.3]}) == ["b", "d"]
    assert candidates({"a": []}) == []
    assert best_values({"a": [0.9], "b": [0.1, 0.2]}) == "b"
