"""Data sets that are not what their names promise: arrays, lists, folders of images, MNIST's and CIFAR's files, label images."""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from dfkd_fast.models import build_model
from tests.bad_input.case import Case, Content, case
from tests.pictures import PLAIN

PICTURE = PLAIN["png"]
COLOUR = ("data.channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]")


def teaches(name: str, data: str, root: str, *sets: str, says: str, files: Mapping[str, Content] | None = None) -> Case:
    """A teacher that is to be trained on a data set."""
    changes = [option for change in (f"data.name={data}", *sets) for option in ("--set", change)]
    return case(name, "teach", "digits", *changes, "--data-root", root, says=says, files=files)


def evaluates(name: str, data: str, root: str, *sets: str, says: str, files: Mapping[str, Content] | None = None) -> Case:
    """A network that is to be tested on image files."""
    changes = [option for change in (*COLOUR, f"data.name={data}", "data.num_classes=2", *sets) for option in ("--set", change)]
    return case(
        name,
        *("evaluate", "net.safetensors", "--recipe", "digits", "--role", "teacher", "--set", "teacher.model=lenet5", *changes),
        *("--data-root", root),
        says=says,
        files={"net.safetensors": weights, **(files or {})},
    )


def weights(path: Path) -> None:
    save_file(build_model("lenet5", num_classes=2, channels=3).state_dict(), path)


# Arrays in a file.
IMAGES, LABELS = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4)
ARRAYS = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS}


def packed(**changed: Any) -> bytes:
    """An .npz file of four images a split, with changed arrays; those that are None are left out."""
    file = io.BytesIO()
    arrays: dict[str, Any] = {name: array for name, array in (ARRAYS | changed).items() if array is not None}
    np.savez(file, **arrays)
    return file.getvalue()


def with_member(name: str, content: bytes) -> bytes:
    """An .npz file with a member of any content."""
    file = io.BytesIO(packed(**{name: None}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def array_header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    """The head of an .npy file of a shape, without the array."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def encrypted() -> bytes:
    """An .npz file whose members are flagged as encrypted, in their own headers and in the directory."""
    content = bytearray(packed())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + flags] |= 1
            place = content.find(signature, place + 4)
    return bytes(content)


def arrays(name: str, content: Content, *sets: str, says: str) -> Case:
    return teaches(name, "npz", "set.npz", *sets, says=says, files={"set.npz": content})


ARRAY_FILES = [
    arrays("an .npz file that is a folder", Path.mkdir, says="set.npz is a folder: data set 'npz' is a file"),
    arrays("an .npz file that is empty", b"", says="set.npz is not an .npz file that can be read"),
    arrays("an .npz file that is text", "images", says="set.npz is not an .npz file that can be read"),
    arrays("an .npz file that is a pickle", pickle.dumps(ARRAYS), says="set.npz is not an .npz file that can be read"),
    arrays("an .npz file that is one array", array_header((0,)), says="set.npz is not an .npz file that can be read"),
    arrays("an .npz file that ends in the middle", packed()[:700], says="set.npz is not an .npz file that can be read"),
    arrays(
        "an .npz file with a flipped byte", packed().replace(b"\0" * 64, b"\1" * 64), says="x_test is no array that can be read: Bad CRC"
    ),
    arrays("an encrypted .npz file", encrypted(), says="x_test is no array that can be read: File 'x_test.npy' is encrypted"),
    arrays("an .npz file without members", b"PK\x05\x06" + bytes(18), says="set.npz lacks x_test, y_test: it has []"),
    arrays("an .npz file of other members", packed(x_test=None), says="set.npz lacks x_test: it has ['x_train', 'y_test', 'y_train']"),
    arrays("an .npz file without a training split", packed(y_train=None), says="set.npz lacks y_train: it has ["),
    arrays("an empty member", with_member("x_test", b""), says="set.npz, x_test is no array that can be read: "),
    arrays("a member that is no array", with_member("x_test", b"not an array"), says="set.npz, x_test is no array that can be read: "),
    arrays(
        "a member that ends in its header",
        with_member("y_test", array_header((4,))[:40]),
        says="set.npz, y_test is no array that can be read: ",
    ),
    arrays(
        "a member shorter than its shape",
        with_member("x_test", array_header((4, 8, 8, 1))),
        says="set.npz, x_test is no array that can be read: ",
    ),
    arrays(
        "a member of a huge shape",
        with_member("x_test", array_header((2**40, 8, 8, 1))),
        says="set.npz, x_test is no array that can be read: ",
    ),
    arrays(
        "a member of an impossible shape",
        with_member("x_test", array_header((2**80, 8, 8, 1))),
        says="set.npz, x_test is no array that can be read: ",
    ),
    arrays(
        "a member of a negative shape",
        with_member("x_test", array_header((-4, 8, 8, 1))),
        says="set.npz, x_test is no array that can be read: ",
    ),
    arrays(
        "a member of an unknown type",
        with_member("x_test", array_header((4,), "|z9")),
        says="set.npz, x_test is no array that can be read: ",
    ),
    arrays(
        "a member that is a pickle",
        packed(x_test=np.array([{}], object)),
        says="set.npz, x_test is no array that can be read: Object arrays cannot be",
    ),
    arrays(
        "images that are fractions",
        packed(x_test=IMAGES / 255),
        says="test: images must be uint8 (N, H, W, C) of at least one pixel, not float64 (4, 8, 8, 1)",
    ),
    arrays(
        "images that are truths", packed(x_test=IMAGES > 0), says="test: images must be uint8 (N, H, W, C) of at least one pixel, not bool"
    ),
    arrays(
        "images that are signed",
        packed(x_test=IMAGES.astype(np.int64)),
        says="test: images must be uint8 (N, H, W, C) of at least one pixel, not int64",
    ),
    arrays(
        "images that are complex",
        packed(x_test=IMAGES * 1j),
        says="test: images must be uint8 (N, H, W, C) of at least one pixel, not complex128",
    ),
    arrays(
        "images that are text",
        packed(x_test=np.array(["a"] * 4)),
        says="test: images must be uint8 (N, H, W, C) of at least one pixel, not <U1",
    ),
    arrays(
        "images without channels",
        packed(x_test=IMAGES[..., 0]),
        says="test: images must be uint8 (N, H, W, C) of at least one pixel, not uint8 (4, 8, 8)",
    ),
    arrays(
        "one number for images",
        packed(x_test=np.uint8(0)),
        says="test: images must be uint8 (N, H, W, C) of at least one pixel, not uint8 ()",
    ),
    arrays("images in channels-first order", packed(x_test=IMAGES.transpose(0, 3, 1, 2)), says="test: images have 8 channels"),
    arrays("no images", packed(x_test=IMAGES[:0], y_test=LABELS[:0]), says="test: there are no images"),
    arrays(
        "images of no pixels",
        packed(x_test=IMAGES[:, :0]),
        says="test: images must be uint8 (N, H, W, C) of at least one pixel, not uint8 (4, 0, 8, 1)",
    ),
    arrays("training images of no width", packed(x_train=IMAGES[:, :, :0]), says="not uint8 (4, 8, 0, 1)"),
    arrays("images of other channels", packed(x_test=IMAGES.repeat(3, 3)), says="test: images have 3 channels, data.channels is 1"),
    arrays("fewer labels than images", packed(y_test=LABELS[:3]), says="test: labels must be integers (4,), not int64 (3,)"),
    arrays("labels that are fractions", packed(y_test=LABELS / 1), says="test: labels must be integers (4,), not float64 (4,)"),
    arrays("labels that are truths", packed(y_test=LABELS > 1), says="test: labels must be integers (4,), not bool (4,)"),
    arrays("labels one-hot", packed(y_test=np.eye(4, dtype=int)), says="test: labels must be integers (4,), not int64 (4, 4)"),
    arrays("a label below 0", packed(y_test=LABELS - 1), says="test: labels run from -1 to 2, data.num_classes is 10"),
    arrays("a label too large", packed(y_test=LABELS + 7), says="test: labels run from 7 to 10, data.num_classes is 10"),
    arrays("a label beyond 64 bits", packed(y_test=LABELS.astype(np.uint64) + 2**63), says="test: labels run from 9223372036854775808"),
    arrays("a training label too large", packed(y_train=LABELS + 7), says="train: labels run from 7 to 10, data.num_classes is 10"),
    arrays("a subset larger than the set", packed(), "data.subset=5", says="data.subset = 5: there are 4 test images"),
]


# Lists of files.
def lists(name: str, content: Content, says: str) -> Case:
    return evaluates(name, "list", "list.txt", says=says, files={"list.txt": content, "a.png": PICTURE})


def wrong_line(name: str, line: str, says: str | None = None) -> Case:
    """A list whose second line is wrong."""
    return lists(name, f"a.png 0\n{line}\n", says or "list.txt, line 2: ")


LISTS = [
    lists("a list that is a folder", Path.mkdir, says="list.txt is a folder: data set 'list' is a file"),
    lists("a list that is no text", b"a.png 0\n\xff.png 1\n", says="list.txt cannot be read: 'utf-8' codec"),
    lists("a list in UTF-16", "a.png 0\n".encode("utf-16"), says="list.txt cannot be read: 'utf-8' codec"),
    lists("a list that is an image", PICTURE, says="list.txt cannot be read: 'utf-8' codec"),
    lists("an empty list", "", says="list.txt: no images in it"),
    lists("a list of blank lines", "\n  \n\t\n", says="list.txt: no images in it"),
    lists("a list of comments", "# path class\n# a.png 0\n", says="list.txt, line 1: '# path class' must be"),
    wrong_line("a line without a class", "b.png", says="list.txt, line 2: 'b.png' must be a path, a space and a class's number"),
    wrong_line("a line without a path", "1", says="list.txt, line 2: '1' must be"),
    wrong_line("a class that is a name", "b.png cat", says="list.txt, line 2: 'b.png cat' must be"),
    wrong_line("a class of two signs", "b.png --5", says="list.txt, line 2: 'b.png --5' must be"),
    wrong_line("a class that is a fraction", "b.png 5.0", says="list.txt, line 2: 'b.png 5.0' must be"),
    wrong_line("a class with an exponent", "b.png 1e0", says="list.txt, line 2: 'b.png 1e0' must be"),
    wrong_line("a class in other digits", "b.png ٥", says="list.txt, line 2: 'b.png ٥' must be"),
    wrong_line("a class in powers", "b.png ²", says="list.txt, line 2: 'b.png ²' must be"),
    wrong_line("a class of 5,000 digits", f"b.png {'9' * 5000}", says="list.txt, line 2: 'b.png 999"),
    wrong_line("a comma for the space", "b.png,1", says="list.txt, line 2: 'b.png,1' must be"),
    wrong_line("a line of ten million characters", "a" * 10_000_000, says="list.txt, line 2: 'aaa"),
    wrong_line("NUL in a path", "b\0.png 1", says="list.txt, line 2: 'b\\x00.png 1' must be"),
    wrong_line("a class below 0", "b.png -1", says="list.txt, line 2: 'b.png -1' must be"),
    wrong_line("a class too large", "a.png 2", says="list.txt has 3 classes"),
    wrong_line("a path that does not exist", "sub/b.png 1", says="/sub/b.png ([Errno 2]"),
    wrong_line("an absolute path that does not exist", "/none/b.png 1", says="1 of 2 images cannot be decoded: /none/b.png ([Errno 2]"),
    wrong_line("a path that is a folder", "../ 1", says="/.. ([Errno 21]"),
    wrong_line("a path that is too long", "b" * 300 + " 1", says="File name too long"),
]


# Image files.
def image(name: str, content: Content, says: str, *, file: str = "val/b/1.JPEG", loader: str = "torchvision") -> Case:
    """One good picture, and another one."""
    return evaluates(name, "folder", ".", f"data.loader={loader}", says=says, files={"val/a/0.JPEG": PICTURE, file: content})


def huge_png() -> bytes:
    """A PNG of 2³⁰ pixels that are not there."""
    content = bytearray(PICTURE)
    content[16:24] = struct.pack(">II", 2**15, 2**15)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


IMAGE_FILES = [
    image("an empty image", b"", says="/val/b/1.JPEG (is empty)"),
    image("an image that is text", "a cat", says="val/b/1.JPEG (cannot identify image file"),
    image("an image that ends in the middle", PLAIN["jpeg"][:-400], says="val/b/1.JPEG (image file is truncated"),
    image("an image that is a link to nothing", lambda path: path.symlink_to("none.JPEG"), says="val/b/1.JPEG ([Errno 2]"),
    image("an image of a billion pixels", huge_png(), says="val/b/1.JPEG (Image size (1073741824 pixels) exceeds limit"),
    image("an image that is HTML", "<html>404</html>", says="val/b/1 2.JPEG (cannot identify", file="val/b/1\n2.JPEG"),
    image("an image under a name that is no text", b"", says="val/b/\\udcff.JPEG (is empty)", file="val/b/\udcff.JPEG"),
    image("a broken image under DALI", PICTURE[:-100], says="/val/b/1.JPEG (", loader="dali"),
]


# Folders.
def folders(name: str, *paths: str, says: str, data: str = "folder", sets: tuple[str, ...] = ()) -> Case:
    """Folders with a picture each."""
    return evaluates(name, data, ".", *sets, says=says, files=dict.fromkeys(paths, PICTURE))


FOLDERS = [
    evaluates("a root that does not exist", "folder", "none", says="none does not exist"),
    evaluates("a root that is a file", "folder", "net.safetensors", says="net.safetensors is a file: data set '"),
    evaluates("a root that is a file for ImageNet", "imagenet", "net.safetensors", says="net.safetensors is a file: data set '"),
    teaches("no root", "folder", "''", says="data.root"),
    folders("no folder to test on", "train/a/0.png", says=" has no folder val or test"),
    folders("images without folders", "val/0.png", "val/1.png", says="/val has no folders"),
    folders("hidden folders only", "val/.ipynb_checkpoints/0.png", says="/val has no folders"),
    folders("folders without images", "val/a/notes.txt", "val/b/._0.png", says=": no images in it"),
    folders("a class too many", "val/a/0.png", "val/b/0.png", "val/c/0.png", says=" has 3 classes"),
    folders("a class too few", "val/a/0.png", says=" has 1 classes"),
    folders("two channels", "val/a/0.png", "val/b/0.png", sets=("data.channels=2",), says="mean has 3 numbers for 2 channels"),
    teaches(
        "no folder to train on",
        "folder",
        ".",
        "data.num_classes=2",
        says=" has no folder train",
        files={"val/a/0.png": PICTURE, "val/b/0.png": PICTURE},
    ),
]

CASES: list[Case] = [*ARRAY_FILES, *LISTS, *IMAGE_FILES, *FOLDERS]
