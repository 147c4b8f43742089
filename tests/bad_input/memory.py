"""Sizes that no machine has the memory for.

Each asks for at least 2⁴⁷ bytes in one piece, which no process has addresses for: nothing is allocated, however freely a machine
promises memory.
"""

from tests.bad_input.case import Case, case

HUGE = 2**31 - 1
WIDE = ("--set", f"generator.width={HUGE}", "--set", "generator.latent_dim=100000")
LARGE_IMAGES = ("--set", "data.image_size=128", "--set", "teacher.model=wrn10_1", "--set", "student.model=wrn10_1")
NETWORKS = "out of memory for the networks"
STEPS = "out of memory for the steps"


def huge(name: str, command: str, role: str, width: int, error: str) -> Case:
    """A row with a user's own network of a linear layer with so many inputs."""
    module = f"own_{width.bit_length() - 1}"
    content = f"from torch import nn\ndef build(num_classes):\n    return nn.Linear({width}, num_classes)\n"
    return case(name, command, "digits", "--set", f"{role}.model={module}:build", error=error, files={f"{module}.py": content})


CASES: list[Case] = [
    *(
        case(f"a generator {model} of a huge width", "distill", "digits", "--set", f"generator.model={model}", *WIDE, error=NETWORKS)
        for model in "ABC"
    ),
    case(
        "a generator D of a huge width",
        *("distill", "digits", "--set", "generator.model=D", "--set", "data.image_size=16384", *WIDE),
        error=f"generator.width = {HUGE}",
    ),
    case(
        "a huge latent vector",
        *("distill", "digits", "--set", f"generator.latent_dim={HUGE}", "--set", "generator.width=65536"),
        error=f"generator.latent_dim = {HUGE}",
    ),
    case("spectral norms of a huge generator", "distill", "digits", "--set", "generator.spectral_norm=true", *WIDE, error="GiB at once"),
    case(
        "the largest images",
        *("distill", "digits", "--set", "data.image_size=16384", "--set", "generator.latent_dim=1000000"),
        error="data.image_size = 16384",
    ),
    huge("a teacher of a huge width", "distill", "teacher", 2**45, error="own_45:build"),
    huge("a student of a huge width", "distill", "student", 2**46, error="own_46:build"),
    huge("a teacher to teach of a huge width", "teach", "teacher", 2**47, error="out of memory for the teacher"),
    huge("a size beyond 64 bits", "teach", "teacher", 2**100, error="out of memory for the teacher"),
    huge("a size whose bytes are no machine number", "teach", "teacher", 2**61, error="out of memory for the teacher"),
    case("a huge batch", "distill", "digits", *LARGE_IMAGES, "--set", f"loop.batch_size={HUGE}", error=f"loop.batch_size = {HUGE}"),
    case(
        "a huge batch of contiguous images without replay",
        *("distill", "digits", *LARGE_IMAGES, "--set", f"loop.batch_size={HUGE}"),
        *("--set", "engine.channels_last=false", "--set", "replay.kind=none"),
        error=f"{STEPS}, 131,072.0 GiB at once: lower one of loop.batch_size = {HUGE}, data.image_size = 128",
    ),
    case(
        "a huge batch into an existing folder",
        *("distill", "digits", *LARGE_IMAGES, "--set", f"loop.batch_size={HUGE}", "--out", "there"),
        error=STEPS,
        files={"there": lambda path: path.mkdir()},
    ),
    case(
        "a huge batch to be compiled",
        "distill",
        "digits",
        *LARGE_IMAGES,
        "--set",
        f"loop.batch_size={HUGE}",
        "--set",
        "engine.compile=true",
        error=STEPS,
    ),
    case("huge replay", "distill", "digits", *LARGE_IMAGES, "--set", f"replay.rows={HUGE}", error=f"replay.rows = {HUGE}"),
    case(
        "a huge autoencoder",
        *("distill", "digits", "--set", "replay.kind=vae", "--set", "replay.vae.width=2000000"),
        error="replay.vae.width = 2000000",
    ),
    case(
        "a huge memory bank",
        *("distill", "digits", "--set", "replay.kind=memory_bank", "--set", f"replay.memory_bank.slots={HUGE}", "--set", "replay.rows=64"),
        error=f"replay.memory_bank.slots = {HUGE}",
    ),
    case(
        "replay of more rows than a bank stores",
        "distill",
        "digits",
        "--set",
        "replay.kind=memory_bank",
        "--set",
        f"replay.rows={HUGE}",
        error="must be at most loop.batch_size = 64",
    ),
    case(
        "more losses than an epoch keeps",
        "distill",
        "digits",
        "--set",
        f"loop.iterations_per_epoch={HUGE}",
        error="loop.iterations_per_epoch",
    ),
    case(
        "more losses of generator steps than an epoch keeps",
        "show",
        "digits",
        "--set",
        f"loop.generator_steps={HUGE}",
        error="at most 100000000 are allowed",
    ),
    case(
        "more micro-batches than samples",
        "show",
        "digits",
        "--set",
        f"engine.micro_batches={HUGE}",
        error="must be at most 64, the number of fresh or replayed samples",
    ),
    case("images too large for any network", "show", "digits", "--set", "data.image_size=16388", error="≤ 16384"),
    case("images whose side is beyond 64 bits", "show", "digits", "--set", f"data.image_size={2**63}", error="≤ 16384"),
    case(
        "a grid of too many samples",
        "show",
        "digits",
        "--set",
        "report.samples=10001",
        error="report.samples = 10001: must be a whole number ≥ 1 and ≤ 10000",
    ),
    case("a batch beyond 64 bits", "show", "digits", "--set", f"loop.batch_size={2**31}", error="≤ 2147483647"),
    case("more classes than a label holds", "show", "digits", "--set", f"data.num_classes={2**31}", error="≤ 1000000"),
]
