"""Chips as their vendors publish them, and the ones that a program can be compiled for anywhere.

"v5e", "h100" --chip--> Chip: peaks, memory, slices --> devices of a topology (cost/topology.py)
jax.Device.device_kind --peak_flops--> FLOP/s
"""

import dataclasses

from llava_mini_jax.errors import InputError

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
GPUS = ("1", "2", "4", "8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Numbers of one device; 0 where none is needed, as nothing is compiled for it from here."""

    kinds: tuple[str, ...]  # how `jax.Device.device_kind` begins
    tflops: float  # dense bfloat16 TFLOP/s
    bandwidth: float = 0  # GB/s of its memory
    memory: float = 0  # GiB
    links: float = 0  # GB/s that come in from other chips, over all links
    clock: float = 0  # GHz; of GPUs the compiler's text has no cycles
    slices: tuple[str, ...] = ()  # a TPU slice's chips along its axes, or how many GPUs

    @property
    def is_tpu(self) -> bool:
        return self.kinds[0].startswith("TPU")


# Those that have a name here can be compiled for (`llava-mini profile compile --chip`). Not v4:
# where there is none, libtpu takes one of its chips for two devices. Links of a v5e and v6e slice
# below 16x16 form no rings: half of this in the worst case.
COMPILED = {
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"),
        tflops=197,
        bandwidth=819,
        memory=16,
        links=180,
        clock=1.5,
        slices=FLAT,
    ),
    "v5p": Chip(
        kinds=("TPU v5",),
        tflops=459,
        bandwidth=2765,
        memory=95,
        links=540,
        clock=1.75,
        slices=CUBES,
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"),
        tflops=918,
        bandwidth=1640,
        memory=32,
        links=360,
        clock=1.75,
        slices=FLAT,
    ),
    "h100": Chip(
        kinds=("NVIDIA H100 80GB HBM3",),
        tflops=989,
        bandwidth=3350,
        memory=79,  # of 80 GB the driver leaves so many GiB
        links=450,
        slices=GPUS,
    ),
}
_OTHERS = (
    Chip(kinds=("TPU v4 lite",), tflops=138),
    Chip(kinds=("TPU v4",), tflops=275),
    Chip(kinds=("NVIDIA A100", "NVIDIA A800"), tflops=312),
    Chip(kinds=("NVIDIA H100 PCIe",), tflops=756),
    Chip(kinds=("NVIDIA H100 NVL", "NVIDIA H200 NVL"), tflops=835),
    Chip(kinds=("NVIDIA H100", "NVIDIA H200"), tflops=989),
    Chip(kinds=("NVIDIA B200",), tflops=2250),
)


def chip(name: str) -> Chip:
    """A chip that can be compiled for; InputError for any other name."""
    if name not in COMPILED:
        raise InputError(f'chip "{name}" is unknown; give one of {", ".join(COMPILED)}')
    return COMPILED[name]


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device of this `jax.Device.device_kind`; None if unknown."""
    peaks = {kind: c.tflops for c in (*COMPILED.values(), *_OTHERS) for kind in c.kinds}
    # The longest that fits: "TPU v5 lite" is no "TPU v5".
    fitting = [kind for kind in peaks if device_kind.startswith(kind)]
    return peaks[max(fitting, key=len)] * 1e12 if fitting else None
