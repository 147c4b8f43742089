"""Second axis: what the student sees beside fresh samples, so that it does not forget."""

from .ema_generator import EmaGenerator
from .memory import Memory
from .memory_bank import MemoryBank
from .settings import BankSettings, Replay, VaeSettings, build_memory
from .vae import VaeReplay

__all__ = ["BankSettings", "EmaGenerator", "Memory", "MemoryBank", "Replay", "VaeReplay", "VaeSettings", "build_memory"]
