"""Flipped bits in checkpoints, and files that are not what torch.save writes: one line each, nothing resumed from."""
import os
import random
import shutil
import zipfile
import zlib

import pytest
import torch
from conftest import same

from configurator import UserError
from training import untrusted
from training.checkpoint import load_checkpoint, save_checkpoint


def refused(path, *words):
    """Assert that a checkpoint is refused in one line with these words; returns the line."""
    with pytest.raises(UserError) as e:
        load_checkpoint(path)
    line = str(e.value)
    assert '\n' not in line and os.path.basename(path) in line and all(word in line for word in words), line
    return line


def flip(path, place, bit):
    """Change one bit of a file."""
    with open(path, 'r+b') as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 1 << bit]))


def small_checkpoint(path):
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(40, generator=generator)
    return save_checkpoint(path, dict(step=3, model=dict(a=torch.ones(3)), optimizer=dict(moments=moments)))


def payload_of(path):
    """Return the places of the bytes that a zip's parts consist of."""
    places = []
    with zipfile.ZipFile(path) as archive, open(path, 'rb') as f:
        for entry in archive.infolist():
            f.seek(entry.header_offset + 26)
            name, extra = (int.from_bytes(f.read(2), 'little') for _ in range(2))
            start = entry.header_offset + 30 + name + extra
            places += range(start, start + entry.file_size)
    return places


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    """torch compares no checksum: a flipped bit in the optimiser was resumed from. One bit of every byte of the parts.

    What lies between the parts is padding, dates and names; a bit there is refused too, or changes nothing.
    """
    path = str(tmp_path / 'ckpt.pt')
    small_checkpoint(path)
    whole, payload, rng = load_checkpoint(path), payload_of(path), random.Random(0)
    assert len(payload) > 500
    for place in payload:
        bit = rng.randrange(8)
        flip(path, place, bit)
        refused(path, 'use an older one')
        flip(path, place, bit)
    for place in sorted(set(range(os.path.getsize(path))) - set(payload))[::5]:
        bit = rng.randrange(8)
        flip(path, place, bit)
        try:
            assert same(load_checkpoint(path), whole)
        except UserError as e:
            assert '\n' not in str(e)
        flip(path, place, bit)
    assert same(load_checkpoint(path), whole)


def test_a_flipped_bit_names_the_older_checkpoints(train_tiny, tmp_path):
    """Resuming from a damaged ckpt.pt: one line with what can be used instead, which then works."""
    flags = ('--max_iters=4', '--final_train_blocks=0')
    assert train_tiny(*flags) == 0
    run = tmp_path / 'run'
    shutil.copy(run / 'ckpt.pt', run / 'ckpt.pt.1')
    shutil.copy(run / 'ckpt.pt', run / 'best.pt')
    moment = next(iter(load_checkpoint(run)['optimizer'][0]['state'].values()))['exp_avg']
    content = (run / 'ckpt.pt').read_bytes()
    flip(run / 'ckpt.pt', content.index(moment.numpy().tobytes()[:64]), 3)
    with pytest.raises(UserError) as e:
        train_tiny(*flags, '--init_from=resume')
    line = str(e.value)
    assert '\n' not in line and f'({run}/best.pt, {run}/ckpt.pt.1)' in line and 'CRC' in line, line
    assert load_checkpoint(run / 'ckpt.pt.1')['step'] == 4


def test_a_compressed_or_overfull_zip_is_refused(tmp_path):
    """A few kilobytes that unpack to any size are read in no memory at all."""
    path = str(tmp_path / 'ckpt.pt')
    small_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    refused(path, 'compressed')


def test_crc_of_a_file_is_zlibs(tmp_path):
    """Files longer than what is read at once."""
    content = random.Random(0).randbytes(untrusted.CHUNK + 5)
    (tmp_path / 'a').write_bytes(content)
    assert untrusted.crc_of(tmp_path / 'a') == zlib.crc32(content)
