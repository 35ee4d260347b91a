"""compress.py: what goes in comes out, from any process and setting; damage of any kind is one clear error."""
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_text, run_here, run_script

import compress
from codec import container, twopart
from codec.output import Output
from configurator import UserError
from model import GPT, ModelConfig, make, model_args
from training.checkpoint import load_checkpoint, save_checkpoint

QUIET = '--no-progress'


def trained(path, text, steps=120, tokenizer='byte', **options):
    """Save the checkpoint of a small GPT trained on ids for a second; returns its path."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(dict(block_size=32, n_layer=1, n_head=2, n_embd=32) | options)))
    opt, ids = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.tensor(list(text))
    for step in range(steps):
        at = (torch.arange(8) * 997 + step * 131) % (len(ids) - 33)
        both = ids[at[:, None] + torch.arange(33)]
        opt.zero_grad()
        (model(both[:, :-1], both[:, 1:]) / 256).backward()
        opt.step()
    save_checkpoint(path, dict(model=model.state_dict(), model_args=model_args(model), masks={},
                               data=dict(dataset='toy', sha256='', start_id=10, tokenizer=tokenizer)))
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with ckpt.pt, a text that its model knows, and an archive of it coded in 25 streams."""
    folder = tmp_path_factory.mktemp('codec')
    (folder / 'text').write_bytes(make_text(6000))
    trained(str(folder / 'ckpt.pt'), make_text(20000))
    assert pack(folder, 'text', 'archive', '--streams=25', '--block_bytes=2200', '--weight_bits=6') == 0
    return folder


def pack(folder, name, out, *flags):
    paths = [str(folder / p) for p in ('ckpt.pt', name, out)]
    return run_here('compress.py', 'pack', *paths, '--no-verify', QUIET, *flags)


def unpack(path, out, *flags):
    return run_here('compress.py', 'unpack', str(path), str(out), QUIET, *flags)


def sections_of(path):
    kind, head, table, sections = container.read_archive(path.read_bytes(), 'it')
    return kind, head, table, {n: s for n, s in sections.items() if n not in ('head', 'blks', 'data')}, sections['data']


def rewrite(source, out, change):
    """Write an archive again, CRCs and all, after change(head, sections)."""
    kind, head, table, sections, data = sections_of(source)
    change(head, sections)
    blocks = []
    for entry, part in container.Archive(kind, head, table, dict(data=data)).blocks():
        blocks.append(container.Block(entry.form, entry.n_symbols, part, b''))
    with Output(str(out)) as f:
        container.write_archive(f, kind, head, sections, blocks)
        f.commit()
    return out


# --- round trips ---

@pytest.mark.parametrize('flags', [(), ('--streams_at_once=7',), ('--streams_at_once=1', '--threads=2')])
def test_unpack_settings_do_not_matter(folder, tmp_path, flags):
    assert unpack(folder / 'archive', tmp_path / 'out', *flags) == 0
    assert (tmp_path / 'out').read_bytes() == (folder / 'text').read_bytes()
    torch.set_num_threads(1)


def test_archive_is_small_and_its_size_is_honest(folder, capsys):
    """The model pays off on its own text; the code length computed is the file's size within 0.1 % + 1 kB."""
    with Output(str(folder / 'again')) as out:
        options = twopart.Packing(weight_bits=6, streams=25)
        raw, computed = twopart.pack(str(folder / 'ckpt.pt'), str(folder / 'text'), out, options)
        assert abs(out.size - computed) <= 0.001 * out.size + 1000 and len(raw) == 6000
    _, _, table, _, data = sections_of(folder / 'archive')
    assert [b[0] for b in table] == [container.CODED] * 3 and len(data) < 0.5 * 6000


@pytest.mark.slow
def test_fresh_processes_with_other_settings(folder, tmp_path):
    """Pack verifies in a process of its own; two threads give the same archive; pipes carry archive and text."""
    done = run_script('compress.py', 'pack', folder / 'ckpt.pt', folder / 'text', tmp_path / 'a', '--threads=2',
                      '--streams=25', '--block_bytes=2200', '--weight_bits=6')
    assert done.returncode == 0 and 'verified' in done.stderr, done.stderr
    assert (tmp_path / 'a').read_bytes() == (folder / 'archive').read_bytes()
    assert os.listdir(tmp_path) == ['a']
    command = [sys.executable, os.path.join(ROOT, 'compress.py'), 'unpack', '-', '-', '--streams_at_once=3']
    piped = subprocess.run(command, input=(tmp_path / 'a').read_bytes(), capture_output=True, timeout=1800)
    assert piped.returncode == 0 and piped.stdout == (folder / 'text').read_bytes(), piped.stderr


@pytest.mark.parametrize('options', [
    dict(block_type='mixer', positions='none', final_norm=False), dict(block_type='multihead_mixer', positions='none'),
    dict(block_type='mixer', n_layer=2, norm='rmsnorm'),
    dict(block_type='multihead_mixer', positions='none', final_norm=False, expansion=2)], ids=str)
def test_mixers_are_packed(tmp_path, options):
    """Flat, with heads and expanded, pruned: the text comes back with other streams at once, and is small."""
    trained(str(tmp_path / 'ckpt.pt'), make_text(20000), **options)
    checkpoint = load_checkpoint(str(tmp_path / 'ckpt.pt'))
    for name, w in checkpoint['model'].items():
        if w.dim() == 2 and 'embed' not in name:
            w *= w.abs() >= w.abs().flatten().kthvalue(w.numel() // 3).values
    save_checkpoint(str(tmp_path / 'ckpt.pt'), checkpoint)
    (tmp_path / 'text').write_bytes(make_text(6000))
    assert pack(tmp_path, 'text', 'archive', '--streams=9', '--weight_bits=6') == 0
    assert unpack(tmp_path / 'archive', tmp_path / 'out', '--streams_at_once=4') == 0
    assert (tmp_path / 'out').read_bytes() == (tmp_path / 'text').read_bytes()
    assert len(sections_of(tmp_path / 'archive')[4]) < 0.6 * 6000


@pytest.mark.parametrize('options, message', [
    (dict(kernel=3), 'kernel = 3'), (dict(wrapper='oracle'), "wrapper = 'oracle'"),
    (dict(wrapper='memory', chunk_size=8), "wrapper = 'memory', chunk_size = 8")])
def test_what_is_not_packed(tmp_path, options, message):
    """Wider kernels and models with an encoder: one line, no archive."""
    model = make(ModelConfig(block_size=32, n_layer=1, n_embd=32, block_type='mixer', positions='none', **options))
    save_checkpoint(str(tmp_path / 'ckpt.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={},
        data=dict(dataset='toy', sha256='', start_id=10, tokenizer='byte')))
    (tmp_path / 'text').write_bytes(b'abc' * 50)
    with pytest.raises(UserError, match=f'the codec does not cover models with {message}'):
        pack(tmp_path, 'text', 'archive')
    assert not (tmp_path / 'archive').exists()


EDGES = dict(
    empty=b'', one=b'x', two=b'ab', equal=b'\0' * 1500, all_bytes=bytes(range(256)) * 3,
    utf8='žluťoučký kůň 馬 🐎\n'.encode() * 40, noise=random.Random(1).randbytes(8000),
    mixed=make_text(4200) + random.Random(2).randbytes(4200))


@pytest.mark.parametrize('name', EDGES)
def test_edge_cases(folder, tmp_path, name):
    """Files of every kind come back; what the model would expand is stored."""
    raw = EDGES[name]
    (folder / name).write_bytes(raw)
    assert pack(folder, name, name + '.arc', '--block_bytes=4096', '--weight_bits=6', '--streams=25') == 0
    assert unpack(folder / (name + '.arc'), tmp_path / 'out') == 0
    assert (tmp_path / 'out').read_bytes() == raw
    _, head, table, sections, data = sections_of(folder / (name + '.arc'))
    assert len(data) <= len(raw) and (sections or all(b[0] == container.STORED for b in table))
    if name == 'noise':
        assert not sections and (folder / 'noise.arc').stat().st_size <= 1.005 * len(raw) + 200
    if name == 'mixed':
        assert {b[0] for b in table} == {container.CODED, container.STORED}


def test_more_streams_than_bytes(folder, tmp_path):
    (folder / 'short').write_bytes(b'the model weighs nothing until')
    assert pack(folder, 'short', 'short.arc', '--streams=64', '--weight_bits=6') == 0
    assert unpack(folder / 'short.arc', tmp_path / 'out') == 0
    assert (tmp_path / 'out').read_bytes() == b'the model weighs nothing until'


def test_fewest_bytes_in_all(folder):
    """weight_bits = 0 chooses steps with which weights + data are smaller than with any fixed number of bits."""
    assert pack(folder, 'text', 'best', '--streams=25') == 0
    for bits in (2, 4, 8):
        assert pack(folder, 'text', 'fixed', '-f', '--streams=25', f'--weight_bits={bits}') == 0
        assert (folder / 'best').stat().st_size <= 1.01 * (folder / 'fixed').stat().st_size


def test_a_model_not_worth_its_bytes(folder, tmp_path):
    """For a text of a few bytes the fewest bytes are no model at all: the text is stored."""
    (folder / 'few').write_bytes(b'nothing until a byte')
    assert pack(folder, 'few', 'few.arc') == 0
    assert (folder / 'few.arc').stat().st_size < 300 and not sections_of(folder / 'few.arc')[3]
    assert unpack(folder / 'few.arc', tmp_path / 'out') == 0
    assert (tmp_path / 'out').read_bytes() == b'nothing until a byte'


def test_bpe_model(folder, tmp_path):
    """A byte-level BPE model: bytes in, bytes out, the byte strings inside; text it cannot reproduce is refused."""
    from tokenizers import ByteLevelBPETokenizer
    tokenizer, path = ByteLevelBPETokenizer(), str(tmp_path / 'bpe.json')
    tokenizer.train_from_iterator([make_text(20000).decode()], vocab_size=300, show_progress=False)
    tokenizer.save(path)
    trained(str(tmp_path / 'ckpt.pt'), tokenizer.encode(make_text(20000).decode()).ids, tokenizer=path, vocab_size=300)
    (tmp_path / 'text').write_bytes(make_text(3000, seed=3) + 'é'.encode())
    assert pack(tmp_path, 'text', 'arc', '--weight_bits=6', '--streams=16') == 0
    os.rename(path, path + '.gone')
    assert unpack(tmp_path / 'arc', tmp_path / 'out') == 0
    assert (tmp_path / 'out').read_bytes() == (tmp_path / 'text').read_bytes()
    assert sections_of(tmp_path / 'arc')[2][0][0] == container.CODED
    os.rename(path + '.gone', path)
    (tmp_path / 'text').write_bytes(b'not utf-8: \xff')
    with pytest.raises(UserError, match='not UTF-8'):
        pack(tmp_path, 'text', 'arc2')


def test_models_that_cannot_be_packed(folder):
    """Broken weights and unknown kinds of model are one line, before anything is written."""
    checkpoint = torch.load(folder / 'ckpt.pt', weights_only=True)
    checkpoint['model']['blocks.0.feed_forward.up.weight'][3, 4] = float('nan')
    torch.save(checkpoint, folder / 'nan.pt')
    checkpoint['model_args'] |= dict(mixer='masked')
    torch.save(checkpoint, folder / 'kind.pt')
    for name, message in (('nan.pt', 'not finite'), ('kind.pt', "does not cover models with mixer = 'masked'")):
        with pytest.raises(UserError, match=message):
            run_here('compress.py', 'pack', folder / name, folder / 'text', folder / 'none', QUIET)
    assert not (folder / 'none').exists()


def test_info_and_verify(folder, capfd):
    assert run_here('compress.py', 'info', folder / 'archive') == 0
    shown = capfd.readouterr().out
    assert 'two-part' in shown and 'per non-zero' in shown and 'bits per byte' in shown
    assert run_here('compress.py', 'verify', folder / 'archive', folder / 'text', QUIET) == 0
    (folder / 'other').write_bytes(make_text(6000)[:-1] + b'!')
    with pytest.raises(UserError, match='decodes to something else'):
        run_here('compress.py', 'verify', folder / 'archive', folder / 'other', QUIET)


# --- damage ---

def damaged(raw, rng):
    """One random change: a byte, a truncation, an extension."""
    kind = rng.randrange(4)
    if kind == 0:
        return raw[:rng.randrange(len(raw))]
    if kind == 1:
        return raw + rng.randbytes(rng.randint(1, 50))
    at = rng.randrange(120) if kind == 2 else rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ rng.randint(1, 255)]) + raw[at + 1:]


def test_fuzz(folder, tmp_path):
    """2,000 changes: each a UserError of one line, nothing left behind."""
    raw = (folder / 'archive').read_bytes()
    rng = random.Random(4)
    quiet = SimpleNamespace(**dict(compress.config, progress=False))
    for _ in range(2000):
        (tmp_path / 'bad').write_bytes(damaged(raw, rng))
        with pytest.raises(UserError) as e:
            compress.unpack(str(tmp_path / 'bad'), str(tmp_path / 'out'), quiet)
        assert '\n' not in str(e.value)
    assert os.listdir(tmp_path) == ['bad']


@pytest.mark.slow
def test_fuzz_as_a_program(folder, tmp_path):
    """Ten changes: exit code 1 and one line."""
    raw = (folder / 'archive').read_bytes()
    rng = random.Random(5)
    for _ in range(10):
        (tmp_path / 'bad').write_bytes(damaged(raw, rng))
        done = run_script('compress.py', 'unpack', tmp_path / 'bad', tmp_path / 'out')
        assert done.returncode == 1 and done.stderr.startswith('error: '), done.stderr
        assert done.stderr.count('\n') == 1
    assert os.listdir(tmp_path) == ['bad']


@pytest.mark.parametrize('change, message', [
    (lambda h, s: h.update(streams=10 ** 9), 'more than it can need'),
    (lambda h, s: h['args'].update(n_embd=1 << 40, n_head=1), 'more than it can need'),
    (lambda h, s: h['args'].update(n_layer=10 ** 7), 'more than it can need'),
    (lambda h, s: h['args'].update(block_size=10 ** 9), 'more than it can need'),
    (lambda h, s: h['args'].update(norm='other'), 'norm'),
    (lambda h, s: h.pop('sites'), 'no packer writes'),
    (lambda h, s: h.update(sites=[]), 'scales and'),
    (lambda h, s: h.update(arithmetic='0'), 'requirements.txt'),
    (lambda h, s: s.update(wght=s['wght'][:400]), 'archive'),
    (lambda h, s: h.update(keep=0), 'keep'),
    (lambda h, s: h.update(keep=33), 'keep'),
])
def test_forged_archives(folder, tmp_path, change, message):
    """Headers that pass every CRC and make no sense are refused, before memory is taken, with nothing written."""
    bad = rewrite(folder / 'archive', tmp_path / 'bad', change)
    with pytest.raises(UserError, match=message):
        unpack(bad, tmp_path / 'out')
    assert os.listdir(tmp_path) == ['bad']


@pytest.mark.parametrize('change', [lambda h, s: h.pop('sha256'), lambda h, s: s.update(wght=s['wght'][:400])])
def test_info_of_a_forged_archive(folder, tmp_path, change):
    bad = rewrite(folder / 'archive', tmp_path / 'bad', change)
    with pytest.raises(UserError, match='archive'):
        run_here('compress.py', 'info', bad)


def test_foreign_and_newer_files(folder, tmp_path):
    for raw, message in ((b'PK\x03\x04' * 9, 'not a nanoMDL archive'), (b'', 'not a nanoMDL'),
                         (b'nMDL\x07' + b'\0' * 20, 'version 7')):
        (tmp_path / 'bad').write_bytes(raw)
        with pytest.raises(UserError, match=message):
            unpack(tmp_path / 'bad', tmp_path / 'out')
    with pytest.raises(UserError, match='cannot read'):
        unpack(tmp_path / 'missing', tmp_path / 'out')
    with pytest.raises(UserError, match='cannot write'):
        unpack(folder / 'archive', tmp_path / 'no' / 'folder')
