"""Devices that are not here, for plans: `config.topology`, compile-only devices, and the mesh of them.

    cpu:N        N devices of this machine's CPU
    h100:N       N GPUs in hosts of 8 (also h200, a100: SXM, with NVLink); up to 8 are one host
    v5e:16x16    a slice of TPU chips by its sides (also v6e; v5p has three: v5p:4x4x8)

Nothing runs on them, and none need be there: JAX compiles for them by what a topology tells (jax.experimental.
topologies). It needs the platform's plug-in, which is a Python package. This process itself must be on the CPU.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from omnistream_jax.config import ConfigError
from omnistream_jax.sharding import lay_out, mesh_sizes

_GIB = 2**30
_HOST_GPUS = 8
# libtpu asks neither for a TPU nor for Google Cloud's metadata; the type, whichever it is, is not that of the topology.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# What a plan for GPUs compiles with: the plug-in, and cuDNN, without which attention cannot be lowered.
GPU_PACKAGES = "pip install --no-deps jax-cuda12-plugin=={v} jax-cuda12-pjrt=={v} 'nvidia-cudnn-cu12<10'"


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """What a plan must know of a device.

    Attributes:
        kind: JAX's `device_kind`, by which `flops.PEAK_TERAFLOPS` knows its peak.
        platform: "cpu", "cuda" or "tpu".
        memory: bytes that a program may have; 0: not known.
        bandwidth: of its memory, bytes a second.
        link: bytes a second that it sends to the devices of its host (NVLink, all links, one way), or to one
            neighbour of its torus (TPU, one link, one way).
        network: bytes a second that it sends to other hosts; 0 for a TPU slice, which is one torus.
        sides: how many sides a slice has; 0: counted, in hosts.
        wraps: of a slice: a side of a multiple of it is a ring, and both neighbours lead to every chip.
        compiler: of a GPU, what XLA asks of its `target_config`.
        capability: of an NVIDIA GPU, CUDA's compute capability.
    """

    kind: str
    platform: str
    memory: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    sides: int = 0
    wraps: int = 0
    compiler: str = ""
    capability: float = 0.0


def _gpu(
    *, capability: int, cores: int, units: int, clock: float, shared: int, cache: int, memory: int, bandwidth: float
) -> str:
    """XLA's target_config (GpuTargetConfigProto, as text) but for the name.

    Args:
        capability: CUDA's, its first number.
        cores: streaming multiprocessors, each with so many `units` for float32 at `clock` GHz.
        shared: memory that blocks of a core share, in KiB.
        cache: L2, in MiB.
        memory, bandwidth: in bytes and bytes a second.
    """
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared * 1024}
  shared_memory_per_block_optin: {shared * 1024 - 1024}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {int(bandwidth)} l2_cache_size: {cache * 2**20} device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
"""


_AMPERE = {"capability": 8, "cores": 108, "units": 64, "clock": 1.41, "shared": 164, "cache": 40}
_HOPPER = {"capability": 9, "cores": 132, "units": 128, "clock": 1.98, "shared": 228, "cache": 50}
# GPUs: NVIDIA's data sheets; NVLink one way is half of what they add up; networks of DGX systems (a 400 Gb/s adapter a
# GPU, 200 for the A100). Of 80 GB some lie with CUDA, NCCL and the allocator's gaps: the cards have 85.0e9 bytes.
# TPUs: memory is what XLA gives a program; bandwidths: Google's "How to Scale Your Model", chapter 2.
DEVICES = {
    "cpu": DeviceKind("cpu", "cpu"),
    "a100": DeviceKind(
        *("NVIDIA A100-SXM4-80GB", "cuda", 80e9, 2.04e12, 300e9, 25e9),
        capability=_AMPERE["capability"],
        compiler=_gpu(**_AMPERE, memory=85_100_068_864, bandwidth=2.04e12),
    ),
    "h100": DeviceKind(
        *("NVIDIA H100 80GB HBM3", "cuda", 80e9, 3.35e12, 450e9, 50e9),
        capability=_HOPPER["capability"],
        compiler=_gpu(**_HOPPER, memory=84_942_979_072, bandwidth=3.35e12),
    ),
    "h200": DeviceKind(
        *("NVIDIA H200", "cuda", 141e9, 4.8e12, 450e9, 50e9),
        capability=_HOPPER["capability"],
        compiler=_gpu(**_HOPPER, memory=150_110_011_392, bandwidth=4.8e12),
    ),
    "v5e": DeviceKind("TPU v5 lite", "tpu", 15.75 * _GIB, 8.1e11, 4.5e10, sides=2, wraps=16),
    "v5p": DeviceKind("TPU v5", "tpu", 95.74 * _GIB, 2.8e12, 9e10, sides=3, wraps=4),
    "v6e": DeviceKind("TPU v6 lite", "tpu", 31.25 * _GIB, 1.6e12, 9e10, sides=2, wraps=16),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, and how they are wired.

    Attributes:
        name: as in `config.topology`.
        device: their kind.
        sides: of a TPU slice, chips along each; (N,) of others.
    """

    name: str
    device: DeviceKind
    sides: tuple[int, ...]

    @property
    def count(self) -> int:
        """Devices."""
        return math.prod(self.sides)

    @property
    def host_devices(self) -> int:
        """Devices that a host has; of a slice all, for the torus does not end at a host."""
        return min(self.count, _HOST_GPUS) if self.device.platform == "cuda" else self.count


def parse_topology(name: str) -> Topology:
    """What `config.topology` names. Raises ConfigError for anything else than the head of this file tells."""
    device, _, size = name.partition(":")
    counted = [known for known, kind in DEVICES.items() if not kind.sides]
    slices = [known for known, kind in DEVICES.items() if kind.sides]
    if device not in DEVICES:
        expected = f"COUNT of {', '.join(counted)} or SIDES of {', '.join(slices)}, as h100:64 or v5e:16x16"
        raise ConfigError(f"topology: expected {expected}, got {name!r}")
    kind = DEVICES[device]
    if not re.fullmatch("x".join(["[1-9][0-9]*"] * max(kind.sides, 1)), size):
        expected = "x".join(("4", "4", "8")[: kind.sides]) if kind.sides else "COUNT"
        raise ConfigError(f"topology: expected {device}:{expected}, got {name!r}")
    topology = Topology(name, kind, tuple(map(int, size.split("x"))))
    if kind.platform == "cuda" and topology.count > _HOST_GPUS and topology.count % _HOST_GPUS:
        raise ConfigError(f"topology: expected up to {_HOST_GPUS} GPUs or whole hosts of {_HOST_GPUS}, got {name!r}")
    return topology


def stand_in_for(topology: Topology) -> None:
    """Gives this process as many CPU devices, so that `jax.device_count()`, by which configs are checked, is theirs.

    Raises:
        ConfigError: JAX has begun already with another number.
    """
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", topology.count)
    except RuntimeError:
        pass
    if (jax.default_backend(), jax.device_count()) != ("cpu", topology.count):
        found = f"{jax.device_count()} {jax.default_backend()} device(s), as by XLA_FLAGS"
        raise ConfigError(f"topology: {topology.name} is planned by a process of its own; this one has {found}")


def planned_mesh(topology: Topology, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """`sharding.make_mesh` of devices that are not here; after `stand_in_for`.

    Raises:
        ConfigError: the sizes do not fit; the platform's plug-in is not installed; there is no such slice.
    """
    try:
        sizes = mesh_sizes(data, fsdp, tensor)
        if (used := math.prod(sizes.values())) != topology.count:
            raise ValueError(f"mesh.data: {used} of the {topology.count} devices of {topology.name} (-1: all)")
        return lay_out(sizes, _devices(topology))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _devices(topology: Topology) -> Sequence[jax.Device]:
    platform, kind = topology.device.platform, topology.device
    if platform == "cpu":
        return jax.devices()
    try:
        if platform == "tpu":
            _require_module("libtpu")
            return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
        _require_module("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
        hosts = topology.count // topology.host_devices
        described = kind.compiler + f'device_description_str: "{kind.kind}"\n'
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x{hosts}x{topology.host_devices}", target_config=described
        ).devices
    except ModuleNotFoundError as error:
        packages = _tpu_packages() if platform == "tpu" else GPU_PACKAGES.format(v=jax.__version__)
        raise ConfigError(f"topology: {topology.name} needs a plug-in to compile with ({error}): {packages}") from error
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology: {topology.name}: {str(error).splitlines()[0]}") from error


def _tpu_packages() -> str:
    """What a plan for TPUs compiles with: the libtpu that the installed jax names in its extra "tpu"."""
    named = (requirement.partition(";")[0].strip() for requirement in importlib.metadata.requires("jax") or ())
    return f"pip install --no-deps '{next(name for name in named if name.startswith('libtpu'))}'"


def _require_module(*names: str) -> None:
    """Raises ModuleNotFoundError unless one of the modules is installed."""
    for name in names:
        try:
            if importlib.util.find_spec(name) is not None:
                return
        except ModuleNotFoundError:  # of the package that it lies in
            pass
    raise ModuleNotFoundError(f"no module {' or '.join(names)}")


def link_bandwidth(topology: Topology, mesh: Mesh, group: Sequence[int]) -> float:
    """Bytes a second that each device of a group can send while all groups like it talk at once.

    Within a GPU host that is its NVLink. Beyond, each GPU has an adapter of its own, and a ring takes all of those that
    its group has in a host. In a slice, a ring runs along every side that the group spans, both ways round where the
    side is a ring itself.

    Args:
        group: places of the devices in `mesh`, in its order.
    """
    devices = mesh.devices.flatten()[np.asarray(group)]
    kind = topology.device
    if kind.platform == "tpu":
        coords = np.array([device.coords[: kind.sides] for device in devices])
        bandwidth = 0.0
        for axis, side in enumerate(topology.sides):
            spanned = len(np.unique(coords[:, axis]))
            ring = spanned == side and side % kind.wraps == 0
            bandwidth += 0.0 if spanned == 1 else (2 if ring else 1) * kind.link
        return bandwidth
    hosts = [device.process_index for device in devices]
    if len(set(hosts)) == 1:
        return kind.link
    return min(kind.link, kind.network * hosts.count(hosts[0]))
