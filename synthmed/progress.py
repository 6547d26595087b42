"""Progress on stderr: a bar on a terminal, a line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """How far a stage is; silent with `quiet`.

    Args:
        stage: its name, shown in front.
        quiet: print nothing.
    """

    def __init__(self, stage: str, quiet: bool = False) -> None:
        self.stage = stage
        self.quiet = quiet
        self.started = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.base = 0
        self.warned: set[str] = set()

    def resume_at(self, done: int) -> None:
        """Count the rate from here: what an earlier process did took none of our time."""
        self.base = done
        self.started = time.monotonic()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total` with rate and time left; `note` follows (a loss, say)."""
        now = time.monotonic()
        every = 0.2 if self.terminal else 30.0
        if self.quiet or (now - self.shown < every and not (self.terminal and done == total)):
            return
        self.shown = now
        rate = (done - self.base) / max(now - self.started, 1e-6)
        left = (total - done) / rate if rate > 0 else 0
        text = f"{done}/{total}  {rate:.1f}/s  {clock(left)} left  {note}".rstrip()
        if self.terminal:
            filled = int(24 * done / max(total, 1))
            bar = "█" * filled + "·" * (24 - filled)
            sys.stderr.write(f"\r\x1b[K  {self.stage:<9} {bar} {text}")
        else:
            sys.stderr.write(f"  {self.stage:<9} {text}\n")
        sys.stderr.flush()

    def warn(self, text: str) -> None:
        """A line of its own on what looks wrong, once a text."""
        if self.quiet or text in self.warned:
            return
        self.warned.add(text)
        clear = "\r\x1b[K" if self.terminal else ""
        sys.stderr.write(f"{clear}  {self.stage:<9} warning: {text}\n")
        sys.stderr.flush()

    def done(self, text: str, skipped: bool = False) -> None:
        """Close the stage with one line."""
        if self.quiet:
            return
        clear = "\r\x1b[K" if self.terminal else ""
        took = "unchanged" if skipped else clock(time.monotonic() - self.started)
        sys.stderr.write(f"{clear}  {self.stage:<9} {text}  ({took})\n")
        sys.stderr.flush()


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> clock(75), clock(3725)
    ('1:15', '1:02:05')
    """
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def count(n: int) -> str:
    """A number of things for a person.

    >>> count(1_234_567), count(24_900), count(870)
    ('1.2 M', '25 k', '870')
    """
    return f"{n / 1e6:.1f} M" if n >= 1e5 else f"{n / 1e3:.0f} k" if n >= 1e4 else str(n)
