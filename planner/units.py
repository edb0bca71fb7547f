"""Units: the few conversions at the edges, and numbers for humans.

Inside the project every quantity is in SI base units and says so in its name
(``_s``, ``_bytes``, ``_flop``, ``_bytes_per_s``). GB is 10^9 as in data sheets, GiB is 2^30 as
memory is reported; both exist only here.
"""

import re
from typing import Final

from planner.errors import UsageError

US: Final = 1e-6
MS: Final = 1e-3
KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
GB: Final = 1e9
TERA: Final = 1e12

LARGEST: Final = 1e18
"""Of any figure with a unit, in bytes, seconds or bits per second."""
_SIZES: Final = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40,
}  # fmt: skip
_DURATIONS: Final = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_RATES: Final = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "kbps": 1e3, "mbps": 1e6, "gbps": 1e9}


def gbit_per_s(value: float) -> float:
    """Return a rate in Gbit/s as bytes per second."""
    return value * 1e9 / 8


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)(?:/s)?\s*", text)
    if match is None or match[2].lower() not in units:
        raise UsageError(f"{what} {text!r} is not a number with a unit, such as {example}")
    value = float(match[1]) * units[match[2].lower()]
    if value > LARGEST:
        raise UsageError(f"{what} {text!r} is too large")
    return value


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as ``16GiB``, ``800MB`` or ``4096``.

    Raises:
        UsageError: the text is not a number with a known unit.
    """
    return round(_parse(text, _SIZES, "size", "16GiB, 800MB or 4096"))


def parse_seconds(text: str) -> float:
    """Return the seconds of a duration such as ``60s``, ``5min`` or ``2h``."""
    return _parse(text, _DURATIONS, "duration", "60s, 5min or 500ms")


def parse_bit_rate(text: str) -> float:
    """Return the bytes per second of a link rate such as ``1gbit`` or ``200Mbit/s``."""
    rate = _parse(text, _RATES, "link rate", "1gbit or 200mbit") / 8
    if rate == 0:
        raise UsageError(f"link rate {text!r} is none: over such a link nothing arrives")
    return rate


def parse_bit_rates(text: str) -> tuple[float, ...]:
    """Return the bytes per second of link rates such as ``1,10,100Gbit``; one without a unit has that of the next."""
    rates: list[float] = []
    unit = ""
    for part in reversed(text.split(",")):
        found = re.fullmatch(r"(.*?[0-9.])\s*([A-Za-z]*(?:/s)?)\s*", part)
        number, unit = (found[1], found[2] or unit) if found else (part, "")
        rates.append(parse_bit_rate(number + unit))
    return tuple(reversed(rates))


def format_bit_rate(bytes_per_s: float) -> str:
    """Return a link rate as text, three significant digits."""
    value = bytes_per_s * 8
    unit, size = next((pair for pair in (("Gbit/s", 1e9), ("Mbit/s", 1e6)) if value >= pair[1]), ("kbit/s", 1e3))
    return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:.0f} {unit}"


def format_bytes(value: float) -> str:
    """Return bytes as text with a binary prefix, three significant digits."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def format_seconds(value: float, digits: int = 3) -> str:
    """Return seconds as text with a prefix and so many significant digits; less than a femtosecond is rounding."""
    if abs(value) < 1e-15:
        return "0 s"
    if abs(value) >= 1:
        return f"{value:.{digits}g} s" if abs(value) < 10**digits else f"{value:.0f} s"
    scaled, unit = (value * 1e3, "ms") if abs(value) >= 1e-3 else (value * 1e6, "µs")
    return f"{scaled:.{digits}g} {unit}"


def format_count(value: float) -> str:
    """Return a plain number as text with a decimal prefix, three significant digits."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if value / size < 1000 else f"{value / size:.0f}{unit}"
    return f"{value:.3g}"
