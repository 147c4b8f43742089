"""Image files of every kind a folder may hold."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth noise, which a JPEG does not ruin."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: object) -> bytes:
    return encoded(image, "JPEG", **{"quality": 90} | options)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(height: int, width: int) -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 65535, height * width).astype(np.uint16).reshape(height, width)), "PNG")


PICTURE = noise(60, 80)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # its orientation: a quarter to the right
PLAIN = {
    "jpeg": jpeg(PICTURE),
    "progressive": jpeg(PICTURE, progressive=True),
    "grey": jpeg(PICTURE.convert("L")),
    "full chroma": jpeg(PICTURE, subsampling=0),
    "turned": jpeg(PICTURE, exif=TURNED),
    "png": encoded(PICTURE, "PNG"),
    "grey png": encoded(PICTURE.convert("L"), "PNG"),
}
"""What every decoder turns into the same pixels."""
ODD = {
    "cmyk": jpeg(PICTURE.convert("CMYK")),
    "16 bits": png16(60, 80),
    "palette": encoded(PICTURE.convert("P"), "PNG"),
    "transparent": encoded(PICTURE.convert("RGBA"), "PNG"),
    "animated": encoded(PICTURE, "GIF", save_all=True, append_images=[noise(60, 80, 1)]),
    "animated png": encoded(PICTURE, "PNG", save_all=True, append_images=[noise(60, 80, 1)]),
    "webp": encoded(PICTURE, "WEBP", lossless=True),
    "bmp": encoded(PICTURE, "BMP"),
    "trailing bytes": jpeg(PICTURE) + b"more",
}
"""What PIL reads, and others may read otherwise or not at all."""
BROKEN = {
    "empty": b"",
    "truncated": jpeg(PICTURE)[:-200],
    "header only": jpeg(PICTURE)[:40],
    "text": b"this is no image",
    "truncated png": encoded(PICTURE, "PNG")[:-100],
}
"""What PIL cannot read."""


def write_folder(root: Path, files: dict[str, bytes], classes: int = 2) -> None:
    """``val/`` with folders a, b, ..., and the files among them in turn; every one is called .jpg."""
    for number in range(classes):
        (root / "val" / chr(ord("a") + number)).mkdir(parents=True)
    for index, (name, content) in enumerate(files.items()):
        (root / "val" / chr(ord("a") + index % classes) / f"{name}.jpg").write_bytes(content)
