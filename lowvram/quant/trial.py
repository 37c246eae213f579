"""A kernel and the machine it meets -> whether it serves there: how wrong it may be, and how its package may fail.

Nothing is taken on trust. A package may be installed and yet not import, and a kernel may compile and yet be wrong:
whoever chooses one tries it out first, on a small linear.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import BackendError
from .packing import pack_awq, unpack_awq

TOLERANCE = 0.01
"""Of relative errors: three times what bfloat16 explains, and far below what misread weights make."""

BROKEN = (ImportError, AttributeError, NameError, SyntaxError, OSError, RuntimeError, TypeError, ValueError)
"""What a package raises that is missing, or is there and cannot work: for want of a library, between versions that do
not go together (of NumPy or Python as well), or because a file of the user's goes by its name."""


def largest_error(products: Iterable[Tensor], exact: Tensor) -> float:
    """Of several products with the first rows of one input, relative to `exact` [M, N], that of all its rows. NaN, if
    any of them is."""
    errors = [(y - exact[: len(y)]).norm() / exact[: len(y)].norm() for y in products]
    return float(torch.stack(errors).max())


def awq_error(
    matmul: Callable[[Tensor, Mapping[str, Tensor], int], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    rows: Sequence[int],
) -> float:
    """The largest relative error of products with AWQ's own tensors, for several numbers of rows, the most of them
    last. `sizes` are a linear's inputs, outputs and group size."""
    generator = torch.Generator().manual_seed(0)
    in_features, out_features, group_size = sizes
    stored = pack_awq(torch.randn(out_features, in_features, generator=generator), group_size)
    weights = dict(zip(("qweight", "qzeros", "scales"), (tensor.to(device) for tensor in stored), strict=True))
    x = torch.randn(rows[-1], in_features, generator=generator).to(dtype)
    exact = x.float() @ unpack_awq(*stored, group_size, torch.float32).t()
    return largest_error((matmul(x[:n].to(device), weights, group_size).cpu() for n in rows), exact)


def complaint(kernel: str, error: float) -> str:
    """Why `kernel`, with such a relative error, does not serve; nothing, if it does."""
    return "" if error <= TOLERANCE else f"{kernel} is wrong on this machine, by {error:.1%}"


def dtype_obstacle(dtype: torch.dtype, served: Collection[torch.dtype]) -> str:
    """Why a kernel that computes in the dtypes `served` does not in this one; nothing, if it does."""
    if dtype in served:
        return ""
    *others, last = map(_bare, served)
    return f"it computes in {' and '.join(filter(None, (', '.join(others), last)))}, not in {_bare(dtype)}"


def require_dtype(backend: str, x: Tensor, served: Collection[torch.dtype]) -> None:
    """Raise BackendError for an input in another dtype than those that `backend` serves."""
    if x.dtype not in served:
        obstacle = dtype_obstacle(x.dtype, served)
        raise BackendError(
            f"kernel {backend} cannot multiply this input: {obstacle}",
            backend=backend,
            reason=obstacle,
            hint="convert the input, or choose the kernel for its dtype",
        )


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
