"""cutter.py: documents to rows and paired rows, by hand."""
import numpy as np
import pytest

from configurator import UserError
from corpus.cutter import Cutter

TITLE = {'title': [dict(key='title', type='global', value='x')]}
BOLD = {'html': [dict(key='html', type='local', char_start_idx=2, char_end_idx=4, value='b')]}


def shown(ids, mask):
    """Rows as text beside their masks; bytes of padding are line feeds."""
    texts = [bytes(row.astype(np.uint8)).decode() for row in ids]
    return list(zip(texts, [''.join(map(str, row)) for row in mask]))


def test_a_prefix_stands_before_each_piece():
    """Half of a row is prefix at most, cut before its mark; the text behind one starts with a space."""
    cutter = Cutter(None, 20)
    assert shown(*cutter.rows('abcdefghijk', TITLE, ['title'])) == [
        ('Title: |||' + ' abcdefghi', '2' * 10 + '1' * 10), ('Title: |||' + 'jk' + '\n' * 8, '2' * 10 + '11' + '0' * 8)]
    assert shown(*cutter.rows('abcdefghijk', {}, ['title'])) == [('abcdefghijk' + '\n' * 9, '1' * 11 + '0' * 9)]


def test_markup_stands_in_the_line():
    assert shown(*Cutter(None, 20).rows('abcdef', BOLD, ['html'])) == [
        ('ab<b>cd</b>ef' + '\n' * 7, '11' + '333' + '11' + '3333' + '11' + '0' * 7)]


def test_the_same_context_holds_the_text_alone():
    """What is not text becomes padding on the left, and the text ends where it did."""
    cutter = Cutter(None, 20, 'samecontext')
    assert shown(*cutter.rows('abcdef', BOLD, ['html'])) == [
        ('\n' * 7 + 'abcdef' + '\n' * 7, '0' * 7 + '1' * 6 + '0' * 7)]
    assert shown(*cutter.rows('ab', TITLE, ['title'])) == [('\n' * 10 + ' ab' + '\n' * 7, '0' * 10 + '111' + '0' * 7)]


def test_paired_rows_by_hand():
    """Both sides score b to h: not the space, which one side alone has, and not the first of the text."""
    own = np.frombuffer(b'Title: |||', np.uint8)
    other = np.frombuffer(b'y |||', np.uint8)
    made = {arm: shown(*rows) for arm, rows in Cutter(None, 20).pair('abcdefgh', TITLE, ['title'], other).items()}
    assert list(made) == ['with', 'without', 'other']
    assert made['with'] == [(bytes(own).decode() + ' abcdefgh\n', '2' * 12 + '1' * 7 + '0')]
    assert made['without'] == [('abcdefgh' + '\n' * 12, '2' + '1' * 7 + '0' * 12)]
    assert made['other'] == [('y |||' + ' abcdefgh' + '\n' * 6, '2' * 7 + '1' * 7 + '0' * 6)]


def test_pieces_of_a_pair_match_by_bytes():
    """Each piece is beside the plain text of the same bytes; markup is no target on either side."""
    made = {arm: shown(*rows) for arm, rows in Cutter(None, 10).pair('abcdefgh', BOLD, ['html']).items()}
    assert made['with'] == [('ab<b>cd</b', '2133311333'), ('>efgh' + '\n' * 5, '3' + '2111' + '0' * 5)]
    assert made['without'] == [('abcd' + '\n' * 6, '2111' + '0' * 6), ('efgh' + '\n' * 6, '2111' + '0' * 6)]


def test_a_document_of_one_token_makes_no_pair():
    assert Cutter(None, 20).pair('a', {}, ['title']) == {}


class Ambiguous:
    """A tokenizer that gives a byte one id at the start of a string and another inside."""

    end, byte_lengths = 600, np.ones(601, np.int64)

    def encode(self, texts):
        return [np.frombuffer(t.encode(), np.uint8) + 256 * (np.arange(len(t.encode())) % 2) for t in texts]


def test_a_tokenizer_with_two_ids_for_the_same_bytes_is_refused():
    with pytest.raises(UserError, match='several tokens for the same bytes cannot make paired rows'):
        Cutter(Ambiguous(), 20).pair('abcdefgh', TITLE, ['title'])


def test_rows_too_short_for_a_prefix_are_refused():
    with pytest.raises(UserError, match='block_size = 9 is too short for a prefix and text, expected more than 9'):
        Cutter(None, 9)
