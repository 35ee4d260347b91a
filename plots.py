"""Draw figures of a set of runs, as PNG and PDF.

    python plots.py                                 every run in out/
    python plots.py out/a out/b                     these runs
    python plots.py 'out/sweep_*' --plot_dir=figures --size=nnz4
    python plots.py out/a out/b --x=flops,wallclock     training curves by what they cost

In: run folders (run.json, train_loss.csv, log.txt); eval.py's folders among them fill in what a run did not measure.
Out: training_curves, and per data set size_SET (loss versus model size, with lines of equal description length) and
alpha_SET (description length versus alpha, beside the unpruned model, the one that TAMADE alone pruned, and the raw
data). With a folder of lab/diversity.py and evaluations: diversity (loss on each evaluation set versus diversity of the
training set, with spread). Each dot is a run, lines join means over seeds. What runs cannot support is skipped with a
line that says why. Description lengths are two-part, of the whole training split: model bytes + data bytes.
"""
import glob
import math
import os
import sys

from configurator import UserError, at_least, configure, one_of, require, run
from training.curves import AXES, COLOURS, GREY, LOOK, draw_curves, read_curves, short, shorten_ticks

# -----------------------------------------------------------------------------
out = 'out'                     # folder of run folders, read when no paths are given
plot_dir = 'out/plots'
x = 'steps,tokens,flops,wallclock'      # panels of training_curves, comma-separated
size = 'bits_est'               # bytes of a model: 'bits_est' (entropy of its 8-bit tensors) or 'nnz4' (4 per non-zero)
smooth = 0                      # training steps averaged in a curve; 0 = a fiftieth of the run
dpi = 160                       # of the PNG files
# -----------------------------------------------------------------------------

UNPRUNED, TAMADE = 'unpruned', 'TAMADE only'
KINDS = {UNPRUNED: ('#000000', 'o'), TAMADE: ('#D55E00', 'X'), 'rl1': ('#E69F00', 's'), 'drr': ('#009E73', '^'),
         'pmmp': ('#0072B2', 'D')}
SIZES = {'bits_est': 'entropy of 8-bit weights', 'nnz4': '4 per non-zero weight'}
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


def origin(record):
    """Follow a pruned or fine-tuned run to the ancestor (or itself) that was trained with an alpha; {} if none was."""
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
        row = dict(dataset=record['data']['dataset'], sha256=record['data']['sha256'], n_params=record['n_params'],
                   nonzeros=record['non_zero_params'], nnz4_bytes=record['model_byte_size'],
                   bits_est_bytes=record['bits_est_bytes'], data_bytes=record['train_data_bytes'],
                   bits_per_byte=record['train_bits_per_byte'])
    if not row:
        return (f'{record["run_id"]}: its loss on the whole training split is not known; measure it with python eval.py'
                f' --from_ckpt={folder} --split=train')
    trained = origin(record)
    kind = trained['procedure'] if trained else UNPRUNED if row['nonzeros'] > 0.98 * row['n_params'] else TAMADE
    return dict(name=record['run_id'], kind=kind, alpha=trained.get('alpha', 0.0), n_params=row['n_params'],
                bits_per_byte=row['bits_per_byte'], model_bytes=row[f'{size}_bytes'],
                total=row['data_bytes'] + row[f'{size}_bytes'], data=(row['dataset'], row['sha256']),
                n_bytes=8 * row['data_bytes'] / row['bits_per_byte'])


def means(points):
    """Average over seeds; returns {(kind, parameters): [(alpha, model bytes, bits per byte, total)]}, alpha rising."""
    groups = {}
    for p in points:
        key = p['kind'], p['n_params'], p['alpha']
        groups.setdefault(key, []).append((p['model_bytes'], p['bits_per_byte'], p['total']))
    result = {}
    for (kind, n_params, alpha), values in sorted(groups.items()):
        row = alpha, *(sum(column) / len(values) for column in zip(*values))
        result.setdefault((kind, n_params), []).append(row)
    return result


def read_diversity(measured, records, scored):
    """Return {evaluation set: {training set: (diversity, half-width, [loss of each run])}}.

    measured: run.json of lab/diversity.py's folders; records: {path: run.json} of trainings; scored: rows of eval.py. A
    training set is known by the shares of its sources. Diversities of different protocols are refused.
    """
    from corpus.mixture import parse_mix
    protocols = {repr(sorted(m['protocol'].items())) for m in measured}
    require((len(protocols) < 2, f'diversities of {len(protocols)} protocols cannot share a figure: '
             + ', '.join(m['run_id'] for m in measured) + '; name folders of one protocol'))
    known = {repr(sorted(row['shares'].items())): row for m in measured for row in m.get('rows', ()) if 'shares' in row}
    trained = {os.path.abspath(path): known.get(repr(sorted(parse_mix(r.get('data_mix') or r['dataset']).items())))
               for path, r in records.items() if r.get('data_mix') or r.get('dataset')}
    found = {}
    for row in scored:
        if which := trained.get(os.path.abspath(row['from_ckpt'].removesuffix('ckpt.pt'))):
            sets = found.setdefault(row['data'], {})
            sets.setdefault(which['data'], (which['diversity'], which.get('ci95', 0.0), []))[2].append(row['loss_nats'])
    return found


# --- drawing ---

def power(alpha):
    """Format 0.0001 as 1e-4."""
    mantissa, exponent = f'{alpha:.2e}'.split('e')
    return f'{float(mantissa):g}e{int(exponent)}'


def label_points(axis, labels, obstacles):
    """Write (text, x, y, colour) beside the points, where it covers neither a point nor an earlier label."""
    from matplotlib.transforms import Bbox
    renderer = axis.figure.canvas.get_renderer()
    axis.figure.draw_without_rendering()
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in axis.transData.transform(obstacles)]
    for text, x, y, colour in labels:
        for dx, dy, side in ((7, 5, 'left'), (7, -11, 'left'), (-7, 5, 'right'), (-7, -11, 'right'), (0, 12, 'center'),
                             (0, -18, 'center'), (16, -2, 'left'), (-16, -2, 'right'), (0, 22, 'center')):
            note = axis.annotate(text, (x, y), (dx, dy), textcoords='offset points', fontsize=8.5, color=colour,
                                 ha=side)
            box = note.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def draw_size(points, name, n_bytes, plt):
    """Loss against model size, with lines along which model bytes + data bytes stay the same."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator
    figure, axis = plt.subplots(figsize=(7.4, 5.6), layout='constrained')
    x, y = np.array([(p['model_bytes'], p['bits_per_byte']) for p in points]).T
    pad = max(0.12 * (y.max() - y.min()), 0.02)
    left, right, low, high = x.min() / 1.6, x.max() * 1.6, y.min() - pad, y.max() + pad
    axis.set(xscale='log', xlim=(left, right), ylim=(low, high), xlabel=f'model bytes ({SIZES[size]})',
             ylabel='code length of the training split (bits per byte)',
             title=f'{name}, {short(n_bytes, "B")}: along a grey line, model bytes + data bytes are the same')
    shorten_ticks(axis.xaxis, 'B')
    axis.grid(False)
    sizes, ends, last = np.geomspace(left, right, 400), (left + low * n_bytes / 8, right + high * n_bytes / 8), 0
    near = ends[1] < 8 * ends[0]
    for total in MaxNLocator(12).tick_values(*ends) if near else np.geomspace(*ends, 14):
        line, top = (total - sizes) * 8 / n_bytes, total - high * n_bytes / 8           # top: where it leaves the frame
        axis.plot(sizes, line, color='#C4C4C4', lw=0.9, zorder=1)
        if low < line[0] < high - pad / 2:
            axis.text(left * 1.02, line[0], short(total, 'B'), color=GREY, fontsize=8, va='bottom')
        elif max(left, last * (right / left) ** 0.08) < top < right / 1.2:
            axis.text(top, high, short(total, 'B'), color=GREY, fontsize=8, va='top')
            last = top
    labels, n_params = [], sorted({p['n_params'] for p in points})
    for (kind, n), rows in means(points).items():
        colour, marker = KINDS[kind]
        axis.plot([r[1] for r in rows], [r[2] for r in rows], '-', color=colour, lw=1, alpha=0.5, zorder=2)
        mine = [p for p in points if (p['kind'], p['n_params']) == (kind, n)]
        axis.plot([p['model_bytes'] for p in mine], [p['bits_per_byte'] for p in mine], marker, color=colour, zorder=3,
                  ms=8 - n_params.index(n) % 2, mec=colour if n_params.index(n) % 2 else 'white',
                  mfc='white' if n_params.index(n) % 2 else colour, mew=1.5 if n_params.index(n) % 2 else 0.8,
                  label=kind if len(n_params) == 1 else f'{kind}, {short(n)} weights')
        labels += [(f'α = {power(alpha)}', x, y, colour) for alpha, x, y, _ in rows if alpha]
    best = min(points, key=lambda p: p['total'])
    axis.plot(best['model_bytes'], best['bits_per_byte'], 'o', ms=15, mfc='none', mec='black', mew=1.3, zorder=4,
              label=f'shortest: {short(best["total"], "B")} ({best["name"]})')
    handles = axis.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc='outside lower center', ncols=min(3, len(handles)))
    label_points(axis, labels, list(zip(x, y)))
    return figure


def draw_alpha(points, name, n_bytes, plt):
    """Two-part description length against alpha, beside what no alpha, no pruning and no model at all give."""
    figure, axis = plt.subplots(figsize=(7.8, 5.0), layout='constrained')
    grouped, references = {kind: rows for (kind, _), rows in means(points).items()}, [('raw data', n_bytes, GREY)]
    for kind, rows in grouped.items():
        colour, marker = KINDS[kind]
        if kind in (UNPRUNED, TAMADE):
            references.append((kind, rows[0][3], colour))
            continue
        axis.plot([r[0] for r in rows], [r[3] for r in rows], '-', color=colour, lw=1.6, zorder=2)
        mine = [p for p in points if p['kind'] == kind]
        axis.plot([p['alpha'] for p in mine], [p['total'] for p in mine], marker, color=colour, ms=8, mec='white',
                  mew=0.8, zorder=3)
        axis.plot([], [], marker + '-', color=colour, ms=8, mec='white', mew=0.8, label=kind)
    for _, total, colour in references:
        axis.axhline(total, color=colour, lw=1.2, ls='--', zorder=1)
    totals, alphas = [p['total'] for p in points] + [n_bytes], [p['alpha'] for p in points if p['alpha']]
    axis.set(xscale='log', yscale='log' if max(totals) > 6 * min(totals) else 'linear',
             xlabel='regularisation strength α', ylabel=f'model bytes ({SIZES[size]}) + data bytes',
             title=f'{name}: description length of the training split')
    shorten_ticks(axis.yaxis, 'B')
    if min(alphas) / 2 < 32 * LN2 / n_bytes < max(alphas) * 2:
        axis.axvline(32 * LN2 / n_bytes, color=GREY, lw=1, ls=':', zorder=0)
        axis.annotate('32 ln 2 / N', (32 * LN2 / n_bytes, 0.5), (3, 0), xycoords=('data', 'axes fraction'), rotation=90,
                      textcoords='offset points', fontsize=8, color=GREY, va='center')
    axis.legend(loc='best')
    figure.draw_without_rendering()
    floor = 0.0                                 # labels stand at the right end of the lines, pushed apart upwards
    for text, total, colour in sorted(references, key=lambda r: r[1]):
        height = axis.transAxes.inverted().transform(axis.transData.transform((alphas[0], total)))[1]
        axis.text(1.01, max(height, floor), f'{text}\n{short(total, "B")}', transform=axis.transAxes, color=colour,
                  fontsize=8.5, va='center')
        floor = max(height, floor) + 0.085
    return figure


def draw_diversity(found, plt):
    """Loss on each evaluation set against the diversity of the training set: a dot per seed, bars of one deviation."""
    import numpy as np
    columns = min(3, len(found))
    figure, axes = plt.subplots(-(-len(found) // columns), columns, squeeze=False, layout='constrained',
                                figsize=(4.2 * columns, 3.6 * -(-len(found) // columns)))
    names = sorted({name for sets in found.values() for name in sets})
    for axis, (title, sets) in zip(axes.flat, found.items()):
        for name, (x, half, losses) in sets.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            spread = float(np.std(losses, ddof=1)) if len(losses) > 1 else 0.0
            axis.errorbar(x, np.mean(losses), spread, half, fmt='_', color=colour, capsize=3, lw=1.2)
            axis.plot([x] * len(losses), losses, 'o', color=colour, ms=5, mfc='white', mew=1.2)
        axis.set(title=f'evaluated on {title}', xlabel='diversity of the training set', ylabel='loss (nats per token)')
    for axis in axes.flat[len(found):]:
        axis.remove()
    handles = [plt.Line2D([], [], ls='', marker='o', color=COLOURS[i % len(COLOURS)], label=name)
               for i, name in enumerate(names)]
    figure.legend(handles=handles, loc='outside lower center', ncols=min(4, len(handles)))
    return figure


def main(argv=None):
    _, paths, _ = configure(globals(), ['plot', *(sys.argv[1:] if argv is None else argv)], verbs=dict(plot=-1))
    xs = [part.strip() for part in x.split(',')]
    require(one_of('size', size, ('bits_est', 'nnz4')), at_least('smooth', smooth, 0), at_least('dpi', dpi, 1),
            *(one_of('x', part, tuple(AXES)) for part in xs))
    folders = find_folders(paths)
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    import runs
    plt.rcParams.update(LOOK)
    records, evaluated, measured, scored = {}, {}, [], {}
    for folder in folders:
        record = runs.read_run(folder)
        if 'protocol' in record:
            measured.append(record)
        else:
            scored.update(((r['from_ckpt'], r.get('data')), r) for r in record.get('rows', ()) if 'from_ckpt' in r)
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

    names = [r['run_id'] for r in records.values()]                     # folders in two places may share one
    curves = {r['run_id'] if names.count(r['run_id']) == 1 else folder: c for folder, r in records.items()
              if (c := read_curves(folder))}
    for part in xs:
        if lacking := [name for name, c in curves.items() if c[part] is None]:
            print(f'training_curves by {part} without {", ".join(lacking)}: not recorded when they were trained')
    if panels := [part for part in xs if any(c[part] is not None for c in curves.values())]:
        save('training_curves', draw_curves(curves, panels, smooth))
    else:
        print(f'skipped training_curves: none of {len(folders)} folders has a train_loss.csv and a log.txt with'
              f' {", ".join(xs)}')
    if measured and (found := read_diversity(measured, records, scored.values())):
        save('diversity', draw_diversity(found, plt))
    elif measured:
        print('skipped diversity: expected run folders trained on the measured sets, and their eval.py folders')
    by_data = {}
    for folder, record in records.items():
        p = read_point(folder, record, evaluated.get(os.path.abspath(folder)))
        if isinstance(p, str):
            print(f'left out of size and alpha: {p}')
        else:
            by_data.setdefault(p['data'], []).append(p)
    if not by_data:
        print('skipped size and alpha: no run has a loss of its whole training split')
    for (name, sha256), mine in by_data.items():
        n_bytes = sum(p['n_bytes'] for p in mine) / len(mine)
        label = name if sum(name == other for other, _ in by_data) == 1 else f'{name}_{sha256[:8]}_{n_bytes:.0f}'
        if len(mine) > 1:
            save(f'size_{label}', draw_size(mine, name, n_bytes, plt))
        else:
            print(f'skipped size_{label}: 1 run, expected at least 2 on one data set')
        alphas = {k: len(rows) for k, rows in means(mine).items() if k[0] not in (UNPRUNED, TAMADE)}
        swept = sorted({n_params for (_, n_params), n in alphas.items() if n > 1})
        for n_params in swept:
            same = [p for p in mine if p['n_params'] == n_params]
            figure = draw_alpha(same, name, n_bytes, plt)
            save(f'alpha_{label}_{n_params}' if len(swept) > 1 else f'alpha_{label}', figure)
        if not swept:
            found = ', '.join(f'{n} of {kind} ({short(n_params)} weights)' for (kind, n_params), n in alphas.items())
            print(f'skipped alpha_{label}: expected one model and procedure at 2 values of alpha > 0, got'
                  f' {found or "none"}')
    return 0


if __name__ == '__main__':
    run(main)
