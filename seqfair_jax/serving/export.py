"""Write a trained model as a program of `jax.export` or ONNX, with the ids of its items.

Shape letters: B histories, L items of the longest history, W = max_len - 1 tokens of a window, V
vocabulary, K items that the program returns.
"""

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export, lax

from seqfair_jax import __version__, workdir
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.ranking import Encoded, mixture_weights, score_items
from seqfair_jax.model.mixture import Neighbours
from seqfair_jax.model.packing import BLOCK, Packed
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.serving import exported
from seqfair_jax.serving.recommender import recommend
from seqfair_jax.serving.trained import TrainedModel

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROGRAM, PARAMS = "program.jax", "params.npz"
ITEM_IDS, SETTINGS, LOADER = "item_ids.json", "model.json", "load.py"
FORMATS = ("jax", "onnx")
ONNX_PROGRAM = "program.onnx"
ONNX_LENGTH = 1024  # L of an ONNX program; of a longer history the newest items are used
_SEPARATOR = "/"  # between the parts of a parameter's name
_NEIGHBOURS = "neighbours"
_CHECKED_USERS = 16
# How far a score may be from that of `recommend`, over the largest score. The batches have other
# shapes, so sums are in another order; bfloat16 has three digits.
_TOLERANCE = {"float32": 1e-4, "tensorfloat32": 1e-2, "bfloat16": 0.1}


def top_items(
    model: SASRec,
    max_k: int,
    params: Mapping[str, jax.Array],
    items: jax.Array,
    lengths: jax.Array,
    mask_seen: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The best items after each history: what is exported.

    A history is laid out in W tokens, the newest item last, and the rows of a batch one after
    another, which is a packed batch (`model.packing`). B and L may be symbolic.

    Args:
        model: the network.
        max_k: K.
        params: its parameters by name (`flat_params`), and its neighbours if it has any.
        items: i32[B, L] positions in the vocabulary, oldest first; any value behind the end.
        lengths: i32[B], the number of items of each history, 0 to L.
        mask_seen: bool[], whether no item of the whole history is recommended.

    Returns:
        Scores f32[B, K], best first, and positions i32[B, K]. A masked item has the score -inf.
        Items with the same score are in the order of the vocabulary.
    """
    tree = {"params": unflatten_dict(dict(params), sep=_SEPARATOR)}
    parts = tree["params"].pop(_NEIGHBOURS, None)
    neighbours = parts and Neighbours(**parts)
    num_rows, longest = items.shape
    window, num_items = model.max_len - 1, model.num_items
    num_tokens = jnp.minimum(lengths + 1, window)[:, None]  # the begin token is one of them
    ages = jnp.broadcast_to(jnp.arange(window - 1, -1, -1, dtype=jnp.int32), (num_rows, window))
    real = ages < num_tokens
    place = jnp.clip(lengths[:, None] - 1 - ages, 0, longest - 1)
    is_item = ages < num_tokens - 1
    inputs = jnp.where(is_item, jnp.take_along_axis(items, place, axis=1), num_items)
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]

    size = (num_rows * window + BLOCK - 1) // BLOCK * BLOCK
    pad = (0, size - num_rows * window)

    def flat(tokens: jax.Array, value: Any) -> jax.Array:
        return jnp.pad(tokens.reshape(-1), pad, constant_values=value)

    packed = Packed(
        items=flat(inputs, num_items),
        targets=flat(jnp.zeros_like(inputs), 0),
        slots=flat(jnp.where(real, row, num_rows), num_rows),
        positions=flat(jnp.where(real, ages, 0), 0),
        lengths=num_tokens[:, 0],
    )
    at = (row[:, 0] + 1) * window - 1
    hidden: Any = model.apply(tree, packed, train=False)
    newest = Encoded(hidden[at], mixture_weights(model, tree, packed, neighbours, at))
    table: Any = model.apply(tree, train=False, method="output_table")
    is_seen = mask_seen & (jnp.arange(longest, dtype=jnp.int32)[None] < lengths[:, None])
    seen_rows = jnp.broadcast_to(row, (num_rows, longest)).reshape(-1)
    seen_items = jnp.where(is_seen, items, num_items).reshape(-1)
    scores, _ = score_items(model, newest, table, seen_rows, seen_items, neighbours=neighbours)
    best, places = lax.top_k(scores, max_k)
    return best, places.astype(jnp.int32)


def flat_params(params: Any, neighbours: Neighbours | None = None) -> dict[str, np.ndarray]:
    """The parameters by name, such as `block_0/ff_in/kernel`, and the neighbours."""
    tree = dict(params["params"])
    if neighbours is not None:
        tree[_NEIGHBOURS] = neighbours._asdict()
    return jax.tree.map(np.asarray, flatten_dict(tree, sep=_SEPARATOR))


def export_program(
    model: SASRec, params: Mapping[str, np.ndarray], *, max_k: int, platforms: Sequence[str]
) -> export.Exported:
    """`top_items` for any number of histories of any length, lowered for some platforms.

    The parameters are arguments of the program, so that they are stored once, for all platforms,
    and the program stays small.

    Args:
        model: the network.
        params: its parameters by name.
        max_k: K.
        platforms: of `PLATFORMS`.
    """
    rows, longest = export.symbolic_shape("b, l")
    shaped = jax.ShapeDtypeStruct
    program = jax.jit(functools.partial(top_items, model, max_k))
    return export.export(program, platforms=platforms)(
        {name: shaped(array.shape, array.dtype) for name, array in params.items()},
        shaped((rows, longest), jnp.int32),
        shaped((rows,), jnp.int32),
        shaped((), jnp.bool_),
    )


def check_platforms(names: Sequence[str]) -> None:
    """Check the platforms of a program.

    Raises:
        UserError: if there are none, or one is unknown or named twice.
    """
    bad = [name for name in names if name not in PLATFORMS or names.count(name) > 1]
    if bad or not names:
        raise UserError(
            f"--platforms={','.join(names)}: expected some of {', '.join(PLATFORMS)}, each once, "
            "as in --platforms=cpu,cuda"
        )


def write(
    folder: Path, trained: TrainedModel, *, max_k: int, platforms: Sequence[str]
) -> dict[str, Any]:
    """Write a model to a folder: its program, parameters, ids, settings and loader.

    Args:
        folder: an empty folder.
        trained: the model.
        max_k: the longest list; a longer one than the vocabulary is cut to it.
        platforms: of `PLATFORMS`.

    Returns:
        The settings in `model.json`.
    """
    max_k = min(max_k, len(trained.item_ids))
    params = flat_params(trained.params, trained.neighbours)
    program = export_program(trained.model, params, max_k=max_k, platforms=platforms)
    (folder / PROGRAM).write_bytes(program.serialize())
    np.savez(folder / PARAMS, allow_pickle=False, **params)
    own = {"format": "jax", "shape": None, "platforms": list(platforms)}
    versions = {"jax": jax.__version__, "flatbuffers": version("flatbuffers")}
    return _write_shared(folder, trained, max_k, own, versions)


def write_onnx(
    folder: Path, trained: TrainedModel, *, max_k: int, batch_size: int
) -> dict[str, Any]:
    """Write a model to a folder, as `write` does, with an ONNX program that has the parameters.

    Its input has a fixed shape, since jax2onnx converts no symbolic one of this model. It computes
    in float32, since onnxruntime has few operators for bfloat16 on CPUs.

    Args:
        folder, trained, max_k: as for `write`.
        batch_size: B.

    Raises:
        UserError: if jax2onnx or onnxruntime is not installed.
    """
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f'--format=onnx needs {error.name}; pip install "seqfair_jax[onnx]"'
        ) from None
    max_k = min(max_k, len(trained.item_ids))
    model = trained.model.clone(dtype="float32")
    shape = batch_size, max(ONNX_LENGTH, model.max_len)
    shaped = jax.ShapeDtypeStruct
    params = jax.tree.map(jnp.asarray, flat_params(trained.params, trained.neighbours))
    jax2onnx.to_onnx(
        functools.partial(top_items, model, max_k, params),
        [shaped(shape, jnp.int32), shaped(shape[:1], jnp.int32), shaped((), jnp.bool_)],
        model_name="seqfair",
        return_mode="file",
        output_path=folder / ONNX_PROGRAM,
        input_names=["items", "lengths", "mask_seen"],
        output_names=["scores", "places"],
    )
    for path in folder.iterdir():  # jax2onnx makes a file that its owner alone can read
        path.chmod((folder / ONNX_PROGRAM).stat().st_mode)
    own = {"format": "onnx", "shape": list(shape), "platforms": ["onnxruntime"]}
    versions = {"onnxruntime": onnxruntime.__version__, "jax2onnx": version("jax2onnx")}
    return _write_shared(folder, trained, max_k, own, versions)


def _write_shared(
    folder: Path,
    trained: TrainedModel,
    max_k: int,
    own: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Write what both formats have; returns the settings."""
    ids = json.dumps(trained.item_ids.tolist(), ensure_ascii=False)
    (folder / ITEM_IDS).write_text(ids, encoding="utf-8")
    settings = {
        **own,
        "run": trained.run,
        "max_k": max_k,
        "mask_seen": trained.mask_seen,
        "items": len(trained.item_ids),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        "window": trained.model.max_len - 2,
        "versions": {"seqfair_jax": __version__, **versions},
        "sha256": {path.name: workdir.sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(exported.__file__, folder / LOADER)
    return settings


def can_check(platforms: Sequence[str]) -> bool:
    """Whether this process can run a program for these platforms."""
    backend = jax.default_backend()
    names = ("onnxruntime", *(("cuda", "rocm") if backend == "gpu" else (backend,)))
    return any(name in platforms for name in names)


def check(folder: Path, trained: TrainedModel, *, load: Callable = exported.Model) -> int:
    """Load an exported folder and compare it with `recommend` on some users of the log.

    Args:
        folder: what `write` or `write_onnx` wrote.
        trained: the model.
        load: reads the folder.

    Returns:
        The number of users.

    Raises:
        DivergedError: if a score is not finite.
        RuntimeError: if the scores differ.
    """
    model = load(folder)
    num_users = min(_CHECKED_USERS, len(trained.user_ids))
    users = np.linspace(0, len(trained.user_ids) - 1, num_users).astype(np.int64)
    histories = trained.histories.select(users)
    if shape := model.settings["shape"]:  # of older items the program masks none
        histories = histories.newest(shape[1])
    ids = trained.item_ids[histories.items].tolist()
    rows = [ids[a:b] for a, b in itertools.pairwise(histories.offsets)]
    expected = np.concatenate([b.scores for b in recommend(trained, histories, k=model.max_k)])
    found = np.full_like(expected, -np.inf)
    for row, pairs in zip(found, model.recommend(rows, k=model.max_k), strict=True):
        row[: len(pairs)] = [score for _, score in pairs]
    real = np.isfinite(expected)
    difference = np.abs(found[real] - expected[real]).max(initial=0)
    limit = _TOLERANCE[trained.model.dtype] * max(1, np.abs(expected[real]).max(initial=0))
    if (np.isfinite(found) != real).any() or not difference <= limit:
        raise RuntimeError(
            f"the exported program's scores differ from those of the model by {difference:.2g}"
        )
    return num_users
