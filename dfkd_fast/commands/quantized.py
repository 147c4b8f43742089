"""What a run with a quantized student records and writes besides that of other runs."""

import json
import math
from typing import Any

from torch import nn

from dfkd_fast import distributed
from dfkd_fast.engine import Trainer
from dfkd_fast.engine.agreement import agreement
from dfkd_fast.log import LOGGER
from dfkd_fast.models import save_quantized
from dfkd_fast.models.selection import join_names
from dfkd_fast.recipe import Recipe
from dfkd_fast.report import RunFolder
from dfkd_fast.run import Run
from dfkd_fast.surgery import FLOAT, left_in_float

__all__ = ["calibration_row", "float_layers", "record_calibration", "size_row", "write_quantized"]

MAX_NAMES = 4
"""Names of layers in a line."""
REBUILD = '''"""Rebuilds {model} with {bits}, written by dfkd-fast: ``from {module} import build``."""

from pathlib import Path

from torch import nn

from dfkd_fast.models import build_model, load_quantized


def build() -> nn.Module:
    """Returns the network in evaluation mode: images (B, {channels}, {size}, {size}), normalized with mean {mean} and
    standard deviation {std} per channel of images in [0, 1], to logits of {classes} classes."""
    network = build_model({model!r}, num_classes={classes}, channels={channels})
    return load_quantized(network, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    print(build())
'''


def float_layers(recipe: Recipe, student: nn.Module) -> str | None:
    """Returns one line with the layers of a quantized student whose weights are in float although they are to be quantized, or None."""
    bits = recipe.student.weight_bits
    if bits == FLOAT or not (names := left_in_float(student)):
        return None
    return f"student.weight_bits = {bits}: left in float: {join_names(names, MAX_NAMES)}"


def record_calibration(run: Run, trainer: Trainer) -> None:
    """Write ``calibration.json``: the calibrated student's agreement with the teacher, and its accuracy, before any step, and the seconds
    of pretraining and calibration."""
    seconds = math.fsum(trainer.state.clock.read().values())
    accuracy = None if trainer.evaluate is None else float(trainer.evaluate(trainer.result))
    record = {"accuracy": accuracy, "agreement": agreement(trainer.state), "seconds": seconds}
    run.folder.write_text(run.folder.calibration, json.dumps(record) + "\n")
    of_images = "" if accuracy is None else f"{run.recipe.data.metric} {accuracy:.2f} %, "
    LOGGER.info("calibrated: %sagreement with the teacher on generated samples %.2f %%", of_images, record["agreement"])


def write_quantized(run: Run, teacher: nn.Module, student: nn.Module) -> dict[str, Any]:
    """Write the quantized student's weights as integers, and the Python file that rebuilds it.

    Returns:
        The entry ``quantized`` of ``summary.json``: bits, bytes, and the results after the calibration, if they are recorded.
    """
    recipe, folder = run.recipe, run.folder
    if folder.writes:
        save_quantized(student, folder.quantized)
    folder.write_text(folder.rebuild, _source(recipe, folder))
    distributed.barrier()  # the other processes read the file's size
    calibrated = folder.read_calibration()
    return {
        "bits": _bits(recipe),
        "bytes": folder.quantized.stat().st_size,
        "teacher_bytes": sum(tensor.numel() * tensor.element_size() for tensor in teacher.state_dict().values()),
        "calibrated_accuracy": calibrated.get("accuracy"),
        "calibrated_agreement": calibrated.get("agreement"),
    }


def calibration_row(entry: dict[str, Any]) -> tuple[str, str]:
    """Returns the row of a run's table with the results before any training, for the entry of :func:`write_quantized`."""
    results = ("calibrated_accuracy", ""), ("calibrated_agreement", " agreement")
    texts = [f"{entry[name]:.2f} %{what}" for name, what in results if entry[name] is not None]
    return "student, only calibrated", ", ".join(texts) or "not recorded"


def size_row(entry: dict[str, Any]) -> tuple[str, str]:
    """Returns the row with the sizes of both networks, likewise."""
    before, after = entry["teacher_bytes"], entry["bytes"]
    return "size", f"{before / 1e6:.2f} MB → {after / 1e6:.2f} MB, {before / after:.1f} times smaller ({entry['bits']})"


def _bits(recipe: Recipe) -> str:
    return f"w{recipe.student.weight_bits}a{recipe.student.activation_bits}"


def _source(recipe: Recipe, folder: RunFolder) -> str:
    data, model = recipe.data, recipe.student.model
    return REBUILD.format(
        model=model,
        bits=_bits(recipe),
        module=folder.rebuild.stem,
        channels=data.channels,
        size=data.image_size,
        classes=data.num_classes,
        mean=tuple(data.mean),
        std=tuple(data.std),
    )
