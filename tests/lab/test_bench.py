"""lab/bench.py: every candidate still runs, rows have a baseline, a config's step is the one that it names."""
import json

import pytest
import torch
from conftest import TINY, make_text, run_here

import train
from codec.grid import Grid
from lab import bench
from model import ModelConfig, flops_per_token
from training.process import Env


@pytest.fixture
def env():
    return Env('cpu', 'float32')


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes are reduced, and kept are threads."""
    monkeypatch.setattr(bench, 'size_config', lambda name, block_size: ModelConfig(
        block_size=min(block_size, 256), n_layer=1, n_embd=16, n_head=2))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench_config(tmp_path, *lines):
    """Return the row that `lab.bench step` writes about a config."""
    path = tmp_path / 'c.py'
    path.write_text('\n'.join([*lines, 'n_layer = 1', 'n_head = 2', 'block_size = 16', 'batch_size = 2', '']))
    out = tmp_path / 'bench.json'
    assert run_here('lab/bench.py', 'step', str(path), '--pairs=2', f'--json_path={out}', '--device=cpu') == 0
    return json.loads(out.read_text())['step']['rows'][0]


def test_the_step_of_a_config_of_train_py(tmp_path):
    """Its row has a median, and the share of the device's rate that its tokens come to."""
    row = bench_config(tmp_path, '# python train.py c.py', 'n_embd = 16', "procedure = 'pmmp'")
    assert row['milliseconds'] > 0 and row['tokens_per_second'] > 0 and row['procedure'] == 'pmmp'
    assert row['percent_of_product'] == pytest.approx(
        row['tokens_per_second'] * flops_per_token(ModelConfig(block_size=16, n_layer=1, n_embd=16, n_head=2))
        / row['product_gflops'] / 1e7, rel=0.05)


def test_the_step_of_a_config_of_distill_py(toy, tmp_path):
    """With its teacher."""
    run_here('train.py', *TINY, f'--data_dir={toy}', '--dataset=toy', f'--out_dir={tmp_path / "teacher"}',
             '--max_iters=1', '--final_train_blocks=-1')
    row = bench_config(tmp_path, '# python distill.py c.py', f"teacher = {str(tmp_path / 'teacher')!r}", 'n_embd = 32')
    assert row['milliseconds'] > 0 and row['procedure'] == 'distillation'


@pytest.mark.parametrize('area, candidates', (
    ('procedures', ('vanilla', 'rl1', 'drr', 'pmmp', 'pmmp, lean', 'Muon', 'on a grid of 4 bits')),
    ('plain', 3 * ('plain', 'nanomdl')), ('mixture', ('one set', 'mixture of two')), ('data', ()), ('evaluation', ())))
def test_areas_have_ratios_to_a_baseline(area, candidates, env):
    """A candidate that no longer runs is noticed here, not when somebody measures."""
    rows = bench.AREAS[area](env, 2)
    assert not candidates or tuple(r['candidate'] for r in rows) == candidates
    assert any(r['candidate'] == r['baseline'] and r['ratio'] == 1 for r in rows)
    assert all(r['ratio'] > 0 and r['milliseconds'] > 0 for r in rows)


def test_the_table_keeps_other_areas(tmp_path, capsys):
    out = tmp_path / 'bench.json'
    out.write_text('{"mixer": 1}')
    assert run_here('lab/bench.py', 'data', '--pairs=2', f'--json_path={out}', '--device=cpu') == 0
    tables = json.loads(out.read_text())
    assert tables['mixer'] == 1 and tables['data']['rounds'] == 2
    assert '# lab.bench data: ' in capsys.readouterr().out


@pytest.mark.parametrize('options, running', [
    (dict(procedure='rl1'), train.RL1), (dict(procedure='drr'), train.DRR), (dict(procedure='pmmp'), train.PMMP),
    (dict(procedure='pmmp', pmmp_state='lean'), train.LeanPMMP), (dict(grid_bits=4), Grid),
    (dict(matrix_optimizer='muon'), None)], ids=str)
def test_a_step_trains_by_what_it_is_named_after(options, running, env, monkeypatch):
    """The same rows again cost less, and each step is edited by the procedure itself."""
    edited = []
    if running:
        real = running.edit
        monkeypatch.setattr(running, 'edit', lambda self: edited.append(type(self)) or real(self))
    step = bench.training_step(ModelConfig(block_size=16, n_layer=1, n_embd=16, n_head=2), env, 2, **options)
    first, *_ = step()
    for _ in range(5):
        last, *_ = step()
    assert last < first
    assert edited == [running] * 6 if running else not edited


def test_archives_of_a_file(tmp_path, toy, capsys):
    """Packed and unpacked with one and with two threads; the facts of its sections are printed."""
    run_here('train.py', *TINY, f'--data_dir={toy}', '--dataset=toy', f'--out_dir={tmp_path / "run"}', '--max_iters=2',
             '--final_train_blocks=-1')
    (tmp_path / 'text').write_bytes(make_text(300))
    rows = bench.bench_codec(str(tmp_path / 'run' / 'ckpt.pt'), str(tmp_path / 'text'), 4.0)
    assert [(r['what'], r['threads']) for r in rows] == [
        ('pack --no-verify', 1), ('pack --no-verify', 2), ('unpack', 1), ('unpack', 2)]
    assert '| bits_per_nonzero ' in capsys.readouterr().out
