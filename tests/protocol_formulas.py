"""The learning rates of the protocols by step, as shares of their peaks, in float64, written apart from the package.

../shared/EVAL_PROTOCOLS.md, sections 3 and 4. i: the step, from 0.
"""

import math


def imagenet_rate(i: int) -> float:
    return (1 + math.cos(math.pi * i / 12_500)) / 2


def nyuv2_rate(i: int) -> float:
    total, warmup = 38_400, 12_800
    if i < warmup:
        return 1 / 1000 + (1 + math.cos(math.pi * i / total)) / 2 * i / warmup
    low = 1 / 25_000
    return low + (1 - low) * (1 + math.cos(math.pi * (i + 1) / total)) / 2


def nyuv2_beta1(i: int) -> float:
    if i < 12_800:
        return 0.0
    return 0.95 + (0.85 - 0.95) / 2 * (1 + math.cos(math.pi * (i - 12_800) / (38_400 - 12_800)))


def ade20k_rate(i: int) -> float:
    i = max(i - 1, 0)  # the scheduler stands still after the very first step
    if i < 1_500:
        k = (1 - i / 1_500) * (1 - 1e-6)
        return (1 - k) * (1 - i / 40_000)
    return (1 + math.cos(math.pi * (i + 1) / 40_000)) / 2


def vjepa2_rate(i: int, steps: int = 19_280) -> float:
    return (1 + math.cos(math.pi * (i + 1) / steps)) / 2  # moved on before each step
