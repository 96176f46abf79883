"""Numbers and times as people read them."""


def readable(number: float) -> str:
    """1234567 -> "1.23M"."""
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}" if number < 999.5 * factor else f"{number / factor:.0f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Seconds as 1d 02:03:04, without the days where there are none."""
    days, rest = divmod(round(seconds), 86400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text


def gibibytes(count: float) -> str:
    """Bytes of memory: "79.2 GiB", or "14 MiB" where that says more."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"
