"""Loads labeled image files with NVIDIA DALI, with the same preprocessing as PIL and torchvision.

The geometry equals torchvision's exactly, and so does decoding on the CPU. Rounding differs: PIL rounds and clips to 8 bits after
each of its two resizing passes, DALI once.
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
from .headers import decodes_identically
from .image_lists import ImageList

__all__ = ["DaliBatches", "dali_unavailable_reason"]


def dali_unavailable_reason(transform: EvalTransform) -> str | None:
    """Returns why DALI cannot be used with this transform on this machine, or None if it can."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "DALI is not installed (pip install nvidia-dali-cuda130)"
    if len(transform.mean) != 3:
        return "DALI converts to grayscale differently from PIL"
    return None


def _is_dali_readable(path: Path) -> bool:
    """Returns True if DALI decodes a file in the same way as PIL and can open its path, which must be UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return decodes_identically(path)


class DaliBatches:
    """Batches of an image list, decoded and preprocessed by DALI; the last batch may be smaller.

    Each batch has channels-last images (B, 3, crop, crop) and labels (B,) on ``device``. Files that decoders may decode differently
    (:func:`~dfkd_fast.data.headers.decodes_identically`) and files whose paths are not UTF-8 come last and are read by PIL. The
    images are a view of DALI's buffer, which the next iteration overwrites.

    Args:
        image_list: the files and labels.
        transform: the preprocessing.
        batch_size: number of images per batch.
        threads: number of DALI's CPU threads.
        device: device of the batches; on a GPU, JPEGs are decoded there.
        dtype: dtype of the images, float32 or float16.

    Raises:
        DfkdError: DALI is not installed or does not support the transform.
    """

    def __init__(
        self, image_list: ImageList, transform: EvalTransform, batch_size: int, threads: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if (reason := dali_unavailable_reason(transform)) is not None:
            raise DfkdError(f"loader 'dali': {reason}; use data.loader = 'torchvision'")
        with ThreadPoolExecutor() as pool:
            readable = list(pool.map(_is_dali_readable, image_list.paths))
        self.count = len(image_list)
        self.unreadable: list[str] = []
        """Files that could not be decoded in the last pass, each with the reason."""
        self.transform, self.threads, self.device, self.dtype = transform, max(threads, 1), device, dtype
        self.batch_size = min(batch_size, max(self.count, 1))  # DALI allocates buffers for a full batch
        self._dali_files = image_list.take([index for index, by_dali in enumerate(readable) if by_dali])
        self._pil_files = image_list.take([index for index, by_dali in enumerate(readable) if not by_dali])
        self._labels = torch.tensor(self._dali_files.labels, dtype=torch.long, device=device)
        self._pipeline: Any = None

    def __len__(self) -> int:
        return sum(-(-len(files) // self.batch_size) for files in (self._dali_files, self._pil_files))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.unreadable.clear()
        decoded = 0
        try:
            for images, labels in self._decoded():
                decoded += len(labels)
                yield images, labels
        except RuntimeError as error:
            if "dali" not in str(error).lower():
                raise
            self._pipeline = None  # a pipeline cannot be used after an error
        # Files that DALI fails to decode are read by PIL, which decides whether they are unreadable.
        remaining = self._dali_files.take(range(decoded, len(self._dali_files)))
        for files in (remaining, self._pil_files):
            if len(files):
                batches = FolderBatches(files, self.transform, self.batch_size, workers=0)
                yield from ((images.to(self.device, self.dtype), labels.to(self.device)) for images, labels in batches)
                self.unreadable += batches.unreadable

    def _decoded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches that DALI decodes, in the order of the files."""
        count = len(self._dali_files)
        if not count:
            return
        pipeline, self._pipeline = self._pipeline or self._build(), None  # an interrupted pass leaves the pipeline in the middle
        for start in range(0, count, self.batch_size):
            pipeline.schedule_run()
            images, numbers = pipeline.share_outputs()
            size = min(self.batch_size, count - start)
            indices = from_dlpack(numbers.as_tensor()).flatten()[:size].cpu()
            if not torch.equal(indices.long(), torch.arange(start, start + size)):
                raise AssertionError(f"DALI returned files {indices.tolist()}, expected {start} to {start + size - 1}")
            yield from_dlpack(images.as_tensor())[:size].permute(0, 3, 1, 2), self._labels[start : start + size]
            pipeline.release_outputs()
        self._pipeline = pipeline

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types
        from nvidia.dali import math as dali_math

        on_gpu = self.device.type == "cuda"
        transform, crop = self.transform, self.transform.crop
        pipeline = Pipeline(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=2,
        )
        with pipeline:
            files = [str(path) for path in self._dali_files.paths]
            # Padded to full batches, so that every pass starts with the first file.
            encoded, number = fn.readers.file(files=files, labels=list(range(len(files))), pad_last_batch=True)
            shape = fn.peek_image_shape(encoded, adjust_orientation=False)
            sides = fn.slice(shape, 0, 2, axes=[0])
            shorter = dali_math.min(sides[0], sides[1])
            resized = (sides * transform.resize) // shorter  # rounded down, as torchvision does
            margin = resized - crop
            start = margin // 2 + (margin & 1) * ((margin // 2) & 1)  # as Python's round(): half to even
            scale = sides / fn.cast(resized, dtype=types.FLOAT)
            images = fn.decoders.image(
                encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
            )
            images = fn.resize(
                images,
                size=[crop, crop],
                # Resizes only the cropped region, with the sampling points of the whole image.
                roi_start=start * scale,
                roi_end=(start + crop) * scale,
                interp_type={"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[transform.interpolation],
                antialias=True,
            )
            images = fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT16 if self.dtype == torch.float16 else types.FLOAT,
                output_layout="HWC",
                mean=[255 * mean for mean in transform.mean],
                std=[255 * std for std in transform.std],
            )
            pipeline.set_outputs(images, number)
        pipeline.build()
        return pipeline
