"""codec/online.py and learner.py: a model that learns while it codes; states, machines and Ctrl-C."""
import os
import random
import signal

import pytest
import torch
from conftest import make_text, run_here

from codec import container, online
from codec.output import Output
from configurator import UserError

QUIET = '--no-progress'
ONLINE = ('--online_n_layer=1', '--online_n_embd=32', '--online_n_head=2', '--online_window=32', '--online_streams=4',
          '--online_block=32', '--online_updates=1', '--online_rows=4', '--online_dropout=0.1', QUIET)


def unpack(path, out, *flags):
    return run_here('compress.py', 'unpack', path, out, QUIET, *flags)


def archive_at(path):
    return container.read_archive(path.read_bytes(), 'it')


@pytest.mark.slow
def test_online_round_trip(tmp_path):
    """Learned while coding, decoded stepwise in a fresh process; smaller than the text; info shows what it rests on."""
    text = make_text(9000)
    (tmp_path / 'text').write_bytes(text)
    # A process of its own verifies.
    assert run_here('compress.py', 'online', tmp_path / 'text', tmp_path / 'arc', *ONLINE) == 0
    assert (tmp_path / 'arc').stat().st_size < 0.8 * len(text)
    kind, head, table, sections = archive_at(tmp_path / 'arc')
    assert kind == container.ONLINE and head['fingerprint']['torch'] == torch.__version__

    # The archive of a machine that trains other weights.
    head['fingerprint'].update(weights='', processor='another')
    blocks = [container.Block(entry.form, entry.n_symbols, data, b'')
              for entry, data in container.Archive(kind, head, table, sections).blocks()]
    with Output(str(tmp_path / 'other')) as out:
        container.write_archive(out, kind, head, {}, blocks)
        out.commit()
    with pytest.raises(UserError, match='another there'):
        unpack(tmp_path / 'other', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('block_type', ['mixer', 'multihead_mixer'])
def test_mixers_learn_online(tmp_path, block_type):
    """Mixers learn while they code as well; a window they cannot have is one line."""
    text, flags = make_text(8000), ('--no-verify', *ONLINE, '--online_updates=3', f'--online_block_type={block_type}')
    (tmp_path / 'text').write_bytes(text)
    assert run_here('compress.py', 'online', tmp_path / 'text', tmp_path / 'arc', *flags) == 0
    assert unpack(tmp_path / 'arc', tmp_path / 'out') == 0 and (tmp_path / 'out').read_bytes() == text
    _, head, table, *_ = archive_at(tmp_path / 'arc')
    assert head['settings']['args']['block_type'] == block_type
    assert table[0][0] == container.CODED and table[0][2] < 0.7 * len(text)
    with pytest.raises(UserError, match='block_size = 33, a mixer\'s must be even'):
        run_here('compress.py', 'online', tmp_path / 'text', tmp_path / 'odd', *flags, '--online_window=33')


@pytest.mark.parametrize('raw', [b'', b'x', random.Random(3).randbytes(3001)], ids=['empty', 'one', 'noise'])
def test_online_edge_cases(tmp_path, raw):
    (tmp_path / 'text').write_bytes(raw)
    assert run_here('compress.py', 'online', tmp_path / 'text', tmp_path / 'arc', '--no-verify', *ONLINE) == 0
    assert unpack(tmp_path / 'arc', tmp_path / 'out') == 0 and (tmp_path / 'out').read_bytes() == raw
    assert (tmp_path / 'arc').stat().st_size <= 1.005 * len(raw) + 1000


def test_online_resumes(tmp_path, monkeypatch):
    """Coding and decoding that stop after a segment go on from the saved state to the same bytes."""
    monkeypatch.setattr(online, 'SEGMENT_SYMBOLS', 1000)
    text = make_text(4500)
    (tmp_path / 'text').write_bytes(text)
    make = ['online', tmp_path / 'text', tmp_path / 'arc', '-f', '--no-verify', *ONLINE]
    assert run_here('compress.py', *make) == 0
    whole, saved = (tmp_path / 'arc').read_bytes(), f'--state={tmp_path / "state"}'
    save = online.Session.save

    def save_and_stop(session):
        save(session)
        if len(session.blocks) == 2:
            raise KeyboardInterrupt

    read = ['unpack', tmp_path / 'arc', tmp_path / 'out', QUIET]
    for command, result, want in ((make, 'arc', whole), (read, 'out', text)):
        monkeypatch.setattr(online.Session, 'save', save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run_here('compress.py', *command, saved)
        assert (tmp_path / 'state').exists()
        monkeypatch.setattr(online.Session, 'save', save)
        with pytest.raises(UserError, match='belongs to another file'):
            run_here('compress.py', *make, saved, '--online_seed=5')
        assert run_here('compress.py', *command, saved) == 0 and not (tmp_path / 'state').exists()
        assert (tmp_path / result).read_bytes() == want


def press(monkeypatch, block, times=1):
    """Press Ctrl-C while the given block of an online archive (from 1) is learned."""
    real, learned = online.Learner.learn, []

    def learn(*args):
        learned.append(args)
        for _ in range(times if len(learned) == block else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(online.Learner, 'learn', learn)


@pytest.mark.parametrize('block', (1, 7, 20))
def test_ctrl_c_saves_the_state_of_online_coding(tmp_path, monkeypatch, capsys, block):
    """Coding and decoding: the segment is finished and saved, a line says how to go on, the bytes are the same."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(online, 'SEGMENT_SYMBOLS', 1000)
    text, state = make_text(4500), tmp_path / 'state'
    (tmp_path / 'text').write_bytes(text)
    make = ['online', tmp_path / 'text', tmp_path / 'arc', '--no-verify', *ONLINE]
    assert run_here('compress.py', *make) == 0
    whole = (tmp_path / 'arc').read_bytes()
    os.remove(tmp_path / 'arc')
    read = ['unpack', tmp_path / 'arc', tmp_path / 'out', QUIET]
    for command, result, want in ((make, 'arc', whole), (read, 'out', text)):
        with monkeypatch.context() as patch:
            press(patch, block)
            left = run_here('compress.py', *command, f'--state={state}')
        shown = capsys.readouterr().err
        assert left == 85 and state.exists() and not (tmp_path / result).exists()
        assert 'of 4,500 bytes; the same command goes on' in shown and str(state) in shown
        assert sorted(p.name for p in tmp_path.iterdir() if '.tmp' in p.name) == []
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert run_here('compress.py', *command, f'--state={state}') == 0 and not state.exists()
        assert (tmp_path / result).read_bytes() == want


def test_a_second_ctrl_c_leaves_online_coding_at_once(tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (tmp_path / 'text').write_bytes(make_text(4500))
    press(monkeypatch, 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        run_here('compress.py', 'online', tmp_path / 'text', tmp_path / 'arc', f'--state={tmp_path / "state"}',
                 *ONLINE)
    assert sorted(os.listdir(tmp_path)) == ['text']
