"""plots.py: what is drawn equals what the runs say, what cannot be drawn is said, all from run folders made here."""
import io
import os

import matplotlib
import numpy as np
import pytest
from conftest import run_here, run_script

import plots
from configurator import UserError
from corpus.bins import write_json
from training import curves
from training.folder import read_run

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

N = 100_000                                     # bytes of the training split
LN2 = np.log(2)


def make_run(folder, bits=4.0, model_bytes=5000, nonzeros=10, log=True, prunings=(), **more):
    """Write a run folder: a loss that falls from 8 bits to `bits` in 40 steps of 1,000 tokens, 2 s each."""
    os.makedirs(folder, exist_ok=True)
    record = dict(run_id=os.path.basename(folder), status='done', procedure='vanilla', alpha=0.0, n_params=100,
                  final_train_blocks=0, train_data_bytes=round(bits * N / 8), train_bits_per_byte=bits,
                  model_byte_size=4 * nonzeros, non_zero_params=nonzeros, bits_est_bytes=model_bytes,
                  data=dict(dataset='toy', sha256='5' * 64), parent={}, flops_per_token=60, batch_size=10,
                  seq_length=100)
    write_json(os.path.join(folder, 'run.json'), record | more)
    if log:
        with open(os.path.join(folder, 'train_loss.csv'), 'w', encoding='utf-8') as f:
            f.write('phase,epoch,step,tokens,loss_nats,lr,grad_norm,grad_norm_penalised,nonzeros,seconds\n')
            for step in range(1, 41):
                nats = (bits + (8 - bits) / step) * LN2
                f.write(f'main,0,{step},{1000 * step},{nats:.6f},0.001,1,1,100,{2 * step}\n')
        with open(os.path.join(folder, 'log.txt'), 'w', encoding='utf-8') as f:
            for step in (20, 40):
                nats = (bits + 0.1) * LN2
                f.write(f'23:59:5{step // 20} train phase=main epoch=0 step={step} loss={nats:.5f} bpb={nats / LN2:.4f}'
                        f' lr=0.001 grad_norm=1 nonzeros=100 tokens_per_second=500\n')
                f.write(f'00:00:0{step // 20} val phase=main step={step} loss={nats:.5f} bpb={nats / LN2:.4f}\n')
            for step in prunings:
                f.write(f'00:00:05 prune by=magnitude phase=main step={step} epsilon=0.02 loss_before=1 loss_after=1\n')
    return str(folder)


@pytest.fixture(autouse=True)
def default_look():
    """plots.py in another test leaves its look; draw with matplotlib's."""
    matplotlib.rcdefaults()


@pytest.fixture
def sweep(tmp_path):
    """Unpruned, TAMADE only, three alphas of pmmp, one of them with two seeds."""
    out = tmp_path / 'out'
    make_run(out / 'vanilla', 3.0, 60_000, 100)
    make_run(out / 'tamade', 3.1, 40_000, 50, prunings=[20])
    for alpha, bits, size in ((1e-6, 3.2, 30_000), (1e-5, 3.3, 20_000), (1e-4, 4.0, 9_000)):
        make_run(out / f'pmmp_{alpha}', bits, size, 20, procedure='pmmp', alpha=alpha, prunings=[20, 30])
    make_run(out / 'pmmp_1e-05_b', 3.5, 22_000, 20, procedure='pmmp', alpha=1e-5)
    return out


def points_of(folder, size='bits_est'):
    folders = [str(p.parent) for p in sorted(folder.glob('*/run.json'))]
    found = [plots.read_point(read_run(p), None, size) for p in folders]
    return [p for p in found if p]


def test_three_figures_in_two_forms(sweep, tmp_path, capsys):
    """A sweep gives all three, each as PNG and PDF, and names the files."""
    assert run_here('plots.py', str(sweep / '*'), f'--plot_dir={tmp_path / "fig"}', '--dpi=40') == 0
    names = [f'{n}.{e}' for n in ('alpha_toy', 'size_toy', 'training_curves') for e in ('pdf', 'png')]
    assert sorted(os.listdir(tmp_path / 'fig')) == names
    for name in names:
        start = (tmp_path / 'fig' / name).read_bytes()[:4]
        assert start == (b'%PDF' if name.endswith('pdf') else b'\x89PNG')
    assert 'skipped' not in capsys.readouterr().out and not plt.get_fignums()


def test_without_paths_every_run_of_out(sweep):
    """python plots.py reads out/, other folders in it are passed over; the size is the one asked for."""
    (sweep / 'plots').mkdir()
    assert run_here('plots.py', f'--out={sweep}', f'--plot_dir={sweep / "plots"}', '--dpi=40', '--size=nnz4') == 0
    assert len(os.listdir(sweep / 'plots')) == 6
    assert [p.model_bytes for p in points_of(sweep, 'nnz4') if p.name == 'vanilla'] == [400]


def test_what_cannot_be_drawn_is_said(tmp_path, capsys):
    """One run: curves, and a line each for the other two; a run without curves or lengths: lines only."""
    run = make_run(tmp_path / 'one', procedure='pmmp', alpha=1e-5)
    assert run_here('plots.py', run, f'--plot_dir={tmp_path / "fig"}', '--dpi=40') == 0
    assert sorted(os.listdir(tmp_path / 'fig')) == ['training_curves.pdf', 'training_curves.png']
    printed = capsys.readouterr().out
    assert 'skipped size_toy: 1 run' in printed and 'skipped alpha_toy' in printed and '1 of pmmp' in printed
    bare = make_run(tmp_path / 'bare', log=False, train_bits_per_byte=None)
    part = make_run(tmp_path / 'part', log=False, final_train_blocks=10)    # its data bytes are of ten blocks
    assert run_here('plots.py', bare, part, f'--plot_dir={tmp_path / "none"}') == 0
    printed = capsys.readouterr().out
    assert os.listdir(tmp_path / 'none') == [] and 'skipped training_curves' in printed
    assert f'--from_ckpt={bare} --split=train' in printed and f'--from_ckpt={part} --split=train' in printed


@pytest.mark.parametrize('flags, expected', [(['HERE/none'], 'no run at'), (['HERE/no*'], 'no run at'),
                                             (['--out=HERE'], 'no run at'), (['--size=raw'], 'size = .raw.'),
                                             (['--x=flops,hours'], 'x = .hours.'),
                                             (['--plotdir=x'], 'did you mean plot_dir')])
def test_bad_input(tmp_path, flags, expected):
    with pytest.raises(UserError, match=expected):
        run_here('plots.py', *(f.replace('HERE', str(tmp_path)) for f in flags))


def test_curves_are_what_the_logs_say(tmp_path):
    """Steps, losses, validation, prunings; time from the csv; FLOPs of whole batches, scored or not."""
    c = curves.read_curves(make_run(tmp_path / 'a', bits=2.0, prunings=[20, 30]))
    assert c.steps.tolist() == list(range(1, 41)) and c.tokens[-1] == 40_000 and c.prunings == [20, 30]
    assert c.nats == pytest.approx([(2 + 6 / s) * LN2 for s in range(1, 41)], abs=1e-5)
    assert c.val == [(20, pytest.approx(2.1 * LN2, abs=1e-5)), (40, pytest.approx(2.1 * LN2, abs=1e-5))]
    assert c.bits_per_nat == pytest.approx(1 / LN2, rel=1e-3)
    assert c.wallclock.tolist() == list(range(2, 81, 2))
    assert c.flops.tolist() == [60_000 * step for step in range(1, 41)]
    os.remove(tmp_path / 'a' / 'train_loss.csv')
    assert curves.read_curves(str(tmp_path / 'a')) is None


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    """A running job's last line may be cut."""
    run = make_run(tmp_path / 'a')
    with open(os.path.join(run, 'train_loss.csv'), 'a', encoding='utf-8') as f:
        f.write('main,0,41,41000,1.5,0.001,1,1,100,8')
    assert curves.read_curves(run).wallclock[-1] == 80


def test_runs_of_before_have_no_cost_and_that_is_said(tmp_path, capsys):
    """A csv without seconds, a run.json without FLOPs: other panels are drawn, the line names the run."""
    old, new = make_run(tmp_path / 'old'), make_run(tmp_path / 'new')
    table = os.path.join(old, 'train_loss.csv')
    with open(table, encoding='utf-8') as f:
        rows = [line.rpartition(',')[0] for line in f]
    with open(table, 'w', encoding='utf-8') as f:
        f.write('\n'.join(rows) + '\n')
    record = read_run(old)
    del record['flops_per_token']
    write_json(os.path.join(old, 'run.json'), record)
    assert run_here('plots.py', old, new, f'--plot_dir={tmp_path / "fig"}', '--dpi=40', '--x=flops,wallclock') == 0
    printed = capsys.readouterr().out
    for part in ('flops', 'wallclock'):
        assert f'training_curves by {part} without old: not recorded' in printed
    figure = curves.draw_curves({'old': curves.read_curves(old), 'new': curves.read_curves(new)}, ['flops'])
    assert [line.get_label() for line in figure.axes[0].lines if len(line.get_xdata()) == 40] == ['new']
    assert run_here('plots.py', old, f'--plot_dir={tmp_path / "none"}', '--x=flops,wallclock') == 0
    assert 'skipped training_curves' in capsys.readouterr().out and not os.listdir(tmp_path / 'none')


def test_a_run_draws_its_own_loss_and_survives_failing(tmp_path, monkeypatch):
    """loss.png in the run folder; a broken log, an unwritable folder or matplotlib itself fails no training."""
    run = make_run(tmp_path / 'a')
    log = io.StringIO()
    assert curves.draw_run(run, log) == f'drawn {run}/loss.png'
    with open(os.path.join(run, 'loss.png'), 'rb') as f:
        assert f.read(4) == b'\x89PNG'
    assert curves.draw_run(make_run(tmp_path / 'none', log=False), log).startswith('no loss.png: fewer than two rows')
    monkeypatch.setattr(curves, 'draw_curves', lambda *args: 1 / 0)
    assert 'no loss.png (ZeroDivisionError' in curves.draw_run(run, log)
    assert plt.rcParams['axes.grid'] == matplotlib.rcParamsDefault['axes.grid']


@pytest.mark.parametrize('n', [1, 2, 3, 8, 50, 1000])
def test_moving_average_is_centred(n):
    """Against the definition: the mean of the values at most half a window away; length kept, a constant unchanged."""
    values = np.random.default_rng(0).normal(size=50)
    width = min(n, 50)
    expected = [values[max(0, i - (width - 1) + width // 2):i + width // 2 + 1].mean() for i in range(50)]
    assert curves.moving_average(values, n) == pytest.approx(expected)
    assert curves.moving_average(np.full(50, 3.0), n) == pytest.approx(np.full(50, 3.0))


def test_curves_figure_has_every_run_in_bits(sweep):
    """A panel per quantity, a line per run, the end of a line at the run's loss in bits per byte."""
    named = {name: curves.read_curves(str(sweep / name)) for name in ('vanilla', 'pmmp_0.0001')}
    figure = curves.draw_curves(named, ['steps', 'tokens', 'flops', 'wallclock'])
    assert [a.get_xlabel() for a in figure.axes] == ['training steps', 'training tokens', 'training FLOPs',
                                                     'training time (seconds)']
    assert 'bits per byte' in figure.axes[0].get_ylabel()
    for axis, end in zip(figure.axes, (40, 40_000, 2_400_000, 80)):
        lines = {line.get_label(): line.get_xydata() for line in axis.lines if not line.get_label().startswith('_')}
        assert set(lines) == set(named)
        assert lines['vanilla'][-1] == pytest.approx((end, 3 + 5 / 40), rel=1e-3)
        assert lines['pmmp_0.0001'][-1] == pytest.approx((end, 4 + 4 / 40), rel=1e-3)
    named['vanilla'].bits_per_nat = 0              # its bytes per token are not known: all in nats
    figure = curves.draw_curves(named, ['tokens'])
    assert 'nats' in figure.axes[0].get_ylabel() and len(figure.axes) == 1
    line = next(line for line in figure.axes[0].lines if line.get_label() == 'vanilla')
    assert line.get_ydata()[-1] == pytest.approx((3 + 5 / 40) * LN2, rel=1e-3)

def test_runs_of_one_name_are_two_lines(tmp_path):
    """out/a and probe/a: each keeps its curve, named by its folder; the legend has what there is to see."""
    folders = [make_run(tmp_path / place / 'a', prunings=[3] if place == 'x' else []) for place in 'xy']
    named = plots.named_curves(plots.read_folders(folders).trained)
    assert list(named) == folders
    shown = []
    for folder in folders:
        figure = curves.draw_curves({'a': named[folder]}, ['steps'])
        shown.append([text.get_text() for text in figure.legends[0].get_texts()])
    assert shown == [['a', 'validation', 'pruning'], ['a', 'validation']]


def test_kinds_and_totals(sweep):
    """Which run is which reference, and what its two-part length is."""
    found = {p.name: p for p in points_of(sweep)}
    assert (found['vanilla'].kind, found['tamade'].kind) == ('unpruned', 'TAMADE only')
    assert found['pmmp_1e-05'].kind == 'pmmp' and found['pmmp_1e-05'].alpha == 1e-5
    assert found['vanilla'].total == 60_000 + 3 * N // 8
    assert plots.means(found.values())['pmmp', 100] == [
        (1e-6, 30_000, 3.2, 70_000), (1e-5, 21_000, pytest.approx(3.4), pytest.approx(21_000 + 3.4 * N / 8)),
        (1e-4, 9_000, 4.0, 59_000)]


def test_pruned_runs_belong_to_their_origin_and_evaluations_fill_in(tmp_path, capsys):
    """prune.py's and fine-tuned runs have the ancestor's alpha; eval.py's row on the training split fills in."""
    parent = make_run(tmp_path / 'p' / 'trained', procedure='pmmp', alpha=1e-3, nonzeros=100)
    pruned = tmp_path / 'p' / 'pruned'
    make_run(pruned, log=False, alpha=None, procedure='pmmp', method='tamade', train_bits_per_byte=None,
             parent=dict(path=os.path.join(parent, 'ckpt.pt')))
    tuned = make_run(tmp_path / 'p' / 'tuned', log=False, parent=dict(path=str(pruned / 'ckpt.pt')))
    assert plots.origin(read_run(tuned))['alpha'] == 1e-3
    assert plots.read_point(read_run(str(pruned)), None, 'bits_est') is None
    row = dict(from_ckpt=str(pruned), split='train', dataset='toy', sha256='5' * 64, n_params=100, nonzeros=30,
               nnz4_bytes=120, bits_est_bytes=77, data_bytes=12_500, bits_per_byte=1.0)
    p = plots.read_point(read_run(str(pruned)), row, 'bits_est')
    assert (p.kind, p.alpha, p.total, p.n_bytes) == ('pmmp', 1e-3, 12_577, N)
    scored = tmp_path / 'p' / 'eval-1'
    scored.mkdir()
    of_pairs = dict(from_ckpt=str(pruned), data='meta', type='url', pieces='all')      # such rows are of no split
    write_json(scored / 'run.json', dict(run_id='eval-1', first_token='score', max_tokens=0,
                                              rows=[row, of_pairs]))
    run_here('plots.py', str(tmp_path / 'p' / '*'), f'--plot_dir={tmp_path / "fig"}', '--dpi=40')
    assert 'left out' not in capsys.readouterr().out
    write_json(scored / 'run.json', dict(run_id='eval-1', first_token='score', max_tokens=500, rows=[row]))
    run_here('plots.py', str(tmp_path / 'p' / '*'), f'--plot_dir={tmp_path / "fig"}', '--dpi=40')
    assert 'left out of size and alpha: pruned' in capsys.readouterr().out     # a part of the split is no length of it


def test_alpha_figure_shows_lengths_and_references(sweep):
    """Points at (alpha, model + data bytes) of each run; lines at unpruned, TAMADE only and the raw data."""
    points = points_of(sweep)
    axis = plots.draw_alpha(points, 'toy', N, 'bits_est').axes[0]
    shown = {tuple(xy) for line in axis.lines if line.get_marker() == 'D' for xy in line.get_xydata()}
    assert shown == {(p.alpha, p.total) for p in points if p.kind == 'pmmp'}
    levels = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == '--']
    assert sorted(levels) == [40_000 + round(3.1 * N / 8), 60_000 + 3 * N // 8, N]
    joined = next(line for line in axis.lines if line.get_marker() == 'None' and len(line.get_xdata()) == 3)
    assert joined.get_xydata()[1] == pytest.approx((1e-5, 21_000 + 3.4 * N / 8))
    texts = [t.get_text() for t in axis.texts]
    assert {'unpruned\n97.5 kB', 'TAMADE only\n78.8 kB', 'raw data\n100 kB'} <= set(texts)
    assert axis.get_xscale() == 'log'

def test_iso_lines_have_equal_length(sweep):
    """Along a grey line model bytes + bits per byte x N / 8 is one number; dots are runs; the shortest has a ring."""
    points = points_of(sweep)
    axis = plots.draw_size(points, 'toy', N, 'bits_est').axes[0]
    lines = [line.get_xydata() for line in axis.lines if len(line.get_xdata()) == 400]
    totals = [xy[:, 0] + xy[:, 1] * N / 8 for xy in lines]
    assert len(totals) >= 4 and all(np.ptp(t) < 1e-6 * t[0] for t in totals)
    assert len({round(t[0]) for t in totals}) == len(totals)
    dots = {tuple(xy) for line in axis.lines if line.get_marker() in 'oXD' and line.get_markersize() < 10
            for xy in line.get_xydata()}
    assert dots == {(p.model_bytes, p.bits_per_byte) for p in points}
    ring = next(line for line in axis.lines if line.get_markersize() == 15)
    assert ring.get_xydata().tolist() == [[9_000, 4.0]] and 'shortest: 59 kB' in ring.get_label()

def test_models_and_data_sets_are_kept_apart(sweep, tmp_path, capsys):
    """Runs of another size are another line and another alpha figure; those of another text another pair of figures."""
    for alpha in (1e-5, 1e-4):
        make_run(sweep / f'big_{alpha}', 2.5, 90_000, 400, procedure='pmmp', alpha=alpha, n_params=1000)
    make_run(sweep / 'other', 3.0, data=dict(dataset='toy', sha256='6' * 64))
    run_here('plots.py', str(sweep / '*'), f'--plot_dir={tmp_path / "fig"}', '--dpi=40')
    figures = {name.split('.')[0] for name in os.listdir(tmp_path / 'fig')}
    stem = f'toy_55555555_{N}'
    assert figures == {'training_curves', f'size_{stem}', f'alpha_{stem}_100', f'alpha_{stem}_1000'}
    assert f'skipped size_toy_66666666_{N}: 1 run' in capsys.readouterr().out


def test_numbers_are_short():
    assert [curves.short(n, 'B') for n in (12, 1500, 375_548, 16_384_000, 9.31e9)] == [
        '12 B', '1.5 kB', '376 kB', '16.4 MB', '9.31 GB']
    assert [plots.power(a) for a in (1e-4, 1.35e-6, 0.5)] == ['1e-4', '1.35e-6', '5e-1']


@pytest.mark.slow
def test_script_takes_paths_and_its_help_needs_no_matplotlib(sweep, tmp_path):
    done = run_script('-X', 'importtime', 'plots.py', '--help')
    assert done.returncode == 0 and 'plot_dir' in done.stdout and 'matplotlib' not in done.stderr
    done = run_script('plots.py', sweep / 'none', sweep / 'vanilla')
    assert done.returncode == 1 and done.stderr.startswith('error: no run at') and done.stderr.count('\n') == 1


# --- loss against diversity ---

PROTOCOL = dict(n_sequences=64, seed=0)


def make_experiment(out, protocol=PROTOCOL):
    """Diversities of a, b and their mix; two seeds of each, scored on two sets."""
    rows, scored = [], []
    for name, mix, value in (('a', 'a:1', 0.1), ('b', 'b:2', 0.2), ('mix', 'a:0.5,b:0.5', 0.3)):
        shares = {'mix': {'a': 0.5, 'b': 0.5}}.get(name, {name: 1.0})
        rows.append(dict(data=name, diversity=value, ci95=0.01, shares=shares))
        for seed in (0, 1):
            path = make_run(out / f'{name}{seed}', log=False, data_mix=mix, dataset='ignored')
            scored += [dict(from_ckpt=f'{path}/ckpt.pt' if seed else path, data=f'{part}/test', split='test',
                            loss_nats=value * 10 + seed + (part == 'y')) for part in ('x', 'y')]
    os.makedirs(out / 'diversity')
    write_json(out / 'diversity' / 'run.json', dict(run_id='diversity', protocol=protocol, rows=rows))
    os.makedirs(out / 'eval-1')
    write_json(out / 'eval-1' / 'run.json', dict(run_id='eval-1', rows=scored, first_token='score'))


def test_diversity_figure_joins_runs_to_the_sets_they_were_trained_on(tmp_path):
    make_experiment(tmp_path / 'out')
    run_here('plots.py', f'--out={tmp_path / "out"}', f'--plot_dir={tmp_path / "plots"}')
    assert (tmp_path / 'plots' / 'diversity.png').stat().st_size > 5000
    drawn = plots.read_diversity(plots.read_folders(plots.find_folders([], str(tmp_path / 'out'))))
    assert drawn['x/test'] == dict(a=(0.1, 0.01, [1, 2]), b=(0.2, 0.01, [2, 3]), mix=(0.3, 0.01, [3, 4]))
    assert drawn['y/test']['b'] == (0.2, 0.01, [3, 4]) and len(drawn) == 2
    figure = plots.draw_diversity(drawn)
    dots = [line.get_ydata().tolist() for line in figure.axes[0].lines if line.get_marker() == 'o']
    assert dots == [[1, 2], [2, 3], [3, 4]]
    bars = [c for c in figure.axes[0].containers]
    assert [np.ptp(c.lines[2][1].get_segments()[0][:, 1]) for c in bars] == pytest.approx([2 * 0.5 ** 0.5] * 3)


def test_diversities_of_two_protocols_are_refused(tmp_path):
    make_experiment(tmp_path / 'out')
    os.makedirs(tmp_path / 'out' / 'other')
    write_json(tmp_path / 'out' / 'other' / 'run.json', dict(run_id='other', protocol=dict(PROTOCOL, seed=1)))
    with pytest.raises(UserError, match='2 protocols cannot share a figure: diversity, other'):
        run_here('plots.py', f'--out={tmp_path / "out"}', f'--plot_dir={tmp_path / "plots"}')


def test_diversity_without_trainings_is_skipped_and_said(tmp_path, capsys):
    make_experiment(tmp_path / 'out')
    run_here('plots.py', str(tmp_path / 'out' / 'diversity'), f'--plot_dir={tmp_path / "plots"}')
    assert 'skipped diversity' in capsys.readouterr().out
