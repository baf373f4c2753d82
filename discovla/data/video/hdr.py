"""Frames of HDR video (PQ or HLG, ITU-R BT.2100) as SDR: linear light, tone curve, BT.709 colours."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from av.video.frame import VideoFrame

TRANSFERS = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers of transfer functions that need tone mapping

_WHITE = 203.0  # cd/m2 of diffuse white in HDR (BT.2408), which becomes the white of SDR
_PEAK = 1000.0  # cd/m2 that becomes the brightest SDR value; also HLG's nominal display
_KNEE = 0.75  # of diffuse white, up to which light stays as it is
_BT2020 = 9  # FFmpeg's number of the primaries
# linear BT.2020 RGB to linear BT.709 RGB (BT.2087)
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)


def hdr_name(transfer: int) -> str | None:
    """Return "PQ" or "HLG" for FFmpeg's number of a transfer function, None for those of SDR."""
    return TRANSFERS.get(int(transfer))


def tone_map(frame: VideoFrame) -> np.ndarray:
    """Return a PQ or HLG frame as SDR, y x 3 uint8 RGB.

    Light up to three quarters of diffuse white keeps its brightness relative to it; what is brighter, up to
    1000 cd/m2, is compressed above it, by the same factor for all colours of a pixel.
    """
    transfer = TRANSFERS[int(frame.color_trc)]
    codes: np.ndarray = frame.reformat(format="rgb48le").to_ndarray()
    light = _linear_table(transfer)[codes]
    if transfer == "HLG":
        luma = np.maximum(light @ _BT2020_LUMA, 1e-6)[..., None]
        light = light * luma**0.2 * (_PEAK / _WHITE)  # the display's gamma at 1000 cd/m2 is 1.2
    if int(frame.color_primaries) == _BT2020:
        light = light @ _TO_BT709.T
    light = np.maximum(light, 0)
    brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
    light *= _curve(brightest) / brightest
    return np.round(255 * np.clip(light, 0, 1) ** (1 / 2.4)).astype(np.uint8)


def _curve(light: np.ndarray) -> np.ndarray:
    """Map light, 1 at diffuse white, to 0..1: unchanged up to the knee, compressed up to the peak."""
    peak = _PEAK / _WHITE
    above = np.clip((light - _KNEE) / (peak - _KNEE), 0, 1)
    steep = (peak - _KNEE) / (1 - _KNEE)  # slope 1 at the knee
    return np.where(light <= _KNEE, light, _KNEE + (1 - _KNEE) * (steep + 1) * above / (1 + steep * above))


@lru_cache(maxsize=2)
def _linear_table(transfer: str) -> np.ndarray:
    """Return light by 16-bit code: for PQ of the display, 1 at diffuse white; for HLG of the scene, 0..1."""
    code = np.arange(65536) / 65535
    if transfer == "PQ":
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = code ** (1 / m2)
        return (10000 / _WHITE * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)).astype(
            np.float32
        )
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
