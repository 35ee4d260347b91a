"""Draw figures of a set of runs, as PNG and PDF.

    python plots.py                                 every run in out/
    python plots.py out/a out/b                     these runs
    python plots.py 'out/sweep_*' --plot_dir=figures --size=nnz4

In: run folders (run.json, train_loss.csv, log.txt); eval.py's folders among them fill in what a run did not measure itself.
Out: training_curves, and per data set size_SET (loss versus model size, with lines of equal description length) and
alpha_SET (description length versus alpha, beside the unpruned model, the one TAMADE alone prunes, and the data as they are).
What a set of runs cannot support is skipped with a line that says why. Description lengths are two-part, of the whole
training split: model bytes + code length of the data.
"""
import csv
import glob
import math
import os
import re
import sys

from configurator import UserError, at_least, configure, one_of, require, run

# -----------------------------------------------------------------------------
out = 'out'                     # folder of run folders, read when no paths are given
plot_dir = 'out/plots'
size = 'bits_est'               # bytes of a model: 'bits_est' (entropy of its 8-bit tensors) or 'nnz4' (4 per non-zero)
smooth = 0                      # training steps averaged in a curve; 0 = a fiftieth of the run
dpi = 160                       # of the PNG files
# -----------------------------------------------------------------------------

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')     # Okabe & Ito 2008
STYLES = ('-', '--', ':', '-.')
UNPRUNED, TAMADE = 'unpruned', 'TAMADE only'
KINDS = {UNPRUNED: ('#000000', 'o'), TAMADE: ('#D55E00', 'X'), 'rl1': ('#E69F00', 's'), 'drr': ('#009E73', '^'),
         'pmmp': ('#0072B2', 'D')}
GREY = '#767676'
LN2 = math.log(2)


# --- reading ---

def find_folders(paths):
    """Return the run folders that paths and globs name; with none, every folder of `out` that holds a run.json."""
    folders = []
    for path in paths or [os.path.join(glob.escape(out), '*')]:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path))
        found = [m for m in matches if os.path.exists(os.path.join(m, 'run.json'))]
        if not found:
            raise UserError(f'no run at {path!r}, expected folders with a run.json; train one: python train.py'
                            ' config/sample_pmmp.py')
        folders += [m for m in found if m not in folders]
    return folders


def read_curves(folder):
    """Return what train_loss.csv and log.txt tell of a run's training; {} where there is none.

    step, tokens, nats: arrays, a row of the csv each. seconds: training time at those rows by the logged speed (pauses
    and evaluations do not count), or None. val: [(step, nats)]. prunings: [step]. factor: bits per byte of one nat, or 0.
    """
    import numpy as np
    try:
        with open(os.path.join(folder, 'train_loss.csv'), newline='', encoding='utf-8') as f:
            table = [[float(r[c]) for c in ('step', 'tokens', 'loss_nats')] for r in csv.DictReader(f) if r['nonzeros']]
        with open(os.path.join(folder, 'log.txt'), encoding='utf-8') as f:
            log = f.read()
    except OSError:
        return {}
    if len(table) < 2:
        return {}
    step, tokens, nats = np.array(table).T
    found = re.findall(r'^\S+ train .*?step=(\d+) .*tokens_per_second=(\d+)', log, re.M)
    speeds, seconds = [(int(s), int(v)) for s, v in found if int(v)], None
    if speeds:
        at = np.interp([s for s, _ in speeds], step, tokens)
        spent = np.cumsum(np.diff(at, prepend=0) / [v for _, v in speeds])
        seconds = np.interp(tokens, np.r_[0, at], np.r_[0, spent])
    units = re.findall(r'loss=([\d.]+) bpb=([\d.]+)', log)
    return dict(step=step, tokens=tokens, nats=nats, seconds=seconds,
                val=[(int(s), float(v)) for s, v in re.findall(r'^\S+ val .*?step=(\d+) loss=([\d.]+)', log, re.M)],
                prunings=[int(s) for s in re.findall(r'^\S+ prune .*?step=(\d+)', log, re.M)],
                factor=float(units[-1][1]) / float(units[-1][0]) if units else 0)


def origin(record):
    """Follow a pruned or fine-tuned run to the ancestor that was trained with a procedure; itself where there is none."""
    import runs
    while record:
        if record.get('alpha') and record['procedure'] != 'vanilla':
            return record
        record = runs.read_run(os.path.dirname(record.get('parent', {}).get('path', '')) or os.devnull)
    return {}


def read_point(folder, record, evaluated):
    """Return what the description-length figures need of one run, or the line that says what is missing."""
    row = evaluated
    if not row and record.get('train_bits_per_byte') and record.get('final_train_blocks', -1) < 0:
        row = dict(data_bytes=record['train_data_bytes'], bits_per_byte=record['train_bits_per_byte'],
                   dataset=record['data']['dataset'], nnz4_bytes=record['model_byte_size'], n_params=record['n_params'],
                   bits_est_bytes=record['bits_est_bytes'], nonzeros=record['non_zero_params'])
    if not row:
        return (f'{record["run_id"]}: its loss on the whole training split is not known; measure it with python eval.py'
                f' --from_ckpt={folder} --split=train')
    trained = origin(record)
    unpruned = row['nonzeros'] > 0.98 * row['n_params']
    return dict(name=record['run_id'], kind=trained['procedure'] if trained else UNPRUNED if unpruned else TAMADE,
                alpha=trained.get('alpha', 0.0), bits_per_byte=row['bits_per_byte'], model_bytes=row[f'{size}_bytes'],
                total=row['data_bytes'] + row[f'{size}_bytes'],
                data=(row['dataset'], 100 * round(8 * row['data_bytes'] / row['bits_per_byte'] / 100)))


def means(points):
    """Average points of one kind and alpha over seeds; returns {kind: [(alpha, model bytes, bits per byte, total)]}."""
    groups = {}
    for p in points:
        groups.setdefault((p['kind'], p['alpha']), []).append((p['model_bytes'], p['bits_per_byte'], p['total']))
    result = {}
    for (kind, alpha), values in sorted(groups.items()):
        result.setdefault(kind, []).append((alpha, *(sum(column) / len(values) for column in zip(*values))))
    return result


# --- drawing ---

def in_bytes(n):
    """Format a number of bytes to three digits."""
    for unit, width in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if n >= width:
            return f'{n / width:.3g} {unit}'
    return f'{n:.0f} B'


def bytes_axis(axis):
    from matplotlib.ticker import FuncFormatter, NullFormatter
    axis.set_major_formatter(FuncFormatter(lambda n, _: in_bytes(n)))
    axis.set_minor_formatter(NullFormatter())


def moving_average(values, n):
    """Centred moving average over n values, over those that exist at the ends."""
    import numpy as np
    window = np.ones(min(n, len(values)))
    return np.convolve(values, window, 'same') / np.convolve(np.ones(len(values)), window, 'same')


def draw_curves(named, plt):
    """Training loss, smoothed, and validation points against steps, tokens and training time."""
    import numpy as np
    in_bits = all(c['factor'] for c in named.values())
    longest = max((c['seconds'][-1] for c in named.values() if c['seconds'] is not None), default=0)
    unit, width = ('hours', 3600) if longest > 7200 else ('minutes', 60) if longest > 180 else ('seconds', 1)
    axes_of = {'step': ('training steps', 1), 'tokens': ('training tokens', 1)}
    if longest:
        axes_of['seconds'] = (f'training time ({unit})', width)
    figure, axes = plt.subplots(1, len(axes_of), figsize=(4.2 * len(axes_of), 4.3), sharey=True, layout='constrained')
    tops, lows = [], []
    for i, (name, c) in enumerate(named.items()):
        scale, colour = c['factor'] if in_bits else 1, COLOURS[i % len(COLOURS)]
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        y = moving_average(c['nats'], smooth or max(1, len(c['nats']) // 50)) * scale
        thin = slice(None, None, max(1, len(y) // 2000))
        tops.append(y[len(y) // 20])
        lows += [y.min(), *(v * scale for _, v in c['val'])]
        for axis, (column, (label, divisor)) in zip(axes, axes_of.items()):
            if c[column] is None:
                continue
            x = c[column] / divisor
            axis.plot(x[thin], y[thin], style, color=colour, lw=1.4, label=name if column == 'step' else None)
            if c['val']:
                steps, nats = np.array(c['val']).T
                axis.plot(np.interp(steps, c['step'], x), nats * scale, 'o', color=colour, ms=5, mfc='white', mew=1.3)
            axis.plot(np.interp(c['prunings'], c['step'], x), np.interp(c['prunings'], c['step'], y), 'v', color=colour,
                      ms=7, mec='white', mew=0.8, zorder=4)
            axis.set_xlabel(label)
    axes[0].set_ylabel('loss (bits per byte)' if in_bits else 'loss (nats per token)')
    axes[0].set_ylim(min(lows) - 0.05 * (max(tops) - min(lows)), max(tops) + 0.1 * (max(tops) - min(lows)))
    keys = [plt.Line2D([], [], ls='', marker='o', color=GREY, mfc='white', mew=1.3, label='validation'),
            plt.Line2D([], [], ls='', marker='v', color=GREY, ms=7, label='pruning')]
    handles = axes[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles + keys, loc='outside lower center', ncols=min(6, len(handles) + 2))
    return figure


def draw_size(points, n_bytes, name, plt):
    """Loss against model size, with lines along which model bytes + data bytes stay the same."""
    import numpy as np
    figure, axis = plt.subplots(figsize=(7.2, 5.2), layout='constrained')
    x, y = np.array([(p['model_bytes'], p['bits_per_byte']) for p in points]).T
    pad = max(0.08 * (y.max() - y.min()), 0.02)
    left, right, low, high = x.min() / 1.6, x.max() * 1.6, y.min() - pad, y.max() + pad
    sizes = np.geomspace(left, right, 400)
    for total in np.geomspace(left + low * n_bytes / 8, right + high * n_bytes / 8, 11)[1:-1]:
        total = float(f'{total:.2g}')
        line = (total - sizes) * 8 / n_bytes
        axis.plot(sizes, line, color='#BBBBBB', lw=0.9, zorder=1)
        if low + pad / 3 < line[0] < high:
            axis.text(left * 1.03, line[0], in_bytes(total), color=GREY, fontsize=8, va='bottom')
    best = min(points, key=lambda p: p['total'])
    for kind, rows in means(points).items():
        colour, marker = KINDS[kind]
        axis.plot([r[1] for r in rows], [r[2] for r in rows], '-', color=colour, lw=1, alpha=0.6, zorder=2)
        mine = [p for p in points if p['kind'] == kind]
        axis.plot([p['model_bytes'] for p in mine], [p['bits_per_byte'] for p in mine], marker, color=colour, ms=8,
                  mec='white', mew=0.8, zorder=3, label=kind)
        for alpha, model_bytes, bits, _ in rows if kind not in (UNPRUNED, TAMADE) else ():
            axis.annotate(f'α = {alpha:.3g}', (model_bytes, bits), (6, 6), textcoords='offset points', fontsize=8,
                          color=colour)
    axis.plot(best['model_bytes'], best['bits_per_byte'], 'o', ms=16, mfc='none', mec='#D00000', mew=1.6, zorder=4,
              label=f'shortest: {in_bytes(best["total"])} ({best["name"]})')
    axis.set(xscale='log', xlim=(left, right), ylim=(low, high), xlabel=f'model size ({size})',
             ylabel=f'loss on {name}, training split (bits per byte)',
             title=f'{name}, {in_bytes(n_bytes)}: grey lines have equal model bytes + data bytes')
    bytes_axis(axis.xaxis)
    axis.legend(loc='upper right')
    return figure


def draw_alpha(points, n_bytes, name, plt):
    """Two-part description length against alpha, with what neither alpha nor pruning, and no model at all, would give."""
    figure, axis = plt.subplots(figsize=(7.2, 5.0), layout='constrained')
    grouped = means(points)
    references = [(kind, grouped[kind][0][3], KINDS[kind][0]) for kind in (UNPRUNED, TAMADE) if kind in grouped]
    references.append(('raw data', n_bytes, GREY))
    for kind in [k for k in grouped if k not in (UNPRUNED, TAMADE)]:
        colour, marker = KINDS[kind]
        axis.plot([r[0] for r in grouped[kind]], [r[3] for r in grouped[kind]], '-', color=colour, lw=1.6)
        mine = [p for p in points if p['kind'] == kind]
        axis.plot([p['alpha'] for p in mine], [p['total'] for p in mine], marker, color=colour, ms=8, mec='white',
                  mew=0.8, label=kind)
    for text, total, colour in references:
        axis.axhline(total, color=colour, lw=1.2, ls='--', zorder=1)
        axis.annotate(f'{text}, {in_bytes(total)}', (0.005, total), (0, 3), xycoords=('axes fraction', 'data'),
                      textcoords='offset points', fontsize=8.5, color=colour)
    totals = [p['total'] for p in points] + [n_bytes]
    alphas = [p['alpha'] for p in points if p['alpha']]
    if min(alphas) / 2 < 32 * LN2 / n_bytes < max(alphas) * 2:
        axis.axvline(32 * LN2 / n_bytes, color='#BBBBBB', lw=1, ls=':', zorder=0)
        axis.annotate('32 ln 2 / N', (32 * LN2 / n_bytes, 0.01), (4, 2), xycoords=('data', 'axes fraction'),
                      textcoords='offset points', fontsize=8, color=GREY)
    axis.set(xscale='log', xlabel='regularisation strength α', ylabel=f'model + data bytes (model as {size})',
             yscale='log' if max(totals) > 6 * min(totals) else 'linear',
             title=f'{name}: description length of the training split')
    bytes_axis(axis.yaxis)
    axis.legend(loc='best')
    return figure


def main(argv=None):
    _, paths, _ = configure(globals(), ['plot', *(sys.argv[1:] if argv is None else argv)], verbs=dict(plot=-1))
    require(one_of('size', size, ('bits_est', 'nnz4')), at_least('smooth', smooth, 0), at_least('dpi', dpi, 1))
    folders = find_folders(paths)
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    import runs
    plt.rcParams.update({'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
                         'grid.color': '#E6E6E6', 'grid.linewidth': 0.7, 'axes.axisbelow': True, 'legend.frameon': False,
                         'axes.titlesize': 10.5, 'savefig.bbox': 'tight', 'pdf.fonttype': 42})
    records, evaluated = {}, {}
    for folder in folders:
        record = runs.read_run(folder)
        if 'procedure' in record:
            records[folder] = record
        if not record.get('max_tokens') and record.get('first_token') == 'score':
            evaluated.update((os.path.abspath(r['from_ckpt']), r) for r in record.get('rows', ())
                             if r['split'] == 'train' and 'from_ckpt' in r)
    os.makedirs(plot_dir, exist_ok=True)

    def save(name, figure):
        for ending in ('png', 'pdf'):
            figure.savefig(os.path.join(plot_dir, f'{name}.{ending}'), dpi=dpi)
        plt.close(figure)
        print(f'wrote {os.path.join(plot_dir, name)}.png and .pdf')

    curves = {r['run_id']: c for folder, r in records.items() if (c := read_curves(folder))}
    if curves:
        save('training_curves', draw_curves(curves, plt))
    else:
        print(f'skipped training_curves: none of {len(folders)} folders has a train_loss.csv and log.txt of two steps')
    points = [read_point(folder, r, evaluated.get(os.path.abspath(folder))) for folder, r in records.items()]
    for problem in (p for p in points if isinstance(p, str)):
        print(f'left out of size and alpha: {problem}')
    by_data = {}
    for p in points:
        if not isinstance(p, str):
            by_data.setdefault(p['data'], []).append(p)
    if not by_data:
        print('skipped size and alpha: no run has a loss of its whole training split')
    for (name, n_bytes), mine in by_data.items():
        label = name if sum(name == other for other, _ in by_data) == 1 else f'{name}_{n_bytes}'
        if len(mine) < 2:
            print(f'skipped size_{label}: 1 run, expected at least 2 on one data set')
        else:
            save(f'size_{label}', draw_size(mine, n_bytes, name, plt))
        kinds = {k: len(rows) for k, rows in means(mine).items() if k not in (UNPRUNED, TAMADE)}
        if max(kinds.values(), default=0) < 2:
            print(f'skipped alpha_{label}: expected at least 2 values of alpha > 0 of one procedure, got {kinds or "none"}')
        else:
            save(f'alpha_{label}', draw_alpha(mine, n_bytes, name, plt))
    return 0


if __name__ == '__main__':
    run(main)
