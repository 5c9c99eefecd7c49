"""GPUs that a plan can be made for, with the numbers of their data sheets.

All bandwidths are for one direction: where a data sheet gives the sum of both directions, it is halved here.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU and its connections.

    Attributes:
        name: Name for people.
        memory: Bytes visible to programs (memory.total of nvidia-smi), which is less than the rounded data-sheet value.
        flops: Peak dense bfloat16 operations per second of the matrix units.
        bandwidth: Peak bytes per second of its memory.
        link: Peak bytes per second to the other GPUs of its node, in one direction.
        network: Peak bytes per second to other nodes, in one direction: its share of the node's adapters.
        gpus_per_node: Number of GPUs in a node.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    gpus_per_node: int = 8


DEVICES = {
    # NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s. DGX A100: 8 x 200 Gb/s.
    "a100": Device("A100 80GB", 80.0 * GIB, 312e12, 2039e9, 300e9, 25e9),
    # NVIDIA H100 SXM data sheet: 989 TFLOP/s (1,979 with sparsity), 3.35 TB/s, NVLink 900 GB/s. DGX H100: 8 x 400 Gb/s.
    "h100": Device("H100 80GB", 79.6 * GIB, 989e12, 3350e9, 450e9, 50e9),
    # NVIDIA H200 SXM data sheet: the H100's chip with 141 GB at 4.8 TB/s. DGX H200: 8 x 400 Gb/s.
    "h200": Device("H200 141GB", 140.4 * GIB, 989e12, 4800e9, 450e9, 50e9),
    # NVIDIA HGX H20: 148 TFLOP/s, 96 GB at 4.0 TB/s, NVLink 900 GB/s; adapters as for the H100.
    "h20": Device("H20 96GB", 95.6 * GIB, 148e12, 4000e9, 450e9, 50e9),
    # NVIDIA DGX B200 data sheet, an eighth of 18 PFLOP/s dense, 1,440 GB, 64 TB/s; NVLink 1.8 TB/s; 8 x 400 Gb/s.
    "b200": Device("B200 180GB", 179.0 * GIB, 2250e12, 8000e9, 900e9, 50e9),
    # NVIDIA L40S data sheet: 362 TFLOP/s, 48 GB at 864 GB/s, PCIe 4 x16 instead of NVLink; 4 x 400 Gb/s for 8 GPUs.
    "l40s": Device("L40S 48GB", 45.0 * GIB, 362e12, 864e9, 32e9, 25e9),
    # NVIDIA Ada white paper, RTX 4090: 165 TFLOP/s with fp32 sums, 24 GB at 1,008 GB/s, PCIe 4 x16; 10 Gb/s Ethernet.
    "rtx4090": Device("RTX 4090 24GB", 24.0 * GIB, 165e12, 1008e9, 32e9, 1.25e9),
}
