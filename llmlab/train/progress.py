"""What a person sees of a run: one live line on a terminal, plain periodic lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

SECONDS_BETWEEN_PLAIN_LINES = 10.0

# Dense bfloat16 matrix FLOP/s of one device, from the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device of this kind; None where it is not known."""
    matches = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class Progress:
    """Shows rows of metrics. Nothing is shown on any host but the first (`quiet`)."""

    def __init__(self, steps: int, *, out: TextIO | None = None, quiet: bool = False) -> None:
        self._steps, self._out, self._quiet = steps, out or sys.stderr, quiet
        self._live = self._out.isatty()
        self._shown_at, self._width = float("-inf"), 0
        self._started: tuple[float, int] | None = None

    def show(self, row: Mapping[str, object]) -> None:
        """The progress line of a training row."""
        now, step = time.monotonic(), int(row["step"])  # type: ignore[call-overload]
        if self._started is None:
            self._started = (now, step)
        rate = (now - self._started[0]) / max(1, step - self._started[1])
        left = (self._steps - step) * rate if step > self._started[1] else None
        if self._live:
            self._rewrite(line(row, self._steps, left))
        elif now - self._shown_at >= SECONDS_BETWEEN_PLAIN_LINES or step == self._steps:
            self._shown_at = now
            self.say(line(row, self._steps, left))

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._clear()
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Leaves the last live line standing."""
        if self._live and self._width and not self._quiet:
            print(file=self._out, flush=True)
            self._width = 0

    def _rewrite(self, text: str) -> None:
        if not self._quiet:
            print("\r" + text.ljust(self._width), end="", file=self._out, flush=True)
            self._width = len(text)

    def _clear(self) -> None:
        if self._live and self._width:
            print("\r" + " " * self._width + "\r", end="", file=self._out)
            self._width = 0


def line(row: Mapping[str, object], steps: int, seconds_left: float | None) -> str:
    """`step 120/400  loss 3.21  bits/byte 2.10  lr 3.0e-03  8.1k tokens/s  mfu 41 %  1:20 left`."""
    parts = [f"step {row['step']}/{steps}"]
    for key, label, form in (
        ("loss", "loss", "{:.3f}"),
        ("bits_per_byte", "bits/byte", "{:.3f}"),
        ("learning_rate", "lr", "{:.1e}"),
        ("grad_norm", "grad", "{:.2f}"),
    ):
        if isinstance(row.get(key), (int, float)):
            parts.append(f"{label} {form.format(row[key])}")
    if isinstance(row.get("tokens_per_second"), float):
        parts.append(f"{thousands(row['tokens_per_second'])} tokens/s")  # type: ignore[arg-type]
    if isinstance(row.get("mfu"), float):
        parts.append(f"mfu {100 * row['mfu']:.0f} %")  # type: ignore[operator]
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']:.0f}")
    if seconds_left is not None:
        parts.append(f"{clock(seconds_left)} left")
    return "  ".join(parts)


def thousands(number: float) -> str:
    """1234 -> 1.2k."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:04."""
    minutes, seconds_ = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds_:02}" if hours else f"{minutes}:{seconds_:02}"
