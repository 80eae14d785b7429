"""Devices and the precision that suits them."""


def has_fast_bfloat16(device: str) -> bool:
    """Return whether bfloat16 beats float32 on this device: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def choose_dtype(dtype: str, device: str) -> str:
    """Return `dtype`, or for `auto` bfloat16 where this device is fast at it and float32 elsewhere."""
    if dtype == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    return dtype


def default_device(local_rank: int = 0) -> str:
    """Return the GPU of this process, or `cpu` if there is none."""
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
