"""A small table has the makers' figures of their GPUs, with the source of each row.

Peaks are of dense bf16 products with float32 sums. Figures that a data sheet gives with sparsity are halved. NVLink and
PCIe count one direction. B200 and H200 figures are those of one GPU of an HGX board.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mirl.errors import UserError

PCIE_4 = 32e9  # sixteen lanes, bytes a second in one direction
PCIE_5 = 64e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device is one kind of GPU.

    key: its name on the command line. reported: a regular expression that torch's name contains as whole words.
    peak_flops: bf16, dense, a second. bandwidth: bytes of memory a second. memory_gib: data sheets write GB for it.
    link: bytes a second to a neighbour in the same host, one direction. source: the document with the figures.
    """

    key: str
    reported: str
    peak_flops: float
    bandwidth: float
    memory_gib: float
    multiprocessors: int
    link: float
    source: str


def _device(
    key: str, reported: str, tflops: float, gb_per_s: float, gib: float, multiprocessors: int, link: float, source: str
) -> Device:
    return Device(
        key=key, reported=reported, peak_flops=tflops * 1e12, bandwidth=gb_per_s * 1e9, memory_gib=gib,
        multiprocessors=multiprocessors, link=link, source=source,
    )  # fmt: skip


HOPPER = "NVIDIA H100 data sheet; multiprocessors: NVIDIA H100 architecture white paper"
AMPERE = "NVIDIA A100 data sheet; multiprocessors: NVIDIA A100 architecture white paper"
ADA = "NVIDIA Ada architecture white paper, appendix of the card"
GA102 = "NVIDIA GA102 architecture white paper"
# If two rows fit one name, the first counts.
DEVICES: dict[str, Device] = {
    device.key: device
    for device in (
        _device("H100", "H100(?! PCIe| NVL)", 989, 3350, 80, 132, 450e9, HOPPER),
        _device("H100-PCIe", "H100 PCIe", 756, 2000, 80, 114, PCIE_5, HOPPER),
        _device("H100-NVL", "H100 NVL", 835, 3900, 94, 132, 300e9, "NVIDIA H100 NVL data sheet; as H100 SXM"),
        _device("H200", "H200", 989, 4800, 141, 132, 450e9, "NVIDIA H200 data sheet; multiprocessors as H100 SXM"),
        _device("H800", "H800", 989, 3350, 80, 132, 200e9, "as H100 SXM, with NVLink of 400 GB/s in both directions"),
        _device("B200", "B200", 2250, 7700, 180, 148, 900e9, "NVIDIA HGX B200 data sheet, an eighth of the board"),
        _device("A100-40", "A100.*40GB", 312, 1555, 40, 108, 300e9, AMPERE),
        _device("A100", "A100", 312, 2039, 80, 108, 300e9, AMPERE),
        _device("A800", "A800", 312, 2039, 80, 108, 200e9, "as A100 80 GB, with NVLink of 400 GB/s in both directions"),
        _device("L40S", "L40S", 362, 864, 48, 142, PCIE_4, "NVIDIA L40S data sheet"),
        _device("L40", "L40", 181, 864, 48, 142, PCIE_4, "NVIDIA L40 data sheet"),
        _device("L4", "L4", 121, 300, 24, 58, PCIE_4 / 2, "NVIDIA L4 data sheet"),
        _device("A40", "A40", 150, 696, 48, 84, PCIE_4, "NVIDIA A40 data sheet"),
        _device("A10", "A10", 125, 600, 24, 72, PCIE_4, "NVIDIA A10 data sheet"),
        _device("A6000", "RTX A6000", 155, 768, 48, 84, PCIE_4, "NVIDIA RTX A6000 data sheet; " + GA102),
        _device("4090", "RTX 4090(?! D| Laptop)", 165, 1008, 24, 128, PCIE_4, ADA),
        _device("3090", "RTX 3090(?! Ti)", 71, 936, 24, 82, PCIE_4, GA102),
    )
}


def device_named(name: str) -> Device:
    """Find the device that a user calls ``name``, in any case, with or without "RTX".

    UserError on an unknown device.
    """
    wanted = _plain(name)
    for device in DEVICES.values():
        if wanted == _plain(device.key):
            return device
    raise UserError(f"gpu is {name}: choose one of {', '.join(DEVICES)}")


def device_reported(name: str) -> Device | None:
    """Find the device that torch calls ``name``; None for a device that is not in the table."""
    fitting = (device for device in DEVICES.values() if re.search(rf"\b(?:{device.reported})\b", name))
    return next(fitting, None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold().removeprefix("rtx") if letter.isalnum())
