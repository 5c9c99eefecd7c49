"""Part `machine`: what is installed, what is missing, and the speed of a matrix product and of a copy."""

import importlib.metadata
import importlib.util
import platform

import torch
from gpu import known_device, measure, percent, share_of_bandwidth, share_of_peak
from rows import Rows, options_of

PACKAGES = (
    *(
        "torch",
        "triton",
        "megatron-core",
        "transformer-engine",
        "apex",
        "transformers",
        "safetensors",
        "numpy",
        "psutil",
    ),
    *("pydantic", "pytest", "hypothesis"),
)
PEERS = ("verl", "trl", "liger-kernel")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    options = options_of(__doc__)
    rows = Rows(options.rows)
    versions = {package: version(package) for package in (*PACKAGES, *PEERS)}
    there = ", ".join(f"{package} {number}" for package, number in versions.items() if number)
    absent = ", ".join(package for package, number in versions.items() if not number)
    rows.add("packages", f"Python {platform.python_version()}, {there}", note=f"missing: {absent}" if absent else "")
    if options.device == "cuda":
        properties, known = torch.cuda.get_device_properties(0), known_device()
        rows.add(
            "GPU",
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {properties.multi_processor_count} SMs",
            beside=f"{known.name}: {known.memory / 2**30:.1f} GiB"
            if (known := known_device())
            else "not in the planner",
            note=f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
            memory=properties.total_memory,
        )
    size = 256 if options.small else 8192
    with rows.guarded("matrix product"):
        a = torch.randn(size, size, device=options.device, dtype=torch.bfloat16)
        product = measure(options.device, lambda: a @ a, 20)
        share = share_of_peak(2 * size**3, product.seconds)
        rows.add(
            "matrix product",
            f"{2 * size**3 / product.seconds / 1e12:.3g} TFLOP/s{percent(share)}",
            note=f"{size} x {size} x {size} in bf16: what a product can reach here",
            seconds=product.seconds,
            share=share,
        )
    with rows.guarded("copy"):
        b = torch.empty(2**20 if options.small else 2**30, dtype=torch.uint8, device=options.device)
        target = torch.empty_like(b)
        copy = measure(options.device, lambda: target.copy_(b), 20)
        share = share_of_bandwidth(2 * b.nbytes, copy.seconds)
        rows.add(
            "copy",
            f"{2 * b.nbytes / copy.seconds / 1e9:.3g} GB/s{percent(share)}",
            note="bytes read and written",
            seconds=copy.seconds,
            share=share,
        )


if __name__ == "__main__":
    main()
