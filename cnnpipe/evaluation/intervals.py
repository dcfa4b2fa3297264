"""How far a share may be from the truth by chance."""

import math

# The 97.5 % point of the standard normal distribution, for 95 % intervals.
_Z = 1.959963984540054


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share: it never leaves 0 to 1 and holds for few images, too.

    Args:
        hits: 0 to total.
        total: at least 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    share = hits / total
    centre = share + _Z**2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    scale = 1 + _Z**2 / total
    # None and all are an end of their interval, but for rounding errors.
    return (
        min(share, max(0.0, (centre - spread) / scale)),
        max(share, min(1.0, (centre + spread) / scale)),
    )


def far_below(low: float, num_low: int, high: float, num_high: int) -> bool:
    """Whether one share is below another by more than chance, once in a thousand, and by 0.1.

    Args:
        low: the share that is perhaps the lower one.
        num_low: of how many it is the share, at least 1.
        high: the other.
        num_high: likewise.

    Source: the two-proportion z-test, with pooled variance.
    """
    pooled = (low * num_low + high * num_high) / (num_low + num_high)
    error = math.sqrt(pooled * (1 - pooled) * (1 / num_low + 1 / num_high))
    return high - low > max(0.1, 3.29 * error)
