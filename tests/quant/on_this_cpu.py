"""Which backends tests go through on this machine's CPU."""

from __future__ import annotations

import pytest
import torch

from lowvram.quant.int4_cpu import Int4CpuBackend

_OBSTACLE = Int4CpuBackend.obstacle(torch.device("cpu"), torch.bfloat16)

needs_int4_cpu = pytest.mark.skipif(
    _OBSTACLE.endswith("for each row on this system"),  # no other obstacle may be passed over
    reason="torch's 4-bit kernel is too slow on this system to serve",
)

INT4_CPU = pytest.param("int4-cpu", marks=needs_int4_cpu)
