"""What this machine offers: versions, devices, the kernels that would multiply by packed weights, caches and disk.

`examine` looks, `report_lines` tells people; between them is plain JSON.
"""

from __future__ import annotations

import itertools
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import __version__
from .device import Device, choose_dtype, open_device
from .errors import BackendError, LowVRAMError
from .offload.budget import format_bytes
from .user_cache import user_cache

PACKAGES = ("torch", "transformers", "av", "huggingface_hub", "safetensors")
PUBLISHED_DTYPE = "float16"
"""What the default checkpoint was published in."""


def examine() -> dict[str, Any]:
    """Look at this machine. Nothing is downloaded, nor compiled unless a kernel kept here before turns out damaged. A
    device that is not there is a finding, no error."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from .kernel_report import report_absent_card, report_by_name, report_int8_on_absent_card

    devices, obstacle = _devices()
    return {
        "lowvram": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in PACKAGES},
        "devices": [_device_record(device) for device in devices],
        "no_cuda": obstacle,
        "kernel_with_cuda": asdict(report_absent_card()) if obstacle else None,
        "int8_with_cuda": asdict(report_int8_on_absent_card()) if obstacle else None,
        "kernels_by_name": report_by_name(),
        "folders": [
            _folder_record("models", Path(HF_HUB_CACHE)),
            _demo_record(),
            _folder_record("output", Path.cwd()),
        ],
    }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """What `examine` found, a line each."""
    lines = [f"lowvram {report['lowvram']}, Python {report['python']}"]
    lines.append(", ".join(f"{name} {number}" for name, number in report["packages"].items()))
    for device in report["devices"]:
        lines.append(f"{device['name']}: {device['title']}, {format_bytes(device['free_bytes'])} free")
        lines += _kernel_lines(f"4-bit weights in {device['dtype']}:", device)
        lines += _kernel_lines(f"8-bit weights in {device['dtype']}:", device["int8"])
    if report["no_cuda"]:
        lines.append(f"cuda: {report['no_cuda']}")
        lines += _kernel_lines("4-bit weights with a card:", report["kernel_with_cuda"])
        lines += _kernel_lines("8-bit weights with a card:", report["int8_with_cuda"])
    lines += (f"--kernel {name}: {state}" for name, state in report["kernels_by_name"].items())
    for folder in report["folders"]:
        free = "out of reach" if folder["free_bytes"] is None else f"{format_bytes(folder['free_bytes'])} free"
        lines.append(f"{folder['what']}: {folder['path']}, {free}")
    return lines


def _devices() -> tuple[list[Device], str]:
    """Every device there is, and why there is none but the CPU (empty when there is)."""
    found = [open_device("cpu")]
    for index in itertools.count():
        try:
            found.append(open_device(f"cuda:{index}"))
        except BackendError as error:
            return found, "" if index else str(error.args[0])
    raise AssertionError("counting ends at the first missing device")


def _kernel_lines(what: str, kernel: Mapping[str, str]) -> Iterator[str]:
    yield f"    {what} kernel {kernel['kernel']} ({kernel['reason']})"
    if kernel["compiled"]:
        yield f"    compiled here: {kernel['compiled']}"


def _device_record(device: Device) -> dict[str, Any]:
    from .kernel_report import report_int8_kernel, report_kernel

    dtype = choose_dtype("auto", device.torch, PUBLISHED_DTYPE)
    return {
        "name": str(device.torch),
        "title": device.title,
        "free_bytes": device.free_bytes,
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(report_kernel(device.torch, dtype)),
        "int8": asdict(report_int8_kernel(device.torch, dtype)),
    }


def _folder_record(what: str, path: Path) -> dict[str, Any]:
    return {"what": what, "path": str(path), "free_bytes": _free_bytes(path)}


def _demo_record() -> dict[str, Any]:
    try:
        return _folder_record("demo", user_cache())
    except LowVRAMError:  # a user without a home folder
        return {"what": "demo", "path": "~", "free_bytes": None}


def _free_bytes(path: Path) -> int | None:
    """On the disk where `path` is, or would be made; None where no folder above it can be reached."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None
