"""Second axis of a method, replay: samples that keep the student from forgetting. One module per policy."""

from .ema_generator import EmaGenerator, EmaGeneratorSettings
from .memory_bank import BankSettings, MemoryBank
from .policy import Policy, ReplaySource
from .section import POLICIES, Replay, build_replay_source, register
from .vae import VaeReplay, VaeSettings

__all__ = [
    "POLICIES",
    "BankSettings",
    "EmaGenerator",
    "EmaGeneratorSettings",
    "MemoryBank",
    "Policy",
    "Replay",
    "ReplaySource",
    "VaeReplay",
    "VaeSettings",
    "build_replay_source",
    "register",
]
