from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lowvram.offload import transfer
from lowvram.offload.transfer import Transfer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stored:
    """A tensor kept in memory as a file would keep it."""

    tensor: torch.Tensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def n_bytes(self) -> int:
        return self.tensor.nbytes


class MemoryReader:
    """Serves `Stored` tensors and remembers the largest piece anybody asked for."""

    largest_bytes = 0

    def read_into(self, entry: Stored, buffer: memoryview, start: int = 0) -> None:
        stored = entry.tensor.reshape(-1).view(torch.uint8).numpy()
        buffer[:] = stored[start : start + len(buffer)].tobytes()
        self.largest_bytes = max(self.largest_bytes, len(buffer))


def test_bytes_of_the_same_dtype_arrive_unchanged():
    stored = Stored(torch.randn(5, 3), "F32")
    target = torch.empty(5, 3)
    Transfer(MemoryReader(), CPU).load(stored, target)
    assert torch.equal(target, stored.tensor)


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_a_wider_target_gets_the_same_values(kind: str, dtype: torch.dtype):
    stored = Stored(torch.randn(7, 3).to(dtype), kind)
    target = torch.empty(7, 3)
    Transfer(MemoryReader(), CPU).load(stored, target)
    assert torch.equal(target, stored.tensor.float())


def test_a_cast_goes_through_bounded_staging(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "STAGING_BYTES", 64)
    reader, stored = MemoryReader(), Stored(torch.randn(101).half(), "F16")
    target = torch.empty(101)
    Transfer(reader, CPU).load(stored, target)
    assert torch.equal(target, stored.tensor.float())
    assert reader.largest_bytes <= 64


def test_read_returns_the_stored_dtype_and_shape():
    stored = Stored(torch.arange(6, dtype=torch.int32).view(2, 3), "I32")
    assert torch.equal(Transfer(MemoryReader(), CPU).read(stored), stored.tensor)


def test_releasing_gives_the_staging_buffer_back():
    moving = Transfer(MemoryReader(), CPU)
    moving.load(Stored(torch.zeros(10).half(), "F16"), torch.empty(10))
    assert moving._staging is not None
    moving.release()
    assert moving._staging is None
