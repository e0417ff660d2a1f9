"""The wheel, built from the source distribution, runs outside the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
TINY = (
    "--config.data.valid_users=0",
    "--config.data.synthetic.num_users=300", "--config.data.synthetic.num_items=80",
    "--config.model.dim=8", "--config.model.ff_dim=8", "--config.model.max_len=14",
    "--config.model.dropout=0.0", "--config.train.batch_size=8", "--config.train.epochs=1",
    "--config.train.steps_per_epoch=2",
)  # fmt: skip


def build(kind, source, into):
    """Build by the backend that pyproject.toml names, as pip does, without the network."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return into / result.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in ("seqfair_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    with tarfile.open(build("sdist", source, out)) as archive:
        archive.extractall(out, filter="data")
    [unpacked] = (path for path in out.iterdir() if path.is_dir())
    return build("wheel", unpacked, out)


@pytest.fixture(scope="module")
def seqfair(wheel, tmp_path_factory):
    """Runs the installed command in an empty folder, and gives what it printed."""
    folder, elsewhere = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("elsewhere")
    venv.create(folder)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps",
         "--no-index", "--disable-pip-version-check", str(wheel)],
        check=True,
    )  # fmt: skip
    # The dependencies are those of this environment. The path files in there are not read, so
    # the repository, which may be installed there, is not found.
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    [own] = (folder / "lib").glob("python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(paths) + "\n")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["XDG_CACHE_HOME"] = str(elsewhere / "cache")

    def run(*words):
        result = subprocess.run(
            [folder / "bin" / "seqfair", *words],
            cwd=elsewhere, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = subprocess.run(
        [python, "-c", "import seqfair_jax; print(seqfair_jax.__file__)"],
        cwd=elsewhere, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(own)
    return run, elsewhere


def files_below(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_every_file_of_the_package_and_the_configs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name for name in names if name.startswith("seqfair_jax/")}
    expected = {f"seqfair_jax/{name}" for name in files_below(ROOT / "seqfair_jax")}
    expected |= {f"seqfair_jax/configs/{name}" for name in files_below(ROOT / "configs")}
    assert package == expected
    assert {name.partition("/")[0] for name in names - package} == {
        f"{wheel.name.rsplit('-', 3)[0]}.dist-info"
    }


@pytest.mark.slow
def test_the_installed_commands_run_in_an_empty_folder(seqfair):
    run, folder = seqfair
    assert "recommend" in run("--help")
    run("train", "--config=demo", "--workdir=run", *TINY)
    run("recommend", "--workdir=run", "--k=3", "--out=recs.parquet")
    recommended = pd.read_parquet(folder / "recs.parquet")
    assert recommended.groupby("user_id").size().eq(3).all()
    assert "niche" in run("report", "run", "--out=report.html")
    assert "<html" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_csv_file_trains_without_a_config_file(seqfair):
    run, folder = seqfair
    assert "\n  own_log " in run("train", "--help")
    rows = [f"{u},{(u * k) % 23},{100 * u + k}" for u in range(1, 60) for k in range(1, 8)]
    (folder / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    own = [word for word in TINY if "synthetic" not in word and "valid_users" not in word]
    run("train", "--config=own_log", "--config.data.path=events.csv", "--workdir=mine", *own)
    run("recommend", "--workdir=mine", "--out=mine.csv")
    assert set(pd.read_csv(folder / "mine.csv").user_id) <= set(range(1, 60))
