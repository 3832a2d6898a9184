"""What libraries of the training read of the environment by themselves, and what of that may reach them.

A run is its configuration. Variables that would change what is computed are set aside before anything is imported that
reads them, and the run says so. Others may stay: where processes meet (RANK, MASTER_ADDR, ...), how bytes travel
(NCCL_, GLOO_, DS_SDMA_, DS_PIN_MEMORY_), which device there is (CUDA_VISIBLE_DEVICES, DS_ACCELERATOR), how loud
libraries are (TORCH_LOGS, TORCH_DISTRIBUTED_DEBUG), with what they compile (CFLAGS, TORCH_CUDA_ARCH_LIST).
"""

from __future__ import annotations

from collections.abc import MutableMapping

SET_ASIDE = {
    "ACCELERATE_": "[engine] and [optimizer] decide",  # precision, accumulation, compiler, device, DeepSpeed, FSDP, ...
    "FSDP_": "this program does not train with it",  # Accelerate's
    "MEGATRON_LM_": "this program does not train with it",  # Accelerate's
    "PARALLELISM_CONFIG_": "this program does not train with it",  # Accelerate's
    "FORK_LAUNCHED": "ranks are not forked from a notebook",  # Accelerate's
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "fp32 means fp32",  # torch's: matrix products in TF32
    "NVIDIA_TF32_OVERRIDE": "fp32 means fp32",  # cuBLAS's and cuDNN's
    "XLA_USE_BF16": "engine.precision decides",
    "XLA_DOWNCAST_BF16": "engine.precision decides",
    "DS_ALLOW_DEPRECATED_FP16": "engine.precision decides",  # DeepSpeed's: fp16 where it is unsound
}
"""Variables, or the beginning of their names (with "_" at the end), and why a run does not listen to them."""


def set_aside(environment: MutableMapping[str, str]) -> list[str]:
    """Take them out; a line for each that was there."""
    lines: list[str] = []
    for name in sorted(environment):
        reasons = (why for key, why in SET_ASIDE.items() if name == key or (key[-1] == "_" and name.startswith(key)))
        reason = next(reasons, None)
        if reason is not None:
            lines.append(f"{name}={environment.pop(name)} of the environment is not used: {reason}")
    return lines
