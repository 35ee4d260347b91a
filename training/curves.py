"""Loss curves: what train_loss.csv, log.txt and run.json tell of a training, and its figure by steps, tokens or cost.

Imported by plots.py, for several runs in one figure, and by the scripts that train, for loss.png in their run folder.
matplotlib is loaded by the functions that draw.
"""
import csv
import math
import os
import re

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')     # Okabe & Ito 2008
STYLES = ('-', '--', ':', '-.')
GREY = '#767676'
LOOK = {'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
        'grid.color': '#E6E6E6', 'grid.linewidth': 0.7, 'axes.axisbelow': True, 'legend.frameon': False,
        'axes.titlesize': 10.5, 'savefig.bbox': 'tight', 'pdf.fonttype': 42}
AXES = dict(steps='training steps', tokens='training tokens', flops='training FLOPs', wallclock='training time')


def read_curves(folder):
    """Return what a run folder tells of its training; {} where there are no two steps.

    steps, tokens, nats: arrays, a row of the csv each. flops, wallclock (seconds in steps alone: pauses, evaluations
    and prunings do not count): arrays, or None where the run did not record them. val: [(step, nats)]. prunings:
    [step]. factor: bits per byte of a nat, or 0.
    """
    import numpy as np

    import runs
    try:
        with open(os.path.join(folder, 'train_loss.csv'), newline='', encoding='utf-8') as f:
            whole = f.read().rpartition('\n')[0]                        # a running job's last line may be cut
        with open(os.path.join(folder, 'log.txt'), encoding='utf-8') as f:
            log = f.read()
    except OSError:
        return {}
    table = [[float(r.get(c) or math.nan) for c in ('step', 'tokens', 'loss_nats', 'seconds')]
             for r in csv.DictReader(whole.splitlines())]
    if len(table) < 2:
        return {}
    steps, tokens, nats, seconds = np.array(table).T
    record = runs.read_run(folder)
    units = re.findall(r'loss=([\d.]+) bpb=([\d.]+)', log)
    return dict(steps=steps, tokens=tokens, nats=nats, wallclock=None if np.isnan(seconds).any() else seconds,
                flops=steps * (record['flops_per_token'] * record['batch_size'] * record['seq_length'])
                if 'flops_per_token' in record else None,
                val=[(int(s), float(v)) for s, v in re.findall(r'^\S+ val .*?step=(\d+) loss=([\d.]+)', log, re.M)],
                prunings=[int(s) for s in re.findall(r'^\S+ prune .*?step=(\d+)', log, re.M)],
                factor=float(units[-1][1]) / float(units[-1][0]) if units else 0)


def short(n, unit=''):
    """Format a count to three digits with k, M or G."""
    for letter, width in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if n >= width:
            return f'{n / width:.3g} {letter}{unit}'
    return f'{n:.3g} {unit}'.rstrip()


def shorten_ticks(axis, unit=''):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    axis.set_major_formatter(FuncFormatter(lambda n, _: short(n, unit)))
    axis.set_minor_formatter(NullFormatter())
    if axis.get_scale() == 'log':
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))


def moving_average(values, n):
    """Centred moving average over n values, at the ends over those that exist."""
    import numpy as np
    n = min(n, len(values))
    sums = np.convolve(values, np.ones(n))                              # of values[i - n + 1 : i + 1]
    counts = np.convolve(np.ones(len(values)), np.ones(n))
    return (sums / counts)[n // 2:n // 2 + len(values)]


def draw_curves(named, xs, smooth=0):
    """Return a figure of runs {name: read_curves}: training loss, smoothed, and validation points, a panel for each x.

    xs: keys of AXES; a run is left out of a panel whose quantity it did not record. smooth: rows averaged, 0: a
    fiftieth.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    in_bits = all(c['factor'] for c in named.values())
    longest = max((np.nanmax(c['wallclock']) for c in named.values() if c['wallclock'] is not None), default=0)
    unit, width = ('hours', 3600) if longest > 7200 else ('minutes', 60) if longest > 180 else ('seconds', 1)
    figure = Figure(figsize=(max(4.2 * len(xs), 6.4), 4.4), layout='constrained')
    axes = figure.subplots(1, len(xs), sharey=True, squeeze=False)[0]
    tops, lows, handles = [], [], []
    for i, (name, c) in enumerate(named.items()):
        scale, colour = c['factor'] if in_bits else 1, COLOURS[i % len(COLOURS)]
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        y = moving_average(c['nats'], smooth or max(1, len(c['nats']) // 50)) * scale
        thin = slice(None, None, max(1, len(y) // 2000))
        tops.append(y[len(y) // 5])
        lows += [y.min(), *(nats * scale for _, nats in c['val'])]
        handles.append(Line2D([], [], ls=style, color=colour, lw=1.3, label=name))
        for axis, x in zip(axes, xs):
            if c[x] is None:
                continue
            at = c[x] / (width if x == 'wallclock' else 1)
            axis.plot(at[thin], y[thin], style, color=colour, lw=1.3, label=name)
            if c['val']:
                steps, nats = np.array(c['val']).T
                axis.plot(np.interp(steps, c['steps'], at), nats * scale, 'o', color=colour, ms=4.5, mfc='white',
                          mew=1.2)
            axis.plot(np.interp(c['prunings'], c['steps'], at), np.interp(c['prunings'], c['steps'], y), 'v',
                      color=colour, ms=7, mec='white', mew=0.8, zorder=4)
    margin = 0.05 * (max(tops) - min(lows)) or 0.1
    axes[0].set(ylim=(min(lows) - margin, max(tops) + margin),
                ylabel='training loss (bits per byte)' if in_bits else 'training loss (nats per token)')
    for axis, x in zip(axes, xs):
        axis.set_xlabel(f'{AXES[x]} ({unit})' if x == 'wallclock' else AXES[x])
        axis.locator_params('x', nbins=6)
        if x in ('steps', 'tokens'):
            shorten_ticks(axis.xaxis)
    marks = dict(val=Line2D([], [], ls='', marker='o', color=GREY, ms=4.5, mfc='white', mew=1.2, label='validation'),
                 prunings=Line2D([], [], ls='', marker='v', color=GREY, ms=7, label='pruning'))
    handles += [mark for key, mark in marks.items() if any(c[key] for c in named.values())]
    figure.legend(handles=handles, loc='outside lower center', ncols=min(6, len(handles)))
    return figure


def draw_run(folder, loss_file):
    """Write loss.png into a run folder, loss against steps; return a line for the log. What fails here fails no run.

    loss_file: its train_loss.csv, still open.
    """
    path = os.path.join(folder, 'loss.png')
    loss_file.flush()
    try:
        import matplotlib
        if not (curves := read_curves(folder)):
            return 'no loss.png: fewer than two rows in train_loss.csv'
        with matplotlib.rc_context(LOOK):
            draw_curves({os.path.basename(os.path.normpath(folder)): curves}, ('steps',)).savefig(path, dpi=100)
    except Exception as e:                      # a training of days is worth more than its picture
        return f'no loss.png ({type(e).__name__}: {e}); draw it with python plots.py {folder}'
    return f'drawn {path}'
