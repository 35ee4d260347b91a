"""documents.py: lines, parts and the cleaner do not depend on how a text comes in chunks."""
import random

import pytest

from corpus import documents


def chunked(text, seed):
    """Return text in chunks of random sizes, some of them empty."""
    rng = random.Random(seed)
    chunks = []
    while text:
        size = rng.choice((0, 1, 2, 5, 11))
        chunks.append(text[:size])
        text = text[size:]
    return chunks


@pytest.mark.parametrize('text', [b'', b'one', b'one\n', b'\n\none\r\ntwo', b'a\nb\n\nlonger line than a chunk\nc'])
def test_lines_of_any_chunks(text):
    for seed in range(20):
        assert list(documents.lines_of(chunked(text, seed))) == text.split(b'\n')


def test_parts_and_sizes():
    text = 'aé日🙂b'.encode()
    for seed in range(20):
        def read(seed=seed):
            return iter(chunked(text, seed))
        assert documents.size_of(read) == len(text) and documents.size_of(read, 4) == 4
        for start in range(len(text) + 1):
            for stop in range(start, len(text) + 2):
                assert b''.join(documents.part_of(read, start, stop)) == text[start:stop]
        starts = [documents.before_character(read, position) for position in range(len(text) + 1)]
        assert starts == [0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11]


@pytest.mark.parametrize('n_bytes, expected', [(3, [b'abc']), (4, [b'abc']), (6, [b'abc', b'd']),
                                               (99, [b'abc', b'def'])])
def test_leading_bytes_count_the_separator(n_bytes, expected):
    def texts():
        for text in (b'abc', b'def'):
            yield documents.Document('x', lambda text=text: iter((text,)))
    cut = documents.leading(texts, n_bytes, b'--', whole_characters=False)
    assert [b''.join(document.read()) for document in cut] == expected


def test_cleaning_does_not_depend_on_chunks():
    """Lines are put together across chunks, and a line without end does not fill the memory."""
    text = b'alpha beta\ngamma\nalpha beta\n<b>\n' + b'y' * 3_000_000
    whole = b''.join(documents.LineCleaner()([text]))
    pieces = documents.LineCleaner()
    assert whole == b'alpha beta\ngamma\n' + b'y' * 3_000_000
    assert b''.join(pieces(text[:32][i:i + 7] for i in range(0, 32, 7))) == b'alpha beta\ngamma\n'
    assert pieces.counts == dict(lines=4, duplicate_lines=1, html_lines=1)
