"""The one table and the one function that choose how an op is computed."""

from __future__ import annotations

from typing import Literal

Impl = Literal["auto", "reference", "torch", "triton", "cuda"]

# op -> implementations that exist, and the one `auto` takes on each device
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("reference", "torch"),
    "alignment_losses": ("reference",),
    "frame_similarity": ("reference",),
    "info_nce": ("reference",),
    "preprocess_frames": ("reference",),
}
AUTO: dict[str, dict[str, str]] = {
    "attention": {"cpu": "torch", "cuda": "torch"},
}


class KernelUnavailable(RuntimeError):
    """An implementation was asked for by name and is not here."""


def choose(op: str, impl: str, device_type: str) -> str:
    """Name the implementation that serves `op` on a device.

    Args:
        op: name of the op, a key of IMPLEMENTATIONS.
        impl: "auto", or an implementation, which is then never replaced by another.
        device_type: "cpu" or "cuda".

    Raises:
        KernelUnavailable: `impl` is not among the op's implementations.
    """
    if impl == "auto":
        return AUTO.get(op, {}).get(device_type, "reference")
    if impl not in IMPLEMENTATIONS[op]:
        known = ", ".join(("auto", *IMPLEMENTATIONS[op]))
        raise KernelUnavailable(f"{op}: no implementation {impl!r}; use one of {known}")
    return impl
