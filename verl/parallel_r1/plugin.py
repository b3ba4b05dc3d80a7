"""Entry point ``verl.plugins``: imported by every process that imports verl, so it stays light.

verl logs an error in here at DEBUG level only; ``parallel-r1 doctor`` and the trainers assert that it ran.
"""

from parallel_r1.engine.cpu_platform import PlatformCPU

__all__ = ["PlatformCPU"]
