"""What is said on standard error while a file is coded: lines, and a bar where that is a terminal."""
import sys
import time


def say(text, on=True):
    """Print a line, unless progress is off."""
    if on:
        print(text, file=sys.stderr)


class Bar:
    """Share done, speed, time left and running bits per byte, written over and over in one line of a terminal."""

    def __init__(self, verb, total_bytes, on=True):
        self.verb = verb
        self.total = total_bytes
        self.started = time.time()
        self.shown = 0.0                        # when it was written last
        self.on = on and sys.stderr.isatty()

    def begin(self, done, bits=None, bytes_per_symbol=1.0):
        """Say what stands before the symbols that symbols() will count."""
        self.base = done
        self.bits = bits
        self.bytes_per_symbol = bytes_per_symbol

    def symbols(self, n):
        """Show that n symbols are done since begin()."""
        self.show(self.base + n * self.bytes_per_symbol, self.bits)

    def show(self, done, bits=None, last=False):
        """Show that so many bytes are done, at most twice a second. bits: their code length so far."""
        now = time.time()
        if not self.on or not (last or now - self.shown > 0.5):
            return
        self.shown = now
        rate = done / max(now - self.started, 1e-9)
        left = (self.total - done) / rate if rate else 0
        share = done / max(self.total, 1)
        line = f'\r{self.verb} {share:6.1%}  {rate / 1000:8.2f} kB/s  {left:5.0f} s left'
        if bits is not None:
            line += f'  {bits / max(done, 1):.4f} bits/byte'
        print(line + ' ', end='\n' if last else '', file=sys.stderr, flush=True)
