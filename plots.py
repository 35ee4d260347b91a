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
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

from configurator import UserError, as_program, at_least, configure, names_in, one_of, require
from training.curves import AXES, COLOURS, GREY, LOOK, draw_curves, read_curves, short, shorten_ticks

# -----------------------------------------------------------------------------
out = 'out'                     # folder of run folders, read when no paths are given
plot_dir = 'out/plots'
x = 'steps,tokens,flops,wallclock'      # panels of training_curves, comma-separated
size = 'bits_est'               # bytes of a model: 'bits_est' (entropy of its 8-bit tensors) or 'nnz4' (4 per non-zero)
smooth = 0                      # training steps averaged in a curve; 0 = a fiftieth of the run
dpi = 160                       # of the PNG files
# -----------------------------------------------------------------------------
argv = None
if __name__ == '__main__':
    as_program()
    argv = ['plot', *sys.argv[1:]]              # paths follow the name of the script, without a verb
_, paths, config = configure(globals(), argv, verbs=dict(plot=-1))

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from corpus.mixture import parse_mix
from training.folder import read_run

UNPRUNED = 'unpruned'
TAMADE = 'TAMADE only'
KINDS = {UNPRUNED: ('#000000', 'o'), TAMADE: ('#D55E00', 'X'), 'rl1': ('#E69F00', 's'), 'drr': ('#009E73', '^'),
         'pmmp': ('#0072B2', 'D')}
SIZES = {'bits_est': 'entropy of 8-bit weights', 'nnz4': '4 per non-zero weight'}
# Places of a label beside its point: right, up, alignment, in points; the first that is free is taken.
BESIDE = ((7, 5, 'left'), (7, -11, 'left'), (-7, 5, 'right'), (-7, -11, 'right'), (0, 12, 'center'),
          (0, -18, 'center'), (16, -2, 'left'), (-16, -2, 'right'), (0, 22, 'center'))


def check_knobs(k):
    """Raise one UserError that lists every knob of the namespace k that cannot be meant."""
    xs = names_in(k.x)
    require(one_of('size', k.size, tuple(SIZES)),
            at_least('smooth', k.smooth, 0),
            at_least('dpi', k.dpi, 1),
            (xs, f'x is empty; name some of {", ".join(AXES)}'),
            *(one_of('x', name, tuple(AXES)) for name in xs))


# --- reading ---

def find_folders(paths, out):
    """Return the run folders that paths and globs name; with none, every folder of `out` that holds a run.json."""
    folders = []
    for path in paths or [os.path.join(glob.escape(out), '*')]:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path))
        with_runs = [m for m in matches if os.path.exists(os.path.join(m, 'run.json'))]
        if not with_runs:
            raise UserError(f'no run at {path!r}, expected folders with a run.json; train one: python train.py'
                            ' config/sample_pmmp.py')
        folders += [m for m in with_runs if m not in folders]
    return folders


@dataclass
class Found:
    """What run folders tell. trained: {folder: run.json} of trainings, prunings and distillations.

    measured: run.json of lab/diversity.py's folders. scored: {(checkpoint, set): row of eval.py}. whole: {absolute path
    of a checkpoint: row of eval.py on the whole training split}.
    """
    trained: dict = field(default_factory=dict)
    measured: list = field(default_factory=list)
    scored: dict = field(default_factory=dict)
    whole: dict = field(default_factory=dict)


def read_folders(folders):
    """Sort run folders by what they tell; later ones win."""
    found = Found()
    for folder in folders:
        record = read_run(folder)
        rows = [row for row in record.get('rows', ()) if 'from_ckpt' in row]
        every_token = not record.get('max_tokens') and record.get('first_token') == 'score'
        if 'procedure' in record:
            found.trained[folder] = record
        if 'protocol' in record:
            found.measured.append(record)
            continue
        for row in rows:
            found.scored[row['from_ckpt'], row.get('data')] = row
            if every_token and row.get('split') == 'train':
                found.whole[os.path.abspath(row['from_ckpt'])] = row
    return found


def named_curves(records):
    """Return {name: Curves} of runs {folder: run.json}; folders in two places may share a name, then paths tell."""
    names = [record['run_id'] for record in records.values()]
    named = {}
    for folder, record in records.items():
        curves = read_curves(folder)
        if curves:
            name = record['run_id']
            if names.count(name) > 1:
                name = folder
            named[name] = curves
    return named


def origin(record):
    """Follow a pruned or fine-tuned run to the ancestor (or itself) that was trained with an alpha; {} if none was."""
    while record:
        if record.get('alpha') and record['procedure'] != 'vanilla':
            return record
        parent = record.get('parent', {}).get('path', '')
        record = read_run(os.path.dirname(parent) or os.devnull)
    return {}


@dataclass
class Point:
    """A run as a dot of the description-length figures; lengths in bytes, of the training split.

    kind: a key of KINDS. data: name and SHA-256 of the set. n_bytes: of the text. total: model and data together.
    """
    name: str
    kind: str
    alpha: float
    n_params: int
    bits_per_byte: float
    model_bytes: float
    total: float
    data: tuple
    n_bytes: float


def read_point(record, evaluated, size):
    """Return the Point of a run.json; None where its loss on the whole training split is not known.

    evaluated: eval.py's row of it, where there is one; else what the run itself measured at its end. size: as the knob.
    """
    row = evaluated
    # 0 is all blocks (-1 in records of earlier versions); where none were scored there is no train_bits_per_byte.
    measured_whole = record.get('train_bits_per_byte') and record.get('final_train_blocks', 0) <= 0
    if not row and measured_whole:
        row = dict(dataset=record['data']['dataset'], sha256=record['data']['sha256'], n_params=record['n_params'],
                   nonzeros=record['non_zero_params'], nnz4_bytes=record['model_byte_size'],
                   bits_est_bytes=record['bits_est_bytes'], data_bytes=record['train_data_bytes'],
                   bits_per_byte=record['train_bits_per_byte'])
    if not row:
        return None
    trained = origin(record)
    if trained:
        kind = trained['procedure']
    elif row['nonzeros'] > 0.98 * row['n_params']:
        kind = UNPRUNED
    else:
        kind = TAMADE
    model_bytes = row[f'{size}_bytes']
    return Point(
        name=record['run_id'],
        kind=kind,
        alpha=trained.get('alpha', 0.0),
        n_params=row['n_params'],
        bits_per_byte=row['bits_per_byte'],
        model_bytes=model_bytes,
        total=row['data_bytes'] + model_bytes,
        data=(row['dataset'], row['sha256']),
        n_bytes=8 * row['data_bytes'] / row['bits_per_byte'])


def points_by_data(found, size):
    """Return {(set, SHA-256): [Point]} of the runs; say which of them lack a length, and how it is measured."""
    by_data = {}
    for folder, record in found.trained.items():
        point = read_point(record, found.whole.get(os.path.abspath(folder)), size)
        if point is None:
            print(f'left out of size and alpha: {record["run_id"]}: its loss on the whole training split is not known;'
                  f' measure it with python eval.py --from_ckpt={folder} --split=train')
            continue
        by_data.setdefault(point.data, []).append(point)
    return by_data


class Mean(NamedTuple):
    """Points of one alpha, averaged over seeds."""
    alpha: float
    model_bytes: float
    bits_per_byte: float
    total: float


def means(points):
    """Average over seeds; returns {(kind, parameters): [Mean]}, alpha rising."""
    by_setting = {}
    for point in points:
        key = (point.kind, point.n_params, point.alpha)
        by_setting.setdefault(key, []).append((point.model_bytes, point.bits_per_byte, point.total))
    result = {}
    for (kind, n_params, alpha), values in sorted(by_setting.items()):
        averages = [sum(column) / len(values) for column in zip(*values)]
        result.setdefault((kind, n_params), []).append(Mean(alpha, *averages))
    return result


def alphas_of(points):
    """Return {(kind, parameters): number of alphas} of the procedures that have one."""
    return {key: len(rows) for key, rows in means(points).items() if key[0] not in (UNPRUNED, TAMADE)}


def read_diversity(found):
    """Return {evaluation set: {training set: (diversity, half-width, [loss of each run])}}.

    A training set is known by the shares of its sources. Diversities of different protocols are refused.
    """
    protocols = {repr(sorted(record['protocol'].items())) for record in found.measured}
    folders = ', '.join(record['run_id'] for record in found.measured)
    require((len(protocols) < 2, f'diversities of {len(protocols)} protocols cannot share a figure: {folders};'
             ' name folders of one protocol'))

    # The measured diversity of a set, then of the set that each run was trained on, by the shares of its sources.
    measured = {}
    for record in found.measured:
        for row in record.get('rows', ()):
            if 'shares' in row:
                measured[repr(sorted(row['shares'].items()))] = row
    of_run = {}
    for folder, record in found.trained.items():
        mix = record.get('data_mix') or record.get('dataset')
        if mix:
            shares = repr(sorted(parse_mix(mix).items()))
            of_run[os.path.abspath(folder)] = measured.get(shares)

    by_evaluation = {}
    for row in found.scored.values():
        training_set = of_run.get(os.path.abspath(row['from_ckpt'].removesuffix('ckpt.pt')))
        if not training_set:
            continue
        by_training = by_evaluation.setdefault(row['data'], {})
        start = (training_set['diversity'], training_set.get('ci95', 0.0), [])
        _, _, losses = by_training.setdefault(training_set['data'], start)
        losses.append(row['loss_nats'])
    return by_evaluation


# --- drawing ---

def new_figure(width, height):
    """Return a figure of so many inches that knows how large its texts are."""
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def power(alpha):
    """Format 0.0001 as 1e-4."""
    mantissa, exponent = f'{alpha:.2e}'.split('e')
    return f'{float(mantissa):g}e{int(exponent)}'


def label_points(axis, labels, obstacles):
    """Write (text, x, y, colour) beside the points, where it covers neither a point nor an earlier label."""
    renderer = axis.figure.canvas.get_renderer()
    axis.figure.draw_without_rendering()
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in axis.transData.transform(obstacles)]
    for text, x, y, colour in labels:
        for right, up, side in BESIDE:
            note = axis.annotate(text, (x, y), (right, up), textcoords='offset points', fontsize=8.5, color=colour,
                                 ha=side)
            box = note.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def draw_size(points, name, n_bytes, size):
    """Loss against model size, with lines along which model bytes + data bytes stay the same."""
    figure = new_figure(7.4, 5.6)
    axis = figure.subplots()
    x = np.array([point.model_bytes for point in points])
    y = np.array([point.bits_per_byte for point in points])
    pad = max(0.12 * (y.max() - y.min()), 0.02)
    axis.set(xscale='log', xlim=(x.min() / 1.6, x.max() * 1.6), ylim=(y.min() - pad, y.max() + pad),
             xlabel=f'model bytes ({SIZES[size]})', ylabel='code length of the training split (bits per byte)',
             title=f'{name}, {short(n_bytes, "B")}: along a grey line, model bytes + data bytes are the same')
    shorten_ticks(axis.xaxis, 'B')
    axis.grid(False)
    draw_iso_lines(axis, n_bytes, pad)

    # A line through the means of each kind and model, its runs as dots; every second size of model has hollow ones.
    labels = []
    n_params = sorted({point.n_params for point in points})
    for (kind, n), rows in means(points).items():
        colour, marker = KINDS[kind]
        axis.plot([row.model_bytes for row in rows], [row.bits_per_byte for row in rows], '-', color=colour, lw=1,
                  alpha=0.5, zorder=2)
        dots = [point for point in points if (point.kind, point.n_params) == (kind, n)]
        hollow = n_params.index(n) % 2 == 1
        dot = dict(ms=8, mfc=colour, mec='white', mew=0.8)
        if hollow:
            dot = dict(ms=7, mfc='white', mec=colour, mew=1.5)
        label = kind
        if len(n_params) > 1:
            label = f'{kind}, {short(n)} weights'
        axis.plot([point.model_bytes for point in dots], [point.bits_per_byte for point in dots], marker, color=colour,
                  zorder=3, label=label, **dot)
        labels += [(f'α = {power(row.alpha)}', row.model_bytes, row.bits_per_byte, colour) for row in rows if row.alpha]

    best = min(points, key=lambda point: point.total)
    axis.plot(best.model_bytes, best.bits_per_byte, 'o', ms=15, mfc='none', mec='black', mew=1.3, zorder=4,
              label=f'shortest: {short(best.total, "B")} ({best.name})')
    handles = axis.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc='outside lower center', ncols=min(3, len(handles)))
    label_points(axis, labels, list(zip(x, y)))
    return figure


def draw_iso_lines(axis, n_bytes, pad):
    """Draw lines along which model bytes + bits per byte x n_bytes / 8 stay the same, each with its length.

    pad: free height above and below the dots, in bits per byte.
    """
    left, right = axis.get_xlim()
    low, high = axis.get_ylim()
    shortest = left + low * n_bytes / 8
    longest = right + high * n_bytes / 8
    totals = np.geomspace(shortest, longest, 14)
    if longest < 8 * shortest:
        totals = MaxNLocator(12).tick_values(shortest, longest)

    # A label stands where a line enters on the left, else where it leaves at the top, if it is far from the last one.
    sizes = np.geomspace(left, right, 400)
    last = 0
    for total in totals:
        line = (total - sizes) * 8 / n_bytes
        leaves_at = total - high * n_bytes / 8
        axis.plot(sizes, line, color='#C4C4C4', lw=0.9, zorder=1)
        if low < line[0] < high - pad / 2:
            axis.text(left * 1.02, line[0], short(total, 'B'), color=GREY, fontsize=8, va='bottom')
        elif max(left, last * (right / left) ** 0.08) < leaves_at < right / 1.2:
            axis.text(leaves_at, high, short(total, 'B'), color=GREY, fontsize=8, va='top')
            last = leaves_at


def draw_alpha(points, name, n_bytes, size):
    """Two-part description length against alpha, beside what no alpha, no pruning and no model at all give."""
    figure = new_figure(7.8, 5.0)
    axis = figure.subplots()
    references = [('raw data', n_bytes, GREY)]
    by_kind = {kind: rows for (kind, _), rows in means(points).items()}
    for kind, rows in by_kind.items():
        colour, marker = KINDS[kind]
        if kind in (UNPRUNED, TAMADE):
            references.append((kind, rows[0].total, colour))
            continue
        axis.plot([row.alpha for row in rows], [row.total for row in rows], '-', color=colour, lw=1.6, zorder=2)
        dots = [point for point in points if point.kind == kind]
        axis.plot([point.alpha for point in dots], [point.total for point in dots], marker, color=colour, ms=8,
                  mec='white', mew=0.8, zorder=3)
        axis.plot([], [], marker + '-', color=colour, ms=8, mec='white', mew=0.8, label=kind)
    for _, total, colour in references:
        axis.axhline(total, color=colour, lw=1.2, ls='--', zorder=1)

    totals = [point.total for point in points] + [n_bytes]
    alphas = [point.alpha for point in points if point.alpha]
    yscale = 'linear'
    if max(totals) > 6 * min(totals):
        yscale = 'log'
    axis.set(xscale='log', yscale=yscale,
             xlabel='regularisation strength α', ylabel=f'model bytes ({SIZES[size]}) + data bytes',
             title=f'{name}: description length of the training split')
    shorten_ticks(axis.yaxis, 'B')

    # Where a weight is worth its 32 bits.
    fair = 32 * math.log(2) / n_bytes
    if min(alphas) / 2 < fair < max(alphas) * 2:
        axis.axvline(fair, color=GREY, lw=1, ls=':', zorder=0)
        axis.annotate('32 ln 2 / N', (fair, 0.5), (3, 0), xycoords=('data', 'axes fraction'), rotation=90,
                      textcoords='offset points', fontsize=8, color=GREY, va='center')
    axis.legend(loc='best')
    label_references(axis, references, alphas[0])
    return figure


def label_references(axis, references, x):
    """Write (text, total, colour) at the right ends of horizontal lines, pushed apart upwards; x: any that is shown."""
    axis.figure.draw_without_rendering()
    floor = 0.0
    for text, total, colour in sorted(references, key=lambda reference: reference[1]):
        place = axis.transData.transform((x, total))
        height = max(axis.transAxes.inverted().transform(place)[1], floor)
        axis.text(1.01, height, f'{text}\n{short(total, "B")}', transform=axis.transAxes, color=colour, fontsize=8.5,
                  va='center')
        floor = height + 0.085


def draw_diversity(by_evaluation):
    """Loss on each evaluation set against the diversity of the training set: a dot per seed, bars of one deviation."""
    n_columns = min(3, len(by_evaluation))
    n_rows = -(-len(by_evaluation) // n_columns)
    figure = new_figure(4.2 * n_columns, 3.6 * n_rows)
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    names = sorted({name for by_training in by_evaluation.values() for name in by_training})
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for axis, (title, by_training) in zip(axes.flat, by_evaluation.items()):
        for name, (diversity, half_width, losses) in by_training.items():
            spread = float(np.std(losses, ddof=1)) if len(losses) > 1 else 0.0
            axis.errorbar(diversity, np.mean(losses), spread, half_width, fmt='_', color=colours[name], capsize=3,
                          lw=1.2)
            axis.plot([diversity] * len(losses), losses, 'o', color=colours[name], ms=5, mfc='white', mew=1.2)
        axis.set(title=f'evaluated on {title}', xlabel='diversity of the training set', ylabel='loss (nats per token)')
    for axis in axes.flat[len(by_evaluation):]:
        axis.remove()
    handles = [Line2D([], [], ls='', marker='o', color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc='outside lower center', ncols=min(4, len(handles)))
    return figure


# --- figures, or why there is none ---

def save(figure, name, k):
    """Write a figure as PNG and PDF into plot_dir."""
    path = os.path.join(k.plot_dir, name)
    for ending in ('png', 'pdf'):
        figure.savefig(f'{path}.{ending}', dpi=k.dpi)
    print(f'wrote {path}.png and .pdf')


def plot_curves(named, xs, n_folders, k):
    """Write training_curves with a panel for each x that some run {name: Curves} has; say which runs lack which."""
    panels = []
    for x in xs:
        lacking = [name for name, curves in named.items() if curves.along(x) is None]
        if lacking:
            print(f'training_curves by {x} without {", ".join(lacking)}: not recorded when they were trained')
        if len(lacking) < len(named):
            panels.append(x)
    if panels:
        save(draw_curves(named, panels, k.smooth), 'training_curves', k)
    else:
        print(f'skipped training_curves: none of {n_folders} folders has a train_loss.csv and a log.txt with'
              f' {", ".join(xs)}')


def plot_alphas(points, name, label, n_bytes, k):
    """Write a figure against alpha for each size of model that some procedure trained with several alphas."""
    n_alphas = alphas_of(points)
    swept = sorted({n_params for (_, n_params), n in n_alphas.items() if n > 1})
    for n_params in swept:
        of_size = [point for point in points if point.n_params == n_params]
        figure = draw_alpha(of_size, name, n_bytes, k.size)
        stem = f'alpha_{label}'
        if len(swept) > 1:
            stem = f'alpha_{label}_{n_params}'
        save(figure, stem, k)
    if not swept:
        counts = [f'{n} of {kind} ({short(n_params)} weights)' for (kind, n_params), n in n_alphas.items()]
        print(f'skipped alpha_{label}: expected one model and procedure at 2 values of alpha > 0, got'
              f' {", ".join(counts) or "none"}')


if __name__ == '__main__':
    k = SimpleNamespace(**config)
    check_knobs(k)
    folders = find_folders(paths, out)
    matplotlib.rcParams.update(LOOK)
    os.makedirs(plot_dir, exist_ok=True)
    found = read_folders(folders)
    plot_curves(named_curves(found.trained), names_in(x), len(folders), k)

    # Loss against the diversity of the training text, where that was measured.
    if found.measured:
        by_evaluation = read_diversity(found)
        if by_evaluation:
            save(draw_diversity(by_evaluation), 'diversity', k)
        else:
            print('skipped diversity: expected run folders trained on the measured sets, and their eval.py folders')

    # Two figures for each data set; sets of one name are told apart by hash and length.
    by_data = points_by_data(found, size)
    if not by_data:
        print('skipped size and alpha: no run has a loss of its whole training split')
    set_names = [name for name, _ in by_data]
    for (name, sha256), points in by_data.items():
        n_bytes = sum(point.n_bytes for point in points) / len(points)
        label = name
        if set_names.count(name) > 1:
            label = f'{name}_{sha256[:8]}_{n_bytes:.0f}'
        if len(points) > 1:
            save(draw_size(points, name, n_bytes, size), f'size_{label}', k)
        else:
            print(f'skipped size_{label}: 1 run, expected at least 2 on one data set')
        plot_alphas(points, name, label, n_bytes, k)
