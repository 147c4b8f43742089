"""Labelled image files through NVIDIA DALI, to the pixels that PIL and torchvision make of them.

Geometry is torchvision's to the pixel, and so is decoding on a CPU. What remains different is rounding: PIL rounds (and
clips) to a byte after each of its two passes of resizing, DALI once.
"""

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dfkd_fast.errors import DfkdError

from .eval_transform import EvalTransform
from .folder import FolderBatches
from .headers import is_plain
from .image_lists import ImageList

__all__ = ["DaliBatches", "dali_unavailable_reason"]


def dali_unavailable_reason(view: EvalTransform) -> str | None:
    """Why DALI cannot serve this view here; None if it can."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "DALI is not installed (pip install nvidia-dali-cuda130)"
    if len(view.mean) != 3:
        return "DALI's grey images are not PIL's"
    return None


def _is_dalis(path: Path) -> bool:
    """Whether DALI decodes a file as PIL does, and can be told its name."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return is_plain(path)


class DaliBatches:
    """Batches of a listing: images (B, 3, crop, crop), channels-last, and labels (B,) on the device; the last may be smaller.

    Files that decoders disagree on (:func:`~dfkd_fast.data.headers.is_plain`), or whose names are no UTF-8, come last, and
    through PIL. A batch is a view of DALI's buffer: use it before the next one is asked for.

    Args:
        listing: the files.
        view: what becomes of them.
        batch_size: files a batch.
        threads: of the decoder.
        device: where the batches shall be; JPEGs are decoded there.
        dtype: of the images, float32 or float16.

    Raises:
        DfkdError: DALI cannot serve this here.
    """

    def __init__(
        self, listing: ImageList, view: EvalTransform, batch_size: int, threads: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if (reason := dali_unavailable_reason(view)) is not None:
            raise DfkdError(f"loader 'dali': {reason}; use data.loader = 'torchvision'")
        with ThreadPoolExecutor() as pool:
            plain = list(pool.map(_is_dalis, listing.paths))
        self.count = len(listing)
        self.unreadable: list[str] = []
        """Files of the last pass that could not be decoded, and why."""
        self.view, self.threads, self.device, self.dtype = view, max(threads, 1), device, dtype
        self.batch_size = min(batch_size, max(self.count, 1))  # DALI makes room for all of it
        self._files = listing.take([index for index, good in enumerate(plain) if good])
        self._others = listing.take([index for index, good in enumerate(plain) if not good])
        self._labels = torch.tensor(self._files.labels, dtype=torch.long, device=device)
        self._pipeline: Any = None

    def __len__(self) -> int:
        return sum(-(-len(files) // self.batch_size) for files in (self._files, self._others))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.unreadable.clear()
        done = 0
        try:
            for images, labels in self._decoded():
                done += len(labels)
                yield images, labels
        except RuntimeError as error:
            if "dali" not in str(error).lower():
                raise
            self._pipeline = None  # it serves nothing after an error
        # PIL has the last word on what DALI does not decode.
        rest = self._files.take(range(done, len(self._files)))
        for files in (rest, self._others):
            if len(files):
                batches = FolderBatches(files, self.view, self.batch_size, workers=0)
                yield from ((images.to(self.device, self.dtype), labels.to(self.device)) for images, labels in batches)
                self.unreadable += batches.unreadable

    def _decoded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What DALI decodes, in the order of the files."""
        count = len(self._files)
        if not count:
            return
        pipeline, self._pipeline = self._pipeline or self._build(), None  # a pass that is broken off leaves it in the middle
        for start in range(0, count, self.batch_size):
            pipeline.schedule_run()
            images, numbers = pipeline.share_outputs()
            size = min(self.batch_size, count - start)
            served = from_dlpack(numbers.as_tensor()).flatten()[:size].cpu()
            if not torch.equal(served.long(), torch.arange(start, start + size)):
                raise AssertionError(f"DALI served other files than {start} to {start + size - 1}")
            yield from_dlpack(images.as_tensor())[:size].permute(0, 3, 1, 2), self._labels[start : start + size]
            pipeline.release_outputs()
        self._pipeline = pipeline

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types
        from nvidia.dali import math as dali_math

        on_gpu = self.device.type == "cuda"
        view, crop = self.view, self.view.crop
        pipeline = Pipeline(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=2,
        )
        with pipeline:
            files = [str(path) for path in self._files.paths]
            # A whole number of batches, so that every pass begins with the first file.
            encoded, number = fn.readers.file(files=files, labels=list(range(len(files))), pad_last_batch=True)
            shape = fn.peek_image_shape(encoded, adjust_orientation=False)
            sides = fn.slice(shape, 0, 2, axes=[0])
            shorter = dali_math.min(sides[0], sides[1])
            resized = (sides * view.resize) // shorter  # rounded down, as torchvision does
            spare = resized - crop
            begin = spare // 2 + (spare & 1) * ((spare // 2) & 1)  # Python's round(): halves to the even side
            scale = sides / fn.cast(resized, dtype=types.FLOAT)
            images = fn.decoders.image(
                encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
            )
            images = fn.resize(
                images,
                size=[crop, crop],
                # Only what is left after the crop is ever resized; the sampling points are those of the whole.
                roi_start=begin * scale,
                roi_end=(begin + crop) * scale,
                interp_type={"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[view.interpolation],
                antialias=True,
            )
            images = fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT16 if self.dtype == torch.float16 else types.FLOAT,
                output_layout="HWC",
                mean=[255 * mean for mean in view.mean],
                std=[255 * std for std in view.std],
            )
            pipeline.set_outputs(images, number)
        pipeline.build()
        return pipeline
