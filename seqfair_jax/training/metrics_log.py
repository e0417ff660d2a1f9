"""The figures of every epoch: `metrics.jsonl` and TensorBoard events."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from seqfair_jax import workdir
from seqfair_jax.errors import UserError

_log = logging.getLogger(__name__)


class MetricsLog:
    """One object a line in `metrics.jsonl`, and the same figures as TensorBoard events."""

    def __init__(self, folder: Path, *, last_epoch: int):
        """Continue after `last_epoch`; rows of later epochs, from before a kill, are dropped.

        Raises:
            UserError: naming the file and the line that is damaged. Only the last line may be
                cut off, which a kill does.
        """
        self._path = folder / workdir.METRICS
        lines = []
        if self._path.exists():
            lines = workdir.read_text(self._path).splitlines(keepends=True)
        elif last_epoch:
            _log.warning(
                "%s was removed: the figures of epochs 1 to %d are lost", self._path, last_epoch
            )
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                epoch = json.loads(line)["epoch"]
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise UserError(
                    f"{self._path}, line {number} is damaged ({error}): expected a JSON object "
                    "with an epoch; restore the file, or start again in another --workdir"
                ) from None
            if epoch <= last_epoch:
                kept.append(line)
        workdir.write_text(self._path, "".join(kept))
        with workdir.named_errors(folder, "write TensorBoard events to"):
            self._writer = SummaryWriter(
                str(folder), purge_step=last_epoch + 1, write_to_disk=workdir.is_writer()
            )

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """Append a row; its `epoch` is the events' step. Values that are not finite are null."""
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        workdir.append_line(self._path, json.dumps(row, allow_nan=False))
        # `add_scalar` would replace every special character of a tag by "_", so that two groups'
        # curves could share one tag.
        values = [
            Summary.Value(tag=key, simple_value=value)
            for key, value in row.items()
            if "/" in key and value is not None
        ]
        if workdir.is_writer():
            self._writer.file_writer.add_summary(Summary(value=values), row["epoch"])

    def close(self) -> None:
        """Write what is still buffered."""
        with workdir.named_errors(self._path.parent, "write TensorBoard events to"):
            self._writer.close()
