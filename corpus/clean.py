"""Drop near-duplicate lines and lines with HTML tags from documents, in constant memory (Li et al. 2021, §3).

A line's key is its length without punctuation and white space, and its first and last four words. Keys seen are kept in
a Bloom filter of 256 MiB, 4 bits each: after 100 million different lines one new line in 1,000 is taken for an old one.
"""
import hashlib
import re
import struct

TAG = re.compile(rb'</?[A-Za-z][^<>\n]*>')
PUNCTUATION = bytes(b for b in range(128) if not chr(b).isalnum())      # white space too; other bytes are letters
BITS = 1 << 31
MAX_LINE = 1 << 20              # bytes; what is longer is taken as several lines


class LineCleaner:
    """Clean documents one after another; counts says how many lines came in and why some did not go out."""

    def __init__(self):
        self.seen, self.counts = bytearray(BITS // 8), dict(lines=0, duplicate_lines=0, html_lines=0)

    def is_new(self, line):
        """Say whether a line's key was not seen before, and remember it."""
        words = line.split()
        key = b'%d %s' % (len(line.translate(None, PUNCTUATION)), b' '.join(words[:4] + words[-4:]))
        places = [place % BITS for place in struct.unpack('<4I', hashlib.blake2b(key, digest_size=16).digest())]
        known = all(self.seen[place >> 3] >> (place & 7) & 1 for place in places)
        for place in places:
            self.seen[place >> 3] |= 1 << (place & 7)
        return not known

    def __call__(self, chunks):
        """Yield a document's bytes without the lines to drop; empty lines are layout and stay."""
        rest = b''
        for chunk in chunks:
            *lines, rest = (rest + chunk).split(b'\n')
            yield self.kept([line + b'\n' for line in lines])
            if len(rest) > MAX_LINE:
                yield self.kept([rest])
                rest = b''
        yield self.kept([rest])

    def kept(self, lines):
        """Return the lines that stay, joined."""
        good = []
        for line in lines:
            text = line.strip()
            self.counts['lines'] += bool(text)
            if text and TAG.search(line):
                self.counts['html_lines'] += 1
            elif text and not self.is_new(text):
                self.counts['duplicate_lines'] += 1
            else:
                good.append(line)
        return b''.join(good)
