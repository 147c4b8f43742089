"""Makes a teacher of the package from a run of ``dfkd-fast teach``."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import dfkd_fast
from dfkd_fast.commands.networks import build_network
from dfkd_fast.data import DataSettings
from dfkd_fast.errors import DfkdError
from dfkd_fast.evaluation import Evaluator
from dfkd_fast.models import load_weights, read_metadata, save_weights
from dfkd_fast.recipe import load_recipe, recipe_from_toml, recipe_to_toml
from dfkd_fast.report import RunFolder

__all__ = ["FOLDER", "ship"]

FOLDER = Path(dfkd_fast.__file__).parent / "teachers"
LICENSE = "BSD-3-Clause, as dfkd-fast"


def ship(run: Path, data_root: Path, note: str, path: Path, commit: str) -> float:
    """Write a trained teacher in bfloat16, with its recipe, its accuracy, its seconds and its log.

    Args:
        run: folder of a finished ``dfkd-fast teach``.
        data_root: of the data set on whose test images the stored weights are evaluated.
        note: one sentence about the data that it was trained on.
        path: of the safetensors file; the log is written next to it as ``.jsonl``.
        commit: of the code that trained it.

    Returns:
        The accuracy of the stored weights in percent.

    Raises:
        DfkdError: the run is not finished, or the data cannot be read.
    """
    folder = RunFolder(run)
    if not folder.teacher.is_file() or not folder.teacher_metrics.is_file():
        raise DfkdError(f"{run} is not a finished run of dfkd-fast teach")
    metadata = read_metadata(folder.teacher)
    trained = recipe_from_toml(metadata["recipe"], f"recipe in {folder.teacher}")
    teacher = build_network(trained, "teacher")
    load_weights(teacher, folder.teacher)
    round_matrices(teacher)
    # The run may have read the same images from another folder or format.
    shipped = load_recipe(trained.name)
    recipe = replace(trained, description=shipped.description, data=shipped.data, provenance={})
    metadata |= {"recipe": recipe_to_toml(recipe), "data": note, "license": LICENSE, "commit": commit}
    save_weights(teacher, path, metadata)
    accuracy = _accuracy(path, teacher.float(), replace(trained.data, root=str(data_root)))
    save_weights(round_matrices(teacher), path, metadata | {"accuracy": f"{accuracy:.2f}", "metric": recipe.data.metric})
    shutil.copyfile(folder.teacher_metrics, path.with_suffix(".jsonl"))
    return accuracy


def round_matrices(network: nn.Module) -> nn.Module:
    """Converts weight matrices and kernels to bfloat16, in place; vectors, such as those of batch norms, stay in float32.

    Returns:
        The network.
    """
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.bfloat16()
    return network


def _accuracy(path: Path, network: nn.Module, data: DataSettings) -> float:
    load_weights(network, path)
    return Evaluator(data, torch.device("cpu"))(network)
