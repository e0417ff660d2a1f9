"""`seqfair export --workdir=DIR --out=DIR`: a model as a folder that needs jax alone."""

import logging
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from seqfair_jax import workdir
from seqfair_jax.cli import Command
from seqfair_jax.errors import Interrupted, UserError
from seqfair_jax.report.card import model_card
from seqfair_jax.report.rows import HIDDEN
from seqfair_jax.serving import export, load

_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Write the model of a finished run as a folder."""
    command = Command(
        "export",
        "Write the model of a finished run as a folder with a program of jax.export or ONNX, the\n"
        "ids of its items and a model card. The folder works without seqfair_jax: it needs jax,\n"
        "numpy and flatbuffers, or for ONNX onnxruntime and numpy.",
    )
    command.string("workdir", "the folder of a finished run, or of a grid of runs (required)")
    command.string("out", "the folder to write, which must be new or empty (required)")
    command.integer("max_k", "the longest list that the program can return", 100)
    command.string("format", "jax, or onnx for onnxruntime", "jax")
    command.string(
        "platforms", f"of a jax program: some of {','.join(export.PLATFORMS)}", "cpu,cuda"
    )
    command.integer("batch_size", "histories that an onnx program scores at once", 1)
    command.string("run", "the name of a run of a grid (default: the one that was selected)")
    command.string("rule", "the epoch that was best overall, or for the worst_group", "overall")
    command.bool("show_small_groups", f"do not hide figures in the model card ({HIDDEN})")
    command.run(argv, lambda values, _: _export(command, values))


def _export(command: Command, values: flags.FlagValues) -> None:
    directory = command.required("workdir")
    out = workdir.user_path(command.required("out"))
    platforms = [name.strip() for name in values.platforms.split(",")]
    export.check_platforms(platforms)
    if values.format not in export.FORMATS:
        raise UserError(f"--format={values.format}: expected {' or '.join(export.FORMATS)}")
    if values.max_k < 1 or values.batch_size < 1:
        raise UserError(
            f"--max_k={values.max_k}, --batch_size={values.batch_size}: expected 1 or more"
        )
    workdir.refuse_filled(out)
    trained = load(directory, run=values.run, rule=values.rule)
    _LOG.info("%s", trained.described(values.rule))

    def write(folder: Path) -> None:
        if values.format == "onnx":
            settings = export.write_onnx(
                folder, trained, max_k=values.max_k, batch_size=values.batch_size
            )
        else:
            settings = export.write(folder, trained, max_k=values.max_k, platforms=platforms)
        if settings["max_k"] < values.max_k:
            _LOG.info("max_k is %s, the number of items", settings["max_k"])
        if export.can_check(settings["platforms"]):
            checked = export.check(folder, trained)
            _LOG.info("the lists of %s users of the log are those of the run", checked)
        else:
            names = ", ".join(platforms)
            _LOG.warning("the program was not checked, since this machine is none of %s", names)
        card = model_card(
            trained.folder, values.rule, settings, show_small_groups=values.show_small_groups
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    try:
        workdir.write_folder(out, write)
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped: {out} was not written", error) from None
    print(f"{out}:")
    for path in sorted(out.iterdir()):
        print(f"  {path.name:<14}{path.stat().st_size:>14,} bytes")
