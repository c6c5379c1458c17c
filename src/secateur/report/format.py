"""How numbers are written in tables, sentences and hover texts."""

from __future__ import annotations

from secateur.report.statistics import Estimate

THIN = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
CROSS = "\N{MULTIPLICATION SIGN}"


def count(value: float) -> str:
    """A count with its SI prefix, three significant digits: `1.81 G`, `512`."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{significant(value / limit)}{THIN}{prefix}"
    return f"{value:.0f}"


def significant(value: float) -> str:
    """Three significant digits without an exponent, for values from 0.001 to 9999."""
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals + (abs(value) < 0.9995)}f}"


def percent(fraction: float, decimals: int = 1) -> str:
    """`0.975` -> `97.5 %`."""
    return f"{fraction * 100:.{decimals}f}{THIN}%"


def points(difference: float, decimals: int = 1) -> str:
    """A difference of two accuracies, in percentage points: `0.4 points`."""
    text = f"{abs(difference) * 100:.{decimals}f}"
    return f"{text} point{'' if text == '1.0' else 's'}"


def signed_points(difference: float, decimals: int = 1) -> str:
    """`+0.4` or `-1.2` percentage points, with a real minus sign."""
    text = f"{difference * 100:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def share(fraction: float) -> str:
    """A fraction asked for, in percent, as short as it can be: `40`, `97.5`, `0.1`."""
    return f"{100 * fraction:.4g}"


def times(ratio: float) -> str:
    """A factor with its cross: `1.30x`."""
    return f"{ratio:.2f}{CROSS}"


def accuracy(value: Estimate) -> str:
    """Mean and half the error bar, in percent: `97.2 ± 0.3`; only the mean for a single seed."""
    if value.seeds == 1:
        return f"{value.mean * 100:.1f}"
    low, high = value.bar
    return f"{value.mean * 100:.1f} ± {(high - low) * 50:.1f}"


def gain(value: Estimate, decimals: int = 1) -> str:
    """A difference of accuracies and half its error bar, in points: `+0.4 ± 0.3`."""
    mean = signed_points(value.mean, decimals)
    if value.seeds == 1:
        return mean
    low, high = value.bar
    return f"{mean} ± {(high - low) * 50:.{decimals}f}"


def difference(value: float | None) -> str:
    """A relative difference in scientific notation: `2.1e-16`; exactly zero is `0`, and one never taken `-`."""
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def several(number: int, noun: str, plural: str = "") -> str:
    """`1 trial`, `40 trials`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
