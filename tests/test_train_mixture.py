"""train.py on a mixture: shares, resuming, ranks, the end where a source is exhausted, refusals."""
import csv
import json
import os

import pytest
import torch
from conftest import TINY, OneProcess, write_dataset

import train
from configurator import UserError
from corpus import mixture
from corpus.data import open_mixture
from training import process
from training.checkpoint import load_checkpoint
from training.folder import read_run


@pytest.fixture
def train_mix(tmp_path):
    """Call train.main on 'a:0.75,b:0.25' (128 and 64 blocks of 32); returns the run folder. Later flags win."""
    write_dataset(str(tmp_path / 'data'), 'a')
    write_dataset(str(tmp_path / 'data'), 'b', sizes=(2048, 1000, 300))

    def call(*flags, out='run', status=0):
        assert train.main([*TINY, f'--data_dir={tmp_path / "data"}', '--data_mix=a:0.75,b:0.25', '--max_iters=12',
                           f'--out_dir={tmp_path / out}', '--log_interval=4', *flags]) == status
        return str(tmp_path / out)
    return call


def test_a_run_draws_its_shares_and_records_them(train_mix, tmp_path):
    folder = train_mix('--max_iters=125')                   # 1,000 rows: exact
    drawn = {'a': 750 * 32, 'b': 250 * 32}
    checkpoint, record = load_checkpoint(folder), read_run(folder)
    assert checkpoint['drawn'] == record['drawn'] == drawn and checkpoint['tokens'] == 32_000
    assert record['data']['dataset'] == 'a:0.75,b:0.25' and record['mean_train_loss'] < 5 and record['mean_test_loss']
    with open(os.path.join(folder, 'log.txt')) as f:
        assert 'drawn_a=24000 drawn_b=8000' in f.read()
    with open(os.path.join(folder, 'train_loss.csv')) as f:
        assert [int(r['tokens']) for r in csv.DictReader(f)] == list(range(256, 32_001, 256))   # equal tokens
    best = load_checkpoint(os.path.join(folder, 'best.pt'))
    assert best['drawn'] == drawn


@pytest.mark.parametrize('stop', [1, 7])
def test_a_resumed_run_equals_an_unbroken_one(stop, train_mix, monkeypatch):
    whole = load_checkpoint(train_mix('--dropout=0.1', out='whole'))
    real = train.rate_at

    def rate(step, *more):
        if step == stop:
            os.kill(os.getpid(), 10)                        # SIGUSR1: save at the end of this step
        return real(step, *more)
    monkeypatch.setattr(train, 'rate_at', rate)
    train_mix('--dropout=0.1', status=85)
    monkeypatch.setattr(train, 'rate_at', real)
    mine = load_checkpoint(train_mix('--dropout=0.1', '--init_from=resume'))
    for name, tensor in whole['model'].items():
        assert torch.equal(tensor, mine['model'][name])
    assert json.dumps(whole['drawn']) == json.dumps(mine['drawn'])
    with pytest.raises(UserError, match='cannot resume: sha256'):
        train_mix('--init_from=resume', '--data_mix=a:0.5,b:0.5', '--max_iters=20', '--overwrite', status=85)


@pytest.mark.parametrize('world', (1, 2, 4))
def test_ranks_share_the_rows_of_a_mixture(world, train_mix, monkeypatch):
    """The loop's own slices, put together in the order of ranks, are what one process draws."""
    seen, real = {}, mixture.Mixture.gather

    def gather(self, starts, length):
        if self.split == 'train':
            seen.setdefault(rank, []).append(starts.tolist())
        return real(self, starts, length)
    monkeypatch.setattr(mixture.Mixture, 'gather', gather)
    for rank in range(world):
        monkeypatch.setattr(process, 'Env', lambda *more, rank=rank: OneProcess(rank, world))
        train_mix('--max_iters=3', '--final_train_blocks=0', f'--micro_batch_size={8 // world}', '--overwrite')
    rows = [sum((seen[rank][step] for rank in range(world)), []) for step in range(3)]
    data = open_mixture(train.data_dir, 'a:0.75,b:0.25', 'train', 32)
    assert rows == [data.starts('permuted', 858, 0, 0, step, 8, 32).tolist() for step in range(3)]


def test_the_run_ends_where_the_first_source_is_exhausted(train_mix, capsys):
    """a has 128 blocks and 6 rows of 8 come from it: about 21 steps, known before the first."""
    folder = train_mix('--max_iters=500', '--stop_when=first_exhausted')
    n_steps = read_run(folder)['n_steps']
    assert 18 < n_steps < 25 and load_checkpoint(folder)['step'] == n_steps
    drawn = load_checkpoint(folder)['drawn']
    assert 120 * 32 <= drawn['a'] <= 4096 and f'the run has {n_steps} steps' in capsys.readouterr().out
    assert load_checkpoint(train_mix('--max_iters=500', out='on'))['step'] == 500
    train_mix('--check', '--max_iters=500', '--stop_when=first_exhausted', out='none', status=None)
    assert f'main                  {n_steps} steps of vanilla' in capsys.readouterr().out


def test_pruning_calibrates_on_all_sources(train_mix, monkeypatch):
    import score
    seen, real = [], score.score

    def spy(model, data, *more, **named):
        seen.append((data.split, getattr(data, 'blocks', ())))
        return real(model, data, *more, **named)
    monkeypatch.setattr(score, 'score', spy)
    monkeypatch.setattr('sparse.CALIBRATION_BLOCKS', 8)
    train_mix('--do_pruning', '--procedure=rl1', '--eval_blocks=4', '--final_train_blocks=0')
    assert seen.count(('val', (6, 2))) == 25 and seen.count(('val', (3, 1))) == 1


@pytest.mark.parametrize('flags, words', [
    (['--order=random'], 'order = .permuted.'), (['--online'], 'no --online'),
    (['--stop_when=later'], 'first_exhausted'),
    (['--data_mix=a,none'], "no data set 'none'"), (['--data_mix=a:-1'], 'weight of a is -1'),
    (['--train_only_on_leading_tokens=6000'], 'has 5,461; use 0'), (['--batch_size=4096'], 'fewer than batch')])
def test_bad_mixture_is_one_line_and_makes_nothing(flags, words, train_mix, tmp_path):
    with pytest.raises(UserError, match=words):
        train_mix(*flags)
    assert not os.path.exists(tmp_path / 'run')
