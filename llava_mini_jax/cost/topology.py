"""Devices that are not here, of which compilers know what a program needs to be compiled for them.

    chip, slice --plugin--> devices of the slice --sharding.make_mesh--> mesh

TPUs need libtpu, GPUs JAX's CUDA plugin with its compilers: the extras compile-tpu, compile-gpu.
No driver and no accelerator is looked for; `environment.compile_for_absent` comes before.
"""

import importlib.util
from importlib import metadata
from typing import Any

from llava_mini_jax.cost.chips import Chip, chip
from llava_mini_jax.errors import InputError

# What XLA's GPU compiler asks a device about, where there is one (openxla's gpu_target_config).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def absent_devices(name: str, shape: str) -> list[Any]:
    """The devices of a slice of `name`d chips. Raises InputError where there is no such slice, or
    the plugin is missing or of another version than JAX."""
    wanted = chip(name)
    if shape not in wanted.slices:
        raise InputError(
            f'a slice "{shape}" of {name} is unknown; give --slice {", ".join(wanted.slices)}'
        )
    _check_plugin(wanted, name)
    from jax.experimental import topologies

    try:
        if not wanted.is_tpu:
            found = topologies.get_topology_desc(
                platform="cuda", target_config=_H100, topology=f"1x1x{shape}"
            )
        else:
            # A host has 2 x 2 chips unless it is said to have one.
            single = {"chips_per_host_bounds": (1, 1, 1)} if set(shape) == {*"1x"} else {}
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{name}:{shape}", **single
            )
    except Exception as error:  # whatever a plugin of another age raises
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"the compiler for {name} does not start ({said}); {_remedy(wanted)}"
        ) from error
    return list(found.devices)


def _check_plugin(wanted: Chip, name: str) -> None:
    package, module = (
        ("libtpu", "libtpu") if wanted.is_tpu else ("jax-cuda12-plugin", "jax_cuda12_plugin")
    )
    if importlib.util.find_spec(module) is None:
        raise InputError(f"compiling for {name} needs {package}, not installed; {_remedy(wanted)}")
    version, jax_version = metadata.version(package), metadata.version("jax")
    # The plugin carries jaxlib's number; libtpu has numbers of its own, and starts or does not.
    if not wanted.is_tpu and version != jax_version:
        raise InputError(
            f"compiling for {name} needs {package} {jax_version}, as JAX is, but {version} is"
            f" installed; {_remedy(wanted)}"
        )


def _remedy(wanted: Chip) -> str:
    extra = "compile-tpu" if wanted.is_tpu else "compile-gpu"
    return f"run pip install -c constraints.txt '.[{extra}]' in the project's folder"
