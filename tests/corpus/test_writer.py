"""writer.py: packed documents that go on where they were interrupted, resume.json, splits by hash."""
import numpy as np
import pytest
from conftest import snapshot

from corpus import writer
from corpus.tokens import Tokenizer

DOCUMENTS = [b'one', b'', b'two words', b'three', b'the end']


def spelled(folder, state=writer.EMPTY, skip=0, stop=None, **options):
    """Write documents [skip, stop) of bytes; returns the writer, not committed."""
    packed = writer.PackedWriter(str(folder), 'train', 'uint8', None, b'--', state=state, **options)
    queue = writer.TokenQueue(None)
    for text in DOCUMENTS[skip:stop]:
        queue.add(packed, (text[:2], text[2:]), 'x')
    return packed


def test_documents_are_packed_and_indexed(tmp_path):
    """The separator stands between two documents; one of no bytes is none."""
    entry = spelled(tmp_path).commit()
    assert (tmp_path / 'train.bin').read_bytes() == b'one--two words--three--the end'
    assert np.fromfile(tmp_path / 'train.index.bin', '<u8').tolist() == [0, 5, 16, 23]
    assert entry['documents'] == 4 and entry['text_bytes'] == entry['tokens'] == 30


@pytest.mark.parametrize('stop', range(len(DOCUMENTS) + 1))
def test_a_state_resumes_to_the_same_files(tmp_path, stop):
    """What was written after the state was saved is cut away."""
    whole = spelled(tmp_path / 'whole').commit()
    first = spelled(tmp_path / 'cut', stop=stop)
    state = first.state()
    first.begin_document()
    first.write(b'lost in the interruption')
    first.flush()
    assert spelled(tmp_path / 'cut', state, skip=stop).commit() == whole
    assert snapshot(tmp_path / 'cut') == snapshot(tmp_path / 'whole')


@pytest.mark.parametrize('limit', range(1, 31))
def test_a_limit_is_kept_to_the_token_and_ends_its_followers(tmp_path, limit):
    packed = spelled(tmp_path, limit=limit)
    follower = writer.PackedWriter(str(tmp_path), 'val', 'uint8', leader=packed)
    follower.begin_document()
    follower.write(b'more')
    packed.commit()
    follower.commit()
    assert (tmp_path / 'train.bin').read_bytes() == b'one--two words--three--the end'[:limit]
    assert packed.is_full and (tmp_path / 'val.bin').read_bytes() == b''
    starts = np.fromfile(tmp_path / 'train.index.bin', '<u8').tolist()
    assert starts == [start for start in (0, 5, 16, 23) if start < limit]


def letters():
    """Return a tokenizer whose ids are letters and 99 end-of-text."""
    lengths = np.array([1] * 99 + [0])
    return Tokenizer('letters', '', '', 99, lengths, decode=lambda ids: ''.join(chr(i + 32) for i in ids),
                     encode=lambda texts: [np.array([ord(c) - 32 for c in text]) for text in texts])


@pytest.mark.parametrize('batch', [1, 100, 1 << 20])
def test_the_queue_keeps_the_order_whatever_waits(tmp_path, monkeypatch, batch):
    """Two writers, batches of any size: ids, words and bytes; n_words is taken where it is given."""
    monkeypatch.setattr(writer, 'BATCH', batch)
    tok = letters()
    seen = []
    queue = writer.TokenQueue(tok, seen.append)
    packed = {split: writer.PackedWriter(str(tmp_path), split, 'uint16', tok, [tok.end]) for split in ('train', 'val')}
    for i, text in enumerate(DOCUMENTS):
        queue.add(packed['val' if i == 3 else 'train'], (text,), 'x', n_words=7 if i == 0 else None)
    queue.flush()
    entries = {split: packed[split].commit() for split in packed}
    ids = np.fromfile(tmp_path / 'train.bin', '<u2').tolist()
    assert ''.join('|' if i == 99 else chr(i + 32) for i in ids) == 'one|two words|the end'
    assert entries['train']['words'] == 7 + 2 + 2 and entries['val']['words'] == 1 and sum(seen) == 24
    assert entries['train']['text_bytes'] == 19 and entries['val']['text_bytes'] == 5


def test_resume_file_is_of_one_command(tmp_path):
    """Another identity, a broken file and none at all give no state."""
    resume = writer.ResumeFile(str(tmp_path), [('a', 1), dict(b=2)])
    assert resume.read() is None
    resume.save(dict(place=[1, 2]))
    assert writer.ResumeFile(str(tmp_path), [['a', 1], dict(b=2)]).read() == dict(place=[1, 2])
    assert writer.ResumeFile(str(tmp_path), [['a', 1], dict(b=3)]).read() is None
    for broken in ('{"of": [["a", 1', '[]', '{}'):
        (tmp_path / 'resume.json').write_text(broken)
        assert resume.read() is None
    resume.remove()
    resume.remove()
    assert not list(tmp_path.iterdir())


def test_cut_by_rank_gives_each_split_its_share():
    """ceil of the fraction, val first, one document at least trains; beyond FEW the range of the hash counts."""
    def read_of(i):
        return lambda: iter((b'%d' % i,))

    def sizes(n, val_share, test_share):
        documents = [('x', read_of(i)) for i in range(n)]
        limits = writer.thresholds(documents, val_share, test_share, seed=0)
        splits = [writer.split_at(writer.hash_of(read(), 0), *limits) for _, read in documents]
        return [splits.count(split) for split in ('train', 'val', 'test')]

    assert sizes(100, 0.1, 0.05) == [85, 10, 5] and sizes(100, 0, 0.5) == [100, 0, 0]
    assert sizes(3, 0.01, 0.01) == [1, 1, 1] and sizes(2, 0.01, 0.01) == [1, 1, 0]
    many = sizes(writer.FEW + 1000, 0.2, 0.1)
    assert 300 < many[1] < 500 and 130 < many[2] < 270 and sum(many) == writer.FEW + 1000
