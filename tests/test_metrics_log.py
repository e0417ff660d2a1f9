import pytest
from runs import rows_of
from tensorboardX.proto.event_pb2 import Event

from seqfair_jax.errors import UserError
from seqfair_jax.training.metrics_log import MetricsLog


def test_rows_of_a_lost_epoch_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, last_epoch=0)
    for epoch in (1, 2):
        log.write({"epoch": epoch, "train/loss": float("nan") if epoch == 2 else 1.0})
    log.close()
    assert rows_of(tmp_path)[1] == {"epoch": 2, "train/loss": None}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "tra')
    MetricsLog(tmp_path, last_epoch=1).close()
    assert rows_of(tmp_path) == [{"epoch": 1, "train/loss": 1.0}]


def test_damaged_metrics_are_named_and_a_cut_last_line_is_dropped(tmp_path):
    log = MetricsLog(tmp_path, last_epoch=0)
    for epoch in (1, 2, 3):
        log.write({"epoch": epoch, "train/loss": 1.0})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-10])
    MetricsLog(tmp_path, last_epoch=3).close()
    assert [row["epoch"] for row in rows_of(tmp_path)] == [1, 2]
    path.write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged"):
        MetricsLog(tmp_path, last_epoch=3)


def test_every_name_has_a_tensorboard_tag_of_its_own(tmp_path):
    names = ["a b", "a_b", "a%b", "ü"]
    log = MetricsLog(tmp_path, last_epoch=0)
    log.write({"epoch": 1, **{f"train/group_loss/{name}": 1.0 for name in names}})
    log.close()
    (events,) = tmp_path.glob("events*")
    data, tags = events.read_bytes(), []
    while data:  # records of length u64, checksum u32, content, checksum u32
        size = int.from_bytes(data[:8], "little")
        tags += [value.tag for value in Event.FromString(data[12 : 12 + size]).summary.value]
        data = data[16 + size :]
    assert tags == [f"train/group_loss/{name}" for name in names]


def test_lost_figures_are_reported(tmp_path, caplog):
    MetricsLog(tmp_path, last_epoch=0).close()
    assert "lost" not in caplog.text
    (tmp_path / "metrics.jsonl").unlink()
    MetricsLog(tmp_path, last_epoch=3).close()
    assert "metrics.jsonl was removed: the figures of epochs 1 to 3 are lost" in caplog.text
