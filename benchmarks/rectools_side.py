"""RecTools' side of `benchmarks.time_to_quality`, which starts it with RecTools' interpreter.

    PYTHON benchmarks/rectools_side.py FOLDER

Reads `settings.json` and `split.npz` of the folder, trains SASRec, and writes to `lists.npz` the
lists of the validation users from time to time. The clock starts after the imports, and stops while
the lists are made.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools.dataset import Dataset
from rectools.models import SASRecModel


def times():
    """The wall time and the CPU time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


class Clock(Callback):
    """Measures the training, makes the lists, and stops the training."""

    def __init__(self, settings, users):
        self.settings, self.users = settings, users
        self.began, self.paused = times(), np.zeros(2)  # and the seconds in which lists were made
        self.targets = 0
        self.points = []

    def __deepcopy__(self, memo):
        # `fit` works on a copy of the trainer, and there is one clock.
        return self

    def seconds(self):
        """The seconds of training until now: of wall time, and on the CPU."""
        return (times() - self.began - self.paused).tolist()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        """Make the lists where they are due, and stop at the end of the time or of the steps."""
        self.targets += int((batch["y"] != 0).sum())
        last = self.points[-1]["seconds"] if self.points else 0.0
        seconds = self.seconds()[0]
        is_over = seconds >= self.settings["seconds"] or (
            0 < self.settings["steps"] <= trainer.global_step
        )
        if is_over or seconds - last >= self.settings["every"]:
            self.make_lists(trainer.global_step)
            module.train()
        trainer.should_stop = is_over

    def make_lists(self, step):
        """The best items of each validation user, by the parameters of this step."""
        point = dict(zip(("seconds", "CPU seconds"), self.seconds(), strict=True))
        point |= {"steps": step, "targets": self.targets}
        before = times()
        self.model.is_fitted = True  # `recommend` asks for it; it reads the current parameters
        table = self.model.recommend(
            self.users, self.dataset, k=self.settings["k"],
            filter_viewed=self.settings["mask_seen"], add_rank_col=True,
        )  # fmt: skip
        lists = np.full((len(self.users), self.settings["k"]), -1, np.int32)
        place = np.searchsorted(self.users, table["user_id"].to_numpy())
        lists[place, table["rank"].to_numpy() - 1] = table["item_id"].to_numpy()
        self.points.append(point | {"lists": lists})
        self.paused += times() - before
        print(f"RecTools: step {step} after {point['seconds']:.0f} s", flush=True)


def main(folder):
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    seed_everything(settings["seed"])
    split = dict(np.load(folder / "split.npz"))
    clock = Clock(settings, split.pop("users"))
    clock.dataset = Dataset.construct(pd.DataFrame(split))

    def trainer():
        return Trainer(
            max_epochs=-1, accelerator="cpu", devices=1, callbacks=[clock], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    clock.model = SASRecModel(get_trainer_func=trainer, **settings["model"])
    clock.model.fit(clock.dataset)
    np.savez(
        folder / "lists.npz",
        **{key: np.array([point[key] for point in clock.points]) for key in clock.points[0]},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
