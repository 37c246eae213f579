"""Products by llama.cpp's engine, ggml, where its Python package (`llama-cpp-python`) is installed: for kernels.py.

The weights lie as llama.cpp itself would lay them on this CPU: it asks the CPU for its preferred buffers first (rows
interleaved for wide registers) and so do we. Activations are float32 there, and are rounded to 8 bits inside.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOAT32, Q8_0, Q4_K = 0, 8, 12
"""Of `enum ggml_type`, ggml.h."""

FORMATS = {4: Q4_K, 8: Q8_0}
"""What llama.cpp calls Q4_K_S and Q8_0 is made of these."""

SUPERBLOCK = 256
"""Weights of a row that share scales in Q4_K; Q8_0 has 32."""

CPU_DEVICE = 0
"""Of `enum ggml_backend_dev_type`."""

CONTEXT_BYTES = 2**20
"""Enough for the descriptions of a few tensors and one graph; data lie in buffers of their own."""


class _InitParams(Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, Sequence[Any]]] = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_dev_by_type": (c_void_p, [c_int]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
}


@cache
def version() -> str | None:
    """Of the package that brings ggml, or None where it is not installed."""
    if find_spec("llama_cpp") is None:
        return None
    import llama_cpp

    return str(llama_cpp.__version__)


def fits(in_features: int) -> bool:
    """Whether a row divides into ggml's blocks."""
    return in_features % SUPERBLOCK == 0


@dataclass(frozen=True)
class GgmlProduct:
    """One copy of a linear's weights, multiplied by as many threads as torch has at the call."""

    weight: int
    weight_bytes: int
    in_features: int
    out_features: int
    _graphs: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N] in float32, valid until the next call."""
        graph, inputs, outputs = self._graph(len(x))
        rows = x.float().contiguous()
        _engine().ggml_backend_tensor_set(inputs, rows.data_ptr(), 0, rows.nbytes)
        _set_threads(torch.get_num_threads())
        status = _engine().ggml_backend_graph_compute(_backend(), graph)
        assert status == 0, f"ggml's status {status}"
        numbers = (c_float * (len(x) * self.out_features)).from_address(_engine().ggml_get_data(outputs))
        return torch.frombuffer(numbers, dtype=torch.float32).view(len(x), self.out_features)

    def _graph(self, rows: int) -> tuple[int, int, int]:
        """The graph, its input and its output for so many rows, made once."""
        if rows not in self._graphs:
            context = _context()
            inputs = _engine().ggml_new_tensor_2d(context, FLOAT32, self.in_features, rows)
            outputs = _engine().ggml_mul_mat(context, self.weight, inputs)
            graph = _engine().ggml_new_graph(context)
            _engine().ggml_build_forward_expand(graph, outputs)
            _place(context, _engine().ggml_backend_dev_buffer_type(_cpu()))
            self._graphs[rows] = graph, inputs, outputs
        return self._graphs[rows]


def products(dense: Tensor, bits: int, copies: int) -> list[GgmlProduct]:
    """Linears [N, K] with the weights of `dense`, quantized by ggml, each with a copy of its own."""
    out_features, in_features = dense.shape
    quantized = _quantize(dense.float().contiguous(), FORMATS[bits])
    make = partial(_product, quantized, FORMATS[bits], in_features, out_features)
    return [make() for _ in range(copies)]


def _product(quantized: Any, format_: int, in_features: int, out_features: int) -> GgmlProduct:
    for buffer_type in _buffer_types():
        context = _context()
        weight = _engine().ggml_new_tensor_2d(context, format_, in_features, out_features)
        if _serves(buffer_type, context, weight, in_features):
            _engine().ggml_backend_tensor_set(weight, quantized, 0, len(quantized))
            return GgmlProduct(weight, len(quantized), in_features, out_features)
    raise AssertionError("ggml multiplies by what lies in the CPU's own buffers")


def _serves(buffer_type: int, context: int, weight: int, in_features: int) -> bool:
    """Place the weight there; returns whether the CPU can multiply by what lies so."""
    if not _place(context, buffer_type):
        return False
    scratch = _context()
    inputs = _engine().ggml_new_tensor_2d(scratch, FLOAT32, in_features, 1)
    return bool(_engine().ggml_backend_dev_supports_op(_cpu(), _engine().ggml_mul_mat(scratch, weight, inputs)))


def _quantize(dense: Tensor, format_: int) -> Any:
    context = _context()
    n_bytes = _engine().ggml_nbytes(_engine().ggml_new_tensor_2d(context, format_, dense.shape[1], dense.shape[0]))
    quantized = ctypes.create_string_buffer(n_bytes)
    source = ctypes.cast(dense.data_ptr(), POINTER(c_float))
    written = _engine().ggml_quantize_chunk(format_, source, quantized, 0, *dense.shape, None)
    assert written == n_bytes, (written, n_bytes)
    return quantized


def _context() -> int:
    return int(_engine().ggml_init(_InitParams(CONTEXT_BYTES, None, True)))


def _place(context: int, buffer_type: int) -> bool:
    return bool(_engine().ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type))


def _buffer_types() -> Iterator[int]:
    """Where the CPU likes weights to lie, best first."""
    make = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(_address("ggml_backend_dev_get_extra_bufts"))
    for buffer_type in make(_cpu()):
        if not buffer_type:
            break
        yield buffer_type
    yield _engine().ggml_backend_dev_buffer_type(_cpu())


def _set_threads(threads: int) -> None:
    ctypes.CFUNCTYPE(None, c_void_p, c_int)(_address("ggml_backend_set_n_threads"))(_backend(), threads)


@cache
def _address(name: str) -> int:
    registry = _engine().ggml_backend_dev_backend_reg(_cpu())
    return int(_engine().ggml_backend_reg_get_proc_address(registry, name.encode()))


@cache
def _cpu() -> int:
    return int(_engine().ggml_backend_dev_by_type(CPU_DEVICE))


@cache
def _backend() -> int:
    return int(_engine().ggml_backend_dev_init(_cpu(), None))


@cache
def _engine() -> Any:
    """ggml's functions with their types, from whichever of the package's libraries has them."""
    import llama_cpp

    suffix = {"win32": "*.dll", "darwin": "*.dylib"}.get(sys.platform, "*.so")
    folder = Path(llama_cpp.__file__).parent / "lib"
    libraries = [ctypes.CDLL(str(path)) for path in sorted(folder.glob(suffix)) if "ggml" in path.name]
    return _Functions(libraries)


class _Functions:
    def __init__(self, libraries: Sequence[ctypes.CDLL]) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
