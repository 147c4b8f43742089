"""Data sets that are not what their names promise: arrays, lists, folders of images, MNIST's and CIFAR's files, label images."""

import gzip
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from dfkd_fast.models import build_model
from tests.bad_input.case import Case, Content, case
from tests.image_files import PLAIN, encoded, noise

PICTURE = PLAIN["png"]
COLOUR = ("data.channels=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]")


def teaches(name: str, data: str, root: str, *sets: str, error: str, files: Mapping[str, Content] | None = None) -> Case:
    """A teacher that is to be trained on a data set."""
    changes = [option for change in (f"data.name={data}", *sets) for option in ("--set", change)]
    return case(name, "teach", "digits", *changes, "--data-root", root, error=error, files=files)


def evaluates(name: str, data: str, root: str, *sets: str, error: str, files: Mapping[str, Content] | None = None) -> Case:
    """A network that is to be tested on image files."""
    changes = [option for change in (*COLOUR, f"data.name={data}", "data.num_classes=2", *sets) for option in ("--set", change)]
    return case(
        name,
        *("evaluate", "net.safetensors", "--recipe", "digits", "--role", "teacher", "--set", "teacher.model=lenet5", *changes),
        *("--data-root", root),
        error=error,
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


def arrays(name: str, content: Content, *sets: str, error: str) -> Case:
    return teaches(name, "npz", "set.npz", *sets, error=error, files={"set.npz": content})


ARRAY_FILES = [
    arrays("an .npz file that is a folder", Path.mkdir, error="set.npz is a folder: data set 'npz' must be a file"),
    arrays("an .npz file that is empty", b"", error="set.npz cannot be read as an .npz file"),
    arrays("an .npz file that is text", "images", error="set.npz cannot be read as an .npz file"),
    arrays("an .npz file that is a pickle", pickle.dumps(ARRAYS), error="set.npz cannot be read as an .npz file"),
    arrays("an .npz file that is one array", array_header((0,)), error="set.npz cannot be read as an .npz file"),
    arrays("an .npz file that ends in the middle", packed()[:700], error="set.npz cannot be read as an .npz file"),
    arrays(
        "an .npz file with a flipped byte", packed().replace(b"\0" * 64, b"\1" * 64), error="x_test cannot be read as an array: Bad CRC"
    ),
    arrays("an encrypted .npz file", encrypted(), error="x_test cannot be read as an array: File 'x_test.npy' is encrypted"),
    arrays("an .npz file without members", b"PK\x05\x06" + bytes(18), error="set.npz has no x_test, y_test: its arrays are []"),
    arrays(
        "an .npz file of other members", packed(x_test=None), error="set.npz has no x_test: its arrays are ['x_train', 'y_test', 'y_train']"
    ),
    arrays("an .npz file without a training split", packed(y_train=None), error="set.npz has no y_train: its arrays are ["),
    arrays("an empty member", with_member("x_test", b""), error="set.npz, x_test cannot be read as an array: "),
    arrays("a member that is no array", with_member("x_test", b"not an array"), error="set.npz, x_test cannot be read as an array: "),
    arrays(
        "a member that ends in its header",
        with_member("y_test", array_header((4,))[:40]),
        error="set.npz, y_test cannot be read as an array: ",
    ),
    arrays(
        "a member shorter than its shape",
        with_member("x_test", array_header((4, 8, 8, 1))),
        error="set.npz, x_test cannot be read as an array: ",
    ),
    arrays(
        "a member of a huge shape",
        with_member("x_test", array_header((2**40, 8, 8, 1))),
        error="set.npz, x_test cannot be read as an array: ",
    ),
    arrays(
        "a member of an impossible shape",
        with_member("x_test", array_header((2**80, 8, 8, 1))),
        error="set.npz, x_test cannot be read as an array: ",
    ),
    arrays(
        "a member of a negative shape",
        with_member("x_test", array_header((-4, 8, 8, 1))),
        error="set.npz, x_test cannot be read as an array: ",
    ),
    arrays(
        "a member of an unknown type",
        with_member("x_test", array_header((4,), "|z9")),
        error="set.npz, x_test cannot be read as an array: ",
    ),
    arrays(
        "a member that is a pickle",
        packed(x_test=np.array([{}], object)),
        error="set.npz, x_test cannot be read as an array: Object arrays cannot be",
    ),
    arrays(
        "images that are fractions",
        packed(x_test=IMAGES / 255),
        error="test: images must be uint8 (N, H, W, C) with at least one pixel, not float64 (4, 8, 8, 1)",
    ),
    arrays(
        "images that are truths",
        packed(x_test=IMAGES > 0),
        error="test: images must be uint8 (N, H, W, C) with at least one pixel, not bool",
    ),
    arrays(
        "images that are signed",
        packed(x_test=IMAGES.astype(np.int64)),
        error="test: images must be uint8 (N, H, W, C) with at least one pixel, not int64",
    ),
    arrays(
        "images that are complex",
        packed(x_test=IMAGES * 1j),
        error="test: images must be uint8 (N, H, W, C) with at least one pixel, not complex128",
    ),
    arrays(
        "images that are text",
        packed(x_test=np.array(["a"] * 4)),
        error="test: images must be uint8 (N, H, W, C) with at least one pixel, not <U1",
    ),
    arrays(
        "images of one row",
        packed(x_test=IMAGES[..., 0, 0]),
        error="test: images must be uint8 (N, H, W, C) with at least one pixel, not uint8 (4, 8)",
    ),
    arrays("images without labels of their name", packed(test_images=IMAGES), error="set.npz has no test_labels: its arrays are ["),
    arrays(
        "one number for images",
        packed(x_test=np.uint8(0)),
        error="test: images must be uint8 (N, H, W, C) with at least one pixel, not uint8 ()",
    ),
    arrays("images in channels-first order", packed(x_test=IMAGES.transpose(0, 3, 1, 2)), error="test: images have 8 channels"),
    arrays("no images", packed(x_test=IMAGES[:0], y_test=LABELS[:0]), error="test: there are no images"),
    arrays(
        "images of no pixels",
        packed(x_test=IMAGES[:, :0]),
        error="test: images must be uint8 (N, H, W, C) with at least one pixel, not uint8 (4, 0, 8, 1)",
    ),
    arrays("training images of no width", packed(x_train=IMAGES[:, :, :0]), error="not uint8 (4, 8, 0, 1)"),
    arrays("images of other channels", packed(x_test=IMAGES.repeat(3, 3)), error="test: images have 3 channels, data.channels is 1"),
    arrays("fewer labels than images", packed(y_test=LABELS[:3]), error="test: labels must be integers (4,), not int64 (3,)"),
    arrays("labels that are fractions", packed(y_test=LABELS / 1), error="test: labels must be integers (4,), not float64 (4,)"),
    arrays("labels that are truths", packed(y_test=LABELS > 1), error="test: labels must be integers (4,), not bool (4,)"),
    arrays("labels one-hot", packed(y_test=np.eye(4, dtype=int)), error="test: labels must be integers (4,), not int64 (4, 4)"),
    arrays("a label below 0", packed(y_test=LABELS - 1), error="test: labels run from -1 to 2, data.num_classes is 10"),
    arrays("a label too large", packed(y_test=LABELS + 7), error="test: labels run from 7 to 10, data.num_classes is 10"),
    arrays("a label beyond 64 bits", packed(y_test=LABELS.astype(np.uint64) + 2**63), error="test: labels run from 9223372036854775808"),
    arrays("a training label too large", packed(y_train=LABELS + 7), error="train: labels run from 7 to 10, data.num_classes is 10"),
    arrays(
        "a holdout of all training images",
        packed(),
        "data.holdout=4",
        error="data.holdout = 4: must be less than 4, the number of training images",
    ),
    arrays(
        "a subset larger than the holdout",
        packed(),
        *("data.holdout=2", "data.subset=3"),
        error="data.subset = 3: must be at most 2, the number of held-out training images",
    ),
    arrays(
        "a subset larger than the set", packed(), "data.subset=5", error="data.subset = 5: must be at most 4, the number of test images"
    ),
]


# Lists of files.
def lists(name: str, content: Content, error: str) -> Case:
    return evaluates(name, "list", "list.txt", error=error, files={"list.txt": content, "a.png": PICTURE})


def wrong_line(name: str, line: str, error: str | None = None) -> Case:
    """A list whose second line is wrong."""
    return lists(name, f"a.png 0\n{line}\n", error or "list.txt, line 2: ")


LISTS = [
    lists("a list that is a folder", Path.mkdir, error="list.txt is a folder: data set 'list' must be a file"),
    lists("a list that is not text", b"a.png 0\n\xff.png 1\n", error="list.txt cannot be read: 'utf-8' codec"),
    lists("a list in UTF-16", "a.png 0\n".encode("utf-16"), error="list.txt cannot be read: 'utf-8' codec"),
    lists("a list that is an image", PICTURE, error="list.txt cannot be read: 'utf-8' codec"),
    lists("an empty list", "", error="list.txt contains no images"),
    lists("a list of blank lines", "\n  \n\t\n", error="list.txt contains no images"),
    lists("a list of comments", "# path class\n# a.png 0\n", error="list.txt, line 1: '# path class' must be"),
    wrong_line("a line without a class", "b.png", error="list.txt, line 2: 'b.png' must be a path, a space and a class number"),
    wrong_line("a line without a path", "1", error="list.txt, line 2: '1' must be"),
    wrong_line("a class that is a name", "b.png cat", error="list.txt, line 2: 'b.png cat' must be"),
    wrong_line("a class of two signs", "b.png --5", error="list.txt, line 2: 'b.png --5' must be"),
    wrong_line("a class that is a fraction", "b.png 5.0", error="list.txt, line 2: 'b.png 5.0' must be"),
    wrong_line("a class with an exponent", "b.png 1e0", error="list.txt, line 2: 'b.png 1e0' must be"),
    wrong_line("a class in other digits", "b.png ٥", error="list.txt, line 2: 'b.png ٥' must be"),
    wrong_line("a class in powers", "b.png ²", error="list.txt, line 2: 'b.png ²' must be"),
    wrong_line("a class of 5,000 digits", f"b.png {'9' * 5000}", error="list.txt, line 2: 'b.png 999"),
    wrong_line("a comma for the space", "b.png,1", error="list.txt, line 2: 'b.png,1' must be"),
    wrong_line("a line of ten million characters", "a" * 10_000_000, error="list.txt, line 2: 'aaa"),
    wrong_line("NUL in a listed path", "b\0.png 1", error="list.txt, line 2: 'b\\x00.png 1' must be"),
    wrong_line("a class below 0", "b.png -1", error="list.txt, line 2: 'b.png -1' must be"),
    wrong_line("a class too large", "a.png 2", error="list.txt has 3 classes"),
    wrong_line("a path that does not exist", "sub/b.png 1", error="/sub/b.png ([Errno 2]"),
    wrong_line("an absolute path that does not exist", "/none/b.png 1", error="1 of 2 images cannot be decoded: /none/b.png ([Errno 2]"),
    wrong_line("a path that is a folder", "../ 1", error="/.. ([Errno 21]"),
    wrong_line("a path that is too long", "b" * 300 + " 1", error="File name too long"),
]


# Image files.
def image(name: str, content: Content, error: str, *, file: str = "val/b/1.JPEG", loader: str = "torchvision") -> Case:
    """One good picture, and another one."""
    return evaluates(name, "folder", ".", f"data.loader={loader}", error=error, files={"val/a/0.JPEG": PICTURE, file: content})


def huge_png() -> bytes:
    """A PNG of 2³⁰ pixels that do not exist."""
    content = bytearray(PICTURE)
    content[16:24] = struct.pack(">II", 2**15, 2**15)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


IMAGE_FILES = [
    image("an empty image", b"", error="/val/b/1.JPEG (is empty)"),
    image("an image that is text", "a cat", error="val/b/1.JPEG (cannot identify image file"),
    image("an image that ends in the middle", PLAIN["jpeg"][:-400], error="val/b/1.JPEG (image file is truncated"),
    image("an image that is a link to nothing", lambda path: path.symlink_to("none.JPEG"), error="val/b/1.JPEG ([Errno 2]"),
    image("an image of a billion pixels", huge_png(), error="val/b/1.JPEG (Image size (1073741824 pixels) exceeds limit"),
    image("an image that is HTML", "<html>404</html>", error="val/b/1 2.JPEG (cannot identify", file="val/b/1\n2.JPEG"),
    image("an image under a name that is not text", b"", error="val/b/\\udcff.JPEG (is empty)", file="val/b/\udcff.JPEG"),
    image("a broken image under DALI", PICTURE[:-100], error="/val/b/1.JPEG (", loader="dali"),
]


# Folders.
def folders(name: str, *paths: str, error: str, data: str = "folder", sets: tuple[str, ...] = ()) -> Case:
    """Folders with a picture each."""
    return evaluates(name, data, ".", *sets, error=error, files=dict.fromkeys(paths, PICTURE))


FOLDERS = [
    evaluates("a root that does not exist", "folder", "none", error="none does not exist"),
    evaluates("a root that is a file", "folder", "net.safetensors", error="net.safetensors is a file: data set '"),
    evaluates("a root that is a file for ImageNet", "imagenet", "net.safetensors", error="net.safetensors is a file: data set '"),
    teaches("no root", "folder", "''", error="data.root"),
    folders("no folder to test on", "train/a/0.png", error=" has no folder val or test"),
    folders("images without folders", "val/0.png", "val/1.png", error="/val has no folders"),
    folders("hidden folders only", "val/.ipynb_checkpoints/0.png", error="/val has no folders"),
    folders("folders without images", "val/a/notes.txt", "val/b/._0.png", error=" contains no images"),
    folders("a class too many", "val/a/0.png", "val/b/0.png", "val/c/0.png", error=" has 3 classes"),
    folders("a class too few", "val/a/0.png", error=" has 1 classes"),
    folders("two channels", "val/a/0.png", "val/b/0.png", sets=("data.channels=2",), error="mean has 3 numbers for 2 channels"),
    teaches(
        "other classes to train on",
        *("folder", ".", "data.num_classes=2"),
        error=": train and val must have the same classes, 'b' is in only one",
        files=dict.fromkeys(("val/a/0.png", "val/b/0.png", "train/a/0.png", "train/c/0.png"), PICTURE),
    ),
    teaches(
        "no folder to train on",
        "folder",
        ".",
        "data.num_classes=2",
        error=" has no folder train",
        files={"val/a/0.png": PICTURE, "val/b/0.png": PICTURE},
    ),
]

# ImageNet and Places365.
VALIDATION = "val/ILSVRC2012_val_00000001.JPEG"


def labelled(name: str, file: str, content: str, error: str) -> Case:
    """Images of ImageNet in one folder, and a file of their classes."""
    return teaches(name, "imagenet", ".", *COLOUR, "data.num_classes=1000", error=error, files={VALIDATION: PICTURE, file: content})


def places(name: str, categories: str, error: str, **files: Content) -> Case:
    return evaluates(
        name,
        *("places365", "."),
        error=error,
        files={"categories_places365.txt": categories} | {path.replace("__", "/"): content for path, content in files.items()},
    )


CATEGORIES = "".join(f"/x/place{number} {number}\n" for number in range(365))

NAMED_SETS = [
    folders(
        "a folder that is not a class of ImageNet", "val/n01440764/0.png", "val/cat/0.png", data="imagenet", error="the first is 'cat'"
    ),
    folders("a synset that is not among the 1,000", "val/n00000001/0.png", data="imagenet", error="the first is 'n00000001'"),
    folders("another number of classes than ImageNet's", "val/n01440764/0.png", data="imagenet", error=" has 1000 classes"),
    folders("ImageNet without its validation images", "train/n01440764/0.png", data="imagenet", error="the first is 'train'"),
    labelled("a flat folder of ImageNet's", "readme", "", error="val has images but no class folders"),
    labelled(
        "a flat folder with labels in another order",
        *("ILSVRC2012_validation_ground_truth.txt", "490\n"),
        error="the numbers in ILSVRC2012_validation_ground_truth.txt have a different order",
    ),
    labelled("a file of labels without classes", "val.txt", "ILSVRC2012_val_00000001.JPEG\n", error="val.txt, line 1: 'ILSVRC2012_val_0"),
    labelled("a file of labels from 1 to 1,000", "val.txt", "a.JPEG 1\nb.JPEG 1000\n", error="val.txt, line 2: 'b.JPEG 1000' must be"),
    labelled("a file of labels of other images", "val.txt", "a.JPEG 1\n", error="val.txt has no label for 1 of the 1 images"),
    labelled(
        "a file of labels that is not text", "val.txt", "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"), error="val.txt, line 1"
    ),
    places("Places365 without categories", "", error="categories_places365.txt has 0 categories, must have 365"),
    places("categories that are numbered from 1", CATEGORIES.replace("0 0\n", "0 365\n"), error="must have 365, numbered from 0"),
    places("Places365 without images", CATEGORIES, error=" has no folder val_256, val_large or val"),
    places("Places365 without a category's folder", CATEGORIES, error="no folder place0 for category /x/place0", val__a=PICTURE),
]


# MNIST and CIFAR.
def idx(*shape: int, kind: int = 8) -> bytes:
    """A file of MNIST's of zeros."""
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(math.prod(shape))


def mnist(name: str, error: str, images: bytes = idx(4, 28, 28), labels: bytes = idx(4)) -> Case:
    raw = {f"MNIST/raw/{part}-{what}-ubyte": idx(4) for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")}
    test = {"MNIST/raw/t10k-images-idx3-ubyte": images, "MNIST/raw/t10k-labels-idx1-ubyte": labels}
    return teaches(name, "mnist", ".", error=error, files=raw | test)


def cifar(name: str, error: str, files: Mapping[str, Content] | None = None, data: str = "cifar10", classes: int = 10) -> Case:
    return teaches(name, data, ".", *COLOUR, f"data.num_classes={classes}", error=error, files=files)


MNIST_FILES = [
    teaches("MNIST that is not there", "mnist", ".", error="does not hold MNIST in torchvision's layout: Dataset not found"),
    teaches("MNIST that is a file", "mnist", "a", error=" is a file: data set 'mnist' must be a folder", files={"a": ""}),
    mnist("an empty file of MNIST's", "in torchvision's layout", images=b""),
    mnist("a file of MNIST's that is half there", "in torchvision's layout", images=idx(4, 28, 28)[:1000]),
    mnist("a file of MNIST's that is still packed", "in torchvision's layout", images=gzip.compress(idx(4, 28, 28))),
    mnist("a file of MNIST's of an unknown type", "layout: a file has an invalid header", images=idx(4, 28, 28, kind=7)),
    mnist("a file of MNIST's of a huge shape", "in torchvision's layout", images=idx(0, 28, 28)[:4] + struct.pack(">3I", 2**31, 2**31, 9)),
    mnist("labels for MNIST's images", "MNIST in torchvision's layout", images=idx(4)),
    mnist("images for MNIST's labels", "MNIST in torchvision's layout", labels=idx(4, 28, 28)),
    mnist("fewer labels than MNIST has images", "test: labels must be integers (4,), not int64 (3,)", labels=idx(3)),
    mnist("no images in MNIST", "MNIST in torchvision's layout", images=idx(0, 28, 28), labels=idx(0)),
    teaches(
        "MNIST in colour",
        "mnist",
        ".",
        *COLOUR,
        error="images have 1 channels, data.channels is 3",
        files={
            "MNIST/raw/t10k-images-idx3-ubyte": idx(4, 28, 28),
            "MNIST/raw/t10k-labels-idx1-ubyte": idx(4),
            "MNIST/raw/train-images-idx3-ubyte": idx(4, 28, 28),
            "MNIST/raw/train-labels-idx1-ubyte": idx(4),
        },
    ),
    cifar("CIFAR-10 that is not there", error="it has no folder cifar-10-batches-py"),
    cifar("CIFAR-10 as a file", files={"cifar-10-batches-py": b""}, error="it has no folder cifar-10-batches-py"),
    cifar(
        "CIFAR-10 that is not unpacked",
        files={"cifar-10-python.tar.gz": b"packed"},
        error="cifar-10-python.tar.gz is not unpacked; do so with tar -xzf ",
    ),
    cifar("CIFAR-10 without files", files={"cifar-10-batches-py": Path.mkdir}, error="cifar-10-batches-py/data_batch_1 is missing"),
    cifar(
        "CIFAR-10 of another content",
        files={f"cifar-10-batches-py/{name}": pickle.dumps({}) for name in ("test_batch", "batches.meta", "data_batch_1")},
        error="cifar-10-batches-py/data_batch_1 is damaged or not the published one: its MD5 is ",
    ),
    cifar("CIFAR-10's own folder, of another content", files={"test_batch": b""}, error="the file data_batch_1 is missing"),
    cifar("CIFAR-100 that is not there", data="cifar100", classes=100, error="it has no folder cifar-100-python"),
    cifar("CIFAR-100's fine classes for its coarse ones", data="cifar100-coarse", classes=100, error="'cifar100-coarse' has 20 classes"),
]


# Labels for every pixel.
def pixels(
    name: str, files: Mapping[str, Content], error: str, data: str = "camvid", classes: int = 11, sets: tuple[str, ...] = ()
) -> Case:
    """A segmenter that is to be trained on pairs of images and labels."""
    changes = (*COLOUR, f"data.num_classes={classes}", "teacher.model=small_fcn8", "data.image_size=32", *sets)
    return teaches(name, data, ".", *changes, error=error, files=files)


def labels_of(value: int, side: int = 32, mode: str = "L") -> bytes:
    image = Image.new(mode, (side, side), value)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    return encoded(image, "PNG")


IMAGE = encoded(noise(32, 32), "PNG")
PAIR: dict[str, Content] = {"test/a.png": IMAGE, "testannot/a.png": labels_of(0)}

PAIRS = [
    pixels("no folders of images and labels", {"test/a.png": IMAGE}, error=" has no folders of images and labels for the test split"),
    pixels("a folder of labels alone", {"test/readme": "", "testannot/a.png": labels_of(0)}, error="test contains no images"),
    pixels("a label that has no image", PAIR | {"testannot/b.png": labels_of(0)}, error="unpaired: testannot/b.png"),
    pixels("an image that has no label", PAIR | {"test/b.png": IMAGE}, error="unpaired: test/b.png"),
    pixels(
        "labels of another size", PAIR | {"testannot/a.png": labels_of(0, side=31)}, error="a.png has 31 × 31 pixels, its image 32 × 32"
    ),
    pixels("labels in colours", PAIR | {"testannot/a.png": IMAGE}, error="a.png must have class IDs in one 8-bit channel"),
    pixels(
        "labels of one bit", PAIR | {"testannot/a.png": labels_of(1, mode="1")}, error="in one 8-bit channel (PIL mode L or P), not mode 1"
    ),
    pixels(
        "labels of 16 bits", PAIR | {"testannot/a.png": labels_of(1, mode="I;16")}, error="8-bit channel (PIL mode L or P), not mode I;16"
    ),
    pixels("a label that is no class", PAIR | {"testannot/a.png": labels_of(12)}, error="class ID 12: must be 0 to 10, or 11 or 255"),
    pixels(
        "a label that is not a class of NYUv2",
        {"test_rgb/1.png": IMAGE, "test_seg13/1.png": labels_of(14)},
        *("class ID 14: must be 1 to 13, or 0 or 255", "nyuv2", 13),
    ),
    pixels(
        "a palette with a number that is not a class",
        PAIR | {"testannot/a.png": labels_of(9, mode="P")},
        *("class ID 9: must be 0 to 4", "pairs", 5),
    ),
    pixels("an image of a pair that is broken", PAIR | {"test/a.png": b""}, error="test/a.png (is empty)"),
    pixels("a label file that is broken", PAIR | {"testannot/a.png": "text"}, error="testannot/a.png (cannot identify"),
    pixels("no pairs to train on", PAIR, error=" has no folders of images and labels for the train split"),
    pixels("another number of classes than CamVid's", PAIR, "data.num_classes is 12, but 'camvid' has 11 classes", classes=12),
    pixels(
        "a larger subset than there are pairs",
        PAIR,
        "data.subset = 2: must be at most 1, the number of test images",
        sets=("data.subset=2",),
    ),
]


# The section [data].
def sets(name: str, *changes: str, error: str) -> Case:
    return case(name, "show", "digits", *(option for change in changes for option in ("--set", change)), error=error)


SECTION = [
    sets("a data set that does not exist", "data.name=imagenette", error="data.name = 'imagenette': "),
    sets("a mean that is NaN", "data.mean=[nan]", error="data.mean.0 = nan"),
    sets("a mean of image files beyond float32", "data.mean=[1e39]", error="data.mean.0 = 1e+39"),
    sets("a negative deviation", "data.std=[-0.5]", error="data.std.0 = -0.5"),
    sets("no deviation", "data.std=[]", error="std has 0 numbers for 1 channels"),
    sets("a mean that is text", "data.mean=['half']", error="data.mean.0 = 'half'"),
    sets("one class", "data.num_classes=1", error="data.num_classes = 1: "),
    sets("too many classes", "data.num_classes=1000001", error="data.num_classes = 1000001: "),
    sets("a crop larger than the picture", "data.image_size=64", "data.resize=48", error="resize = 48: must be at least image_size, 64"),
    sets("a huge side to resize to", "data.resize=100000", error="data.resize = 100000: "),
    sets("too many workers", "data.workers=100000", error="data.workers = 100000: "),
    sets("a negative subset", "data.subset=-1", error="data.subset = -1: "),
    sets("a negative holdout", "data.holdout=-1", error="data.holdout = -1: "),
    sets(
        "a holdout of image files",
        "data.name=folder",
        "data.holdout=5",
        error="holdout = 5: must be 0 for data set 'folder'; only digits, ",
    ),
    sets("a holdout of no data", "data.name=none", "data.holdout=5", error="holdout = 5: must be 0 for data set 'none'; only digits, "),
    sets("an unknown interpolation", "data.interpolation=nearest", error="data.interpolation = 'nearest': "),
    sets("a root that is a number", "data.root=3", error="data.root = 3: must be a string"),
]

CASES: list[Case] = [*ARRAY_FILES, *LISTS, *IMAGE_FILES, *FOLDERS, *NAMED_SETS, *MNIST_FILES, *PAIRS, *SECTION]
