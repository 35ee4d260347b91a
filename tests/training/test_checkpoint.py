"""training/checkpoint.py: checkpoints that are whole or refused, and run no code."""
import os

import pytest
import torch
from conftest import run_script, snapshot

from configurator import UserError
from training.checkpoint import CHECKPOINT_FORMAT, load_checkpoint, save_checkpoint


def checkpoint(path, **more):
    save_checkpoint(str(path), dict(model=dict(a=torch.arange(1000.0)), **more))
    return str(path)


def test_checkpoint_round_trip_and_keep_last(tmp_path):
    """Newest under the plain name, older ones numbered, nothing temporary left."""
    for step in range(4):
        save_checkpoint(str(tmp_path / 'ckpt.pt'), dict(step=step), keep_last=3)
    steps = {n: load_checkpoint(str(tmp_path / n))['step'] for n in os.listdir(tmp_path)}
    assert steps == {'ckpt.pt': 3, 'ckpt.pt.1': 2, 'ckpt.pt.2': 1}
    assert load_checkpoint(str(tmp_path))['step'] == 3     # a run folder stands for its ckpt.pt


@pytest.mark.parametrize('damage, words', [
    (lambda p: os.truncate(p, os.path.getsize(p) // 2), ('cut short or not a checkpoint', 'use an older one')),
    (lambda p: open(p, 'wb').write(b'PK\x03\x04 not a checkpoint'), ('cut short or not a checkpoint',)),
    (lambda p: open(p, 'wb').close(), ('cut short or not a checkpoint',)),
    (lambda p: torch.save(dict(model={}), p), ('None', 'nanomdl-ckpt-1')),
    (lambda p: torch.save([1, 2], p), ('nanomdl-ckpt-1',)),
    (lambda p: torch.save(dict(format='nanomdl-ckpt-2'), p), ("'nanomdl-ckpt-2'", 'nanomdl-ckpt-1')),
    (lambda p: os.remove(p), ('no checkpoint at', 'train.py')),
], ids='half foreign empty no-format list newer missing'.split())
def test_damaged_checkpoint_is_one_line(tmp_path, damage, words):
    """A checkpoint cut in half, foreign, newer or missing: one line, the file as it was."""
    path = checkpoint(tmp_path / 'ckpt.pt')
    damage(path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as e:
        load_checkpoint(path)
    assert '\n' not in str(e.value) and 'ckpt.pt' in str(e.value), str(e.value)
    assert all(w in str(e.value) for w in words), str(e.value)
    assert snapshot(tmp_path) == before


class Planted:
    """What a hostile checkpoint would hold."""

    def __reduce__(self):
        return os.mkdir, ('planted',)


def test_loading_runs_no_code(tmp_path, monkeypatch):
    """weights_only: a checkpoint from the net must not execute what it holds."""
    monkeypatch.chdir(tmp_path)
    torch.save(dict(format=CHECKPOINT_FORMAT, model=Planted()), 'evil.pt')
    with pytest.raises(UserError, match='evil.pt'):
        load_checkpoint('evil.pt')
    assert not os.path.exists('planted')


def test_failed_save_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    """A full disk in the middle of saving must not cost the checkpoint that is there."""
    path = checkpoint(tmp_path / 'ckpt.pt', step=1)
    before = snapshot(tmp_path)

    def full(value, where):
        with open(where, 'wb') as f:
            f.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(UserError, match='No space left.*previous checkpoint is untouched'):
        save_checkpoint(path, dict(step=2))
    assert snapshot(tmp_path) == before


FULL_DISK = """
import resource, sys
import torch
from configurator import run
from training.checkpoint import save_checkpoint
path = sys.argv[1]
save_checkpoint(path, dict(step=1, model=dict(a=torch.ones(1000))))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))       # a file system with no room for more
run(lambda: save_checkpoint(path, dict(step=2, model=dict(a=torch.ones(100_000)))))
"""


@pytest.mark.slow
def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A write that fails half-way must not cost what was there, nor leave its half behind."""
    (tmp_path / 'full.py').write_text(FULL_DISK)
    done = run_script(tmp_path / 'full.py', tmp_path / 'ckpt.pt')
    assert done.returncode == 1 and done.stderr.startswith('error: cannot save') and done.stderr.count('\n') == 1
    assert 'previous checkpoint is untouched' in done.stderr
    assert load_checkpoint(tmp_path / 'ckpt.pt')['step'] == 1
    assert not (tmp_path / 'ckpt.pt.tmp').exists()


def test_newer_format_says_to_update(tmp_path):
    torch.save(dict(format='nanomdl-ckpt-9'), tmp_path / 'a.pt')
    with pytest.raises(UserError, match='nanomdl-ckpt-9.*update this repository'):
        load_checkpoint(tmp_path / 'a.pt')
