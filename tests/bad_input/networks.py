"""A user's own networks: modules that cannot be imported, functions that give no network, and networks that cannot be distilled."""

import textwrap

from tests.bad_input.case import Case, case

PRELUDE = "import torch\nfrom torch import nn\n"
FLAT = "nn.Flatten(), nn.Linear(1024, num_classes)"
NORMS = "nn.Flatten(), nn.Linear(1024, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes)"


def named(name: str, model: str, error: str) -> Case:
    """A row with the name of a student that does not exist."""
    return case(name, "distill", "digits", "--set", f"student.model={model}", error=error)


def module(name: str, content: str, error: str, *changes: str, role: str = "student") -> Case:
    """A row with a module of the user's; every row's has a name of its own, for Python keeps what it has imported.

    Args:
        name: of the row; the module's is made of it.
        content: of the module, whose function ``build`` makes the network.
        says: what the line contains; OWN stands for the module's name.
        changes: options for ``--set``.
        role: "teacher" or "student".
    """
    own = "own_" + "".join(letter if letter.isalnum() else "_" for letter in name)
    options = [part for change in (f"{role}.model={own}:build", *changes) for part in ("--set", change)]
    return case(name, "distill", "digits", *options, error=error.replace("OWN", own), files={f"{own}.py": textwrap.dedent(content)})


def builder(name: str, returned: str, error: str, *changes: str, role: str = "student") -> Case:
    """A row with a function that returns an expression of ``num_classes``."""
    return module(name, f"{PRELUDE}\ndef build(num_classes):\n    return {returned}\n", error, *changes, role=role)


def network(name: str, forward: str, error: str, *changes: str, role: str = "student", init: str = "pass", more: str = "") -> Case:
    """A row with a network whose forward is a line, given ``x`` and a flat linear layer ``self.flat``."""
    content = f"""
class Own(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.flat = nn.Sequential({FLAT})
        {init}

    def forward(self, x):
        {forward}

    {more}

def build(num_classes):
    return Own(num_classes)
"""
    return module(name, PRELUDE + content, error, *changes, role=role)


NAMES = [
    named("a module that does not exist", "absent_module:build", "there is no module 'absent_module', neither in the working folder"),
    named("a package that does not exist", "absent.package:build", "there is no module 'absent'"),
    named("a part that a package does not have", "torch.absent_part:build", "there is no module 'torch.absent_part'"),
    named("a module's file in place of its name", "absent.py:build", "without .py: absent"),
    named("a module's path in place of its name", "folder/absent:build", "with an importable module name, such as folder.absent:build"),
    named("a module without a function", "absent:", "model 'absent:': must be module:function"),
    named("a function without a module", ":build", "unknown model ':build'"),
    named("a relative module", ".absent:build", "model '.absent:build': must be module:function"),
    named("a network without a name", "''", "unknown model ''"),
    named("a wide ResNet of more digits than Python reads", f"wrn{'9' * 5000}_1", "unknown model 'wrn999"),
    named("a wide ResNet that is too shallow", "wrn4_1", "the depth of a wide ResNet must be 6n + 4"),
    named("a segmenter of more digits than Python reads", f"small_fcn{'9' * 5000}", "unknown model 'small_fcn999"),
    named("a segmenter for data with a label an image", "small_fcn4", "teacher and student must return logits of the same shape"),
    named("a network of torchvision for one channel", "resnet18", "torchvision's networks take 3 channels, not 1"),
    named("a network for larger images", "timm:vit_tiny_patch16_224", "Input height (32) doesn't match model (224)"),
    named("a network that would be downloaded", "timm:hf_hub/x", "unknown model 'timm:hf_hub/x'"),
]
MODULES = [
    module("a module without the function", "", "model 'OWN:build': AttributeError: module 'OWN' has no attribute 'build'"),
    module("a module with a syntax error", "def build(num_classes:\n", "SyntaxError: '(' was never closed (OWN.py, line 1)"),
    module("a module with a NUL in its text", "x = 1\0\n", "source code string cannot contain null bytes"),
    module("a module in an unknown encoding", "# coding: nonsense\n", "unknown encoding: nonsense"),
    module("a module without its dependency", "import absent_dependency\n", "needs the module 'absent_dependency', which is not installed"),
    module("a module that imports what a package lacks", "from torch import absent_name\n", "cannot import name 'absent_name'"),
    module("a module that raises at import", "raise RuntimeError('no\\nlicence')\n", "'OWN:build': RuntimeError: no (OWN.py, line 1)"),
    module("a module that ends the process as a success", "import sys\nsys.exit(0)\n", "SystemExit with code 0 (OWN.py, line 2)"),
    module("a module that ends the process with words", "raise SystemExit('bye')\n", "SystemExit with code 'bye'"),
    module("a module that opens an absent file", "open('absent.txt')\n", "model 'OWN:build': FileNotFoundError:"),
    module("a module whose __getattr__ raises", "def __getattr__(name): raise KeyError(name)\n", "'OWN:build': KeyError: 'build'"),
    module("a number in place of a function", "build = 3\n", "model 'OWN:build' must be a function, not int"),
    module("a network in place of a function", PRELUDE + "build = nn.Linear(1, 1)\n", "must be a function, not Linear"),
]
FUNCTIONS = [
    module("a function without num_classes", "def build(): ...\n", "called as build(num_classes=10): TypeError: build() got an unexpected"),
    module("a function that needs more", "def build(num_classes, width): ...\n", "missing 1 required positional argument: 'width'"),
    module("a function that raises", "def build(num_classes):\n    raise ValueError('odd')\n", "ValueError: odd (OWN.py, line 2)"),
    module("a function that raises without words", "def build(num_classes):\n    assert False\n", "AssertionError (OWN.py, line 2)"),
    module("a function without an end", "def build(num_classes):\n    return build(num_classes)\n", "maximum recursion depth exceeded"),
    module("a function that ends the process", "def build(num_classes):\n    exit()\n", "SystemExit with code None"),
    builder("a function that returns nothing", "None", "must return a torch.nn.Module, not NoneType"),
    builder("a function that returns a class", "nn.Linear", "must return a torch.nn.Module, not type"),
    builder("a network of several processes", f"nn.parallel.DistributedDataParallel(nn.Sequential({FLAT}))", "Default process group"),
    builder("a network on the meta device", f"nn.Sequential({FLAT}).to('meta')", "1.weight is on the meta device and has no values"),
]
WEIGHTS = [
    module(
        "one network for both roles",
        f"{PRELUDE}num_classes = 10\nONLY = nn.Sequential({FLAT})\n\ndef build(num_classes):\n    return ONLY\n",
        "the student's 1.weight shares memory with the teacher",
        "teacher.model=own_one_network_for_both_roles:build",
    ),
    builder("a student without parameters", "nn.Flatten()", "the student has no parameters to train"),
    builder("a student without shapes", "nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))", "student's 1.weight is uninitialized"),
    builder(
        "a teacher without shapes", "nn.Sequential(nn.Flatten(), nn.LazyLinear(10))", "teacher's 1.weight is uninitialized", role="teacher"
    ),
    builder("a student in float64", f"nn.Sequential({FLAT}).double()", "weights must be float32, but 1.weight is float64"),
    builder("a teacher in float64", f"nn.Sequential({FLAT}).double()", "the teacher cannot take data.image_size's 1×32×32", role="teacher"),
    builder("a frozen student", f"nn.Sequential({FLAT}).requires_grad_(False)", "the student has no parameters to train: all 2 of them"),
    builder("a frozen teacher", f"nn.Sequential({FLAT}).requires_grad_(False)", "the teacher has no parameters to train", role="teacher"),
    network(
        "a student that keeps more than tensors",
        "return self.flat(x)",
        "state dict holds a int as _extra_state",
        more="get_extra_state = lambda self: 1",
    ),
    network(
        "a teacher that keeps more than tensors",
        "return self.flat(x)",
        "the teacher's state dict holds a int as _extra_state",
        role="teacher",
        more="get_extra_state = lambda self: 1",
    ),
    network(
        "a student that cannot be copied",
        "return self.flat(x)",
        "the network Own cannot be copied: TypeError: cannot pickle '_thread.lock' object",
        init="import threading; self.lock = threading.Lock()",
    ),
]
OUTPUTS = [
    builder("a student of other classes", "nn.Sequential(nn.Flatten(), nn.Linear(1024, 7))", "the teacher returns (10,) per image"),
    builder(
        "a teacher of other classes than its data",
        "nn.Sequential(nn.Flatten(), nn.Linear(1024, 7))",
        "returns logits of shape (7,) per image, expected (10,): data.num_classes is 10",
        role="teacher",
    ),
    builder("a student of other images", "nn.Sequential(nn.Flatten(), nn.Linear(784, 10))", "cannot take the generator's 1×32×32"),
    network("no output", "return None", "must return logits: a tensor, a tuple or list with one, or a dict"),
    network("a dict without logits", "return {'x': self.flat(x)}", "not dict with the keys 'x'"),
    network("integers", "return self.flat(x).long()", "a dense floating-point tensor, not int64"),
    network(
        "complex numbers of a teacher",
        "return self.flat(x) + 0j",
        "the teacher must return logits as a dense floating-point tensor",
        role="teacher",
    ),
    network("a sparse output", "return self.flat(x).to_sparse()", "not sparse"),
    network("an output elsewhere", "return self.flat(x).to('meta')", "on the device of its input, cpu, not on meta"),
    network("one number an image", "return self.flat(x)[:, 0]", "not (4,) for B = 4"),
    network("an axis too many", "return self.flat(x)[:, :, None]", "not (4, 10, 1) for B = 4"),
    network("one answer for a batch", "return self.flat(x).mean(0, keepdim=True)", "not (1, 10) for B = 4"),
    network("no logits at all", "return self.flat(x)[:, :0]", "not (4, 0) for B = 4"),
    network("NaN of a student", "return self.flat(x) * float('nan')", "the student's logits contain NaN or infinite values"),
    network("infinity of a teacher", "return self.flat(x) / 0", "teacher's logits contain NaN or infinite values", role="teacher"),
    network("logits that do not depend on weights", "return self.flat(x) * 0", "no gradient of the student's output reaches its"),
    network("logits without a graph", "return self.flat(x).detach()", "its output has no graph (torch.no_grad, detach"),
    network("a teacher without a gradient", "return self.flat(x.detach())", "no gradient through the teacher", role="teacher"),
    network("a forward that raises", "raise ValueError('odd')", "1×32×32 images: ValueError: odd (OWN.py, line"),
    network("a forward that ends the process", "exit(0)", "SystemExit with code 0"),
    network("a forward that needs more", "return self.flat(x)", "required positional argument: 'y'", init="self.forward = lambda x, y: x"),
    network("a forward for one batch size", "return self.flat(x.view(64, -1))", "mat1 and mat2 shapes cannot be multiplied (64x64"),
    network(
        "a teacher that cannot be trained",
        "if self.training: raise RuntimeError('frozen')\n        return self.flat(x)",
        "1×32×32 images in training mode: RuntimeError: frozen",
        role="teacher",
    ),
    network(
        "a backward that raises",
        "x.requires_grad and x.register_hook(lambda gradient: 1 / 0)\n        return self.flat(x)",
        "the teacher cannot be differentiated: ZeroDivisionError: division by zero",
        role="teacher",
    ),
]
BATCHES = [
    builder(
        "a batch of one image for batch norms",
        f"nn.Sequential({NORMS})",
        "loop.batch_size = 1: the student cannot take",
        "loop.batch_size=1",
    ),
    builder(
        "pieces of one image for batch norms",
        f"nn.Sequential({NORMS})",
        "engine.micro_batches = 64 of loop.batch_size = 64: the student cannot take one of",
        "engine.micro_batches=64",
    ),
    builder(
        "a teacher's batches of one image",
        f"nn.Sequential({NORMS})",
        "teacher.batch_size = 1: the teacher cannot take one of",
        "teacher.batch_size=1",
        role="teacher",
    ),
    builder(
        "one replayed image for batch norms",
        f"nn.Sequential({NORMS})",
        "replay.rows = 1: the student cannot take one of",
        "replay.rows=1",
        "update.kind=first-order",
    ),
]
OBJECTIVES = [
    case(
        "bn_moments of a teacher without batch norms",
        *("distill", "digits", "--set", "objective.bn_moments=1"),
        error="objective.bn_moments: the teacher LeNet5 has no batch norm with running statistics",
    ),
    case(
        "class_nll of a generator without classes",
        *("distill", "digits", "--set", "objective.class_nll=1"),
        error="need a conditional generator (generator.conditional = true)",
    ),
    network(
        "bn_moments of a teacher that calls none of its batch norms",
        "return self.flat(x)",
        "objective.bn_moments: the teacher Own calls none of its batch norms",
        "objective.bn_moments=1",
        role="teacher",
        init="self.norm = nn.BatchNorm2d(3)",
    ),
    network(
        "activation of a teacher that does not call its classifier",
        "return self.flat(x)",
        "objective.activation: the teacher Own does not call its last layer",
        "objective.activation=1",
        role="teacher",
        init="self.last = nn.Linear(2, 2)",
    ),
]
CASES: list[Case] = [*NAMES, *MODULES, *FUNCTIONS, *WEIGHTS, *OUTPUTS, *BATCHES, *OBJECTIVES]
