"""Loss curves: what train_loss.csv, log.txt and run.json tell of a training, and its figure by steps, tokens or cost.

Imported by plots.py, for several runs in one figure, and by the scripts that train, for loss.png in their run folder.
matplotlib is loaded by the functions that draw.
"""
import csv
import math
import os
import re
from dataclasses import dataclass

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')     # Okabe & Ito 2008
STYLES = ('-', '--', ':', '-.')
GREY = '#767676'
LOOK = {'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
        'grid.color': '#E6E6E6', 'grid.linewidth': 0.7, 'axes.axisbelow': True, 'legend.frameon': False,
        'axes.titlesize': 10.5, 'savefig.bbox': 'tight', 'pdf.fonttype': 42}
AXES = dict(steps='training steps', tokens='training tokens', flops='training FLOPs', wallclock='training time')


# --- reading ---

@dataclass
class Curves:
    """What a run folder tells of its training: arrays with an entry for each row of train_loss.csv, and events.

    wallclock: seconds in steps alone; pauses, evaluations and prunings do not count. Where a run did not record flops
    or wallclock they are None. val: [(step, nats)]. prunings: [step]. bits_per_nat: bits per byte of text for each nat
    per token, 0 where the log does not say.
    """
    steps: object
    tokens: object
    nats: object
    flops: object
    wallclock: object
    val: list
    prunings: list
    bits_per_nat: float

    def along(self, x):
        """Return the array of one of AXES, or None where the run did not record it."""
        return getattr(self, x)


def read_curves(folder):
    """Return the Curves of a run folder; None where there are no two steps."""
    import numpy as np

    from training.folder import read_run
    try:
        with open(os.path.join(folder, 'train_loss.csv'), newline='', encoding='utf-8') as f:
            whole_lines = f.read().rpartition('\n')[0]                  # a running job's last line may be cut
        with open(os.path.join(folder, 'log.txt'), encoding='utf-8') as f:
            log = f.read()
    except OSError:
        return None
    table = []
    for row in csv.DictReader(whole_lines.splitlines()):
        table.append([float(row.get(c) or math.nan) for c in ('step', 'tokens', 'loss_nats', 'seconds')])
    if len(table) < 2:
        return None
    steps, tokens, nats, seconds = np.array(table).T

    # What a run recorded only from some version on.
    flops = wallclock = None
    record = read_run(folder)
    if 'flops_per_token' in record:
        tokens_per_step = record['batch_size'] * record['seq_length']
        flops = steps * (record['flops_per_token'] * tokens_per_step)
    if not np.isnan(seconds).any():
        wallclock = seconds

    # Events are lines of the log. Its last loss in both units says what a nat is in bits per byte.
    val = re.findall(r'^\S+ val .*?step=(\d+) loss=([\d.]+)', log, re.M)
    prunings = re.findall(r'^\S+ prune .*?step=(\d+)', log, re.M)
    both_units = re.findall(r'loss=([\d.]+) bpb=([\d.]+)', log)
    bits_per_nat = 0
    if both_units:
        loss, bits_per_byte = both_units[-1]
        bits_per_nat = float(bits_per_byte) / float(loss)
    return Curves(
        steps=steps,
        tokens=tokens,
        nats=nats,
        flops=flops,
        wallclock=wallclock,
        val=[(int(step), float(loss)) for step, loss in val],
        prunings=[int(step) for step in prunings],
        bits_per_nat=bits_per_nat)


# --- numbers on axes ---

def short(n, unit=''):
    """Format a count to three digits with k, M or G."""
    for letter, width in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if n >= width:
            return f'{n / width:.3g} {letter}{unit}'
    return f'{n:.3g} {unit}'.rstrip()


def shorten_ticks(axis, unit=''):
    """Label an axis (axes.xaxis or .yaxis) with short counts."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    axis.set_major_formatter(FuncFormatter(lambda n, _: short(n, unit)))
    axis.set_minor_formatter(NullFormatter())
    if axis.get_scale() == 'log':
        low, high = sorted(axis.get_view_interval())
        is_narrow = high < 300 * low
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))


def time_unit(seconds):
    """Return the unit in which a training of so many seconds is shown, and its length in seconds."""
    if seconds > 7200:
        return 'hours', 3600
    if seconds > 180:
        return 'minutes', 60
    return 'seconds', 1


def moving_average(values, n):
    """Centred moving average over n values, at the ends over those that exist."""
    import numpy as np
    n = min(n, len(values))
    sums = np.convolve(values, np.ones(n))                              # of values[i - n + 1 : i + 1]
    counts = np.convolve(np.ones(len(values)), np.ones(n))
    first = n // 2
    return (sums / counts)[first:first + len(values)]


# --- drawing ---

def draw_curves(named, xs, smooth=0):
    """Return a figure of runs {name: Curves}: training loss, smoothed, and validation points, a panel for each x.

    xs: keys of AXES; a run is left out of a panel whose quantity it did not record. smooth: rows averaged, 0: a
    fiftieth.
    """
    import numpy as np
    from matplotlib.figure import Figure
    figure = Figure(figsize=(max(4.2 * len(xs), 6.4), 4.4), layout='constrained')
    panels = figure.subplots(1, len(xs), sharey=True, squeeze=False)[0]

    # All runs in bits per byte, or, where that is not known of each, all in nats.
    in_bits = all(curves.bits_per_nat for curves in named.values())
    timed = [curves.wallclock for curves in named.values() if curves.wallclock is not None]
    unit, seconds_per_unit = time_unit(max(map(np.nanmax, timed), default=0))
    tops = []
    lows = []
    for i, (name, curves) in enumerate(named.items()):
        scale = curves.bits_per_nat if in_bits else 1
        width = smooth or max(1, len(curves.nats) // 50)
        losses = moving_average(curves.nats, width) * scale
        tops.append(losses[len(losses) // 5])
        lows.append(losses.min())
        lows += [nats * scale for _, nats in curves.val]
        for panel, x in zip(panels, xs):
            at = curves.along(x)
            if at is None:
                continue
            if x == 'wallclock':
                at = at / seconds_per_unit
            draw_run_in(panel, name, curves, at, losses, scale, *look_of(i))

    # The first fifth of a training, where the loss falls fast, may leave the frame.
    margin = 0.05 * (max(tops) - min(lows)) or 0.1
    panels[0].set(ylim=(min(lows) - margin, max(tops) + margin),
                  ylabel='training loss (bits per byte)' if in_bits else 'training loss (nats per token)')
    for panel, x in zip(panels, xs):
        panel.set_xlabel(f'{AXES[x]} ({unit})' if x == 'wallclock' else AXES[x])
        panel.locator_params('x', nbins=6)
        if x in ('steps', 'tokens'):
            shorten_ticks(panel.xaxis)
    handles = legend_of(named)
    figure.legend(handles=handles, loc='outside lower center', ncols=min(6, len(handles)))
    return figure


def look_of(i):
    """Return colour and line style of run number i: all colours with one style, then all with the next."""
    colour = COLOURS[i % len(COLOURS)]
    style = STYLES[i // len(COLOURS) % len(STYLES)]
    return colour, style


def draw_run_in(panel, name, curves, at, losses, scale, colour, style):
    """Draw the smoothed losses of one run at x positions `at`, its validation points and its prunings."""
    import numpy as np
    thin = slice(None, None, max(1, len(losses) // 2000))
    panel.plot(at[thin], losses[thin], style, color=colour, lw=1.3, label=name)
    if curves.val:
        steps, nats = np.array(curves.val).T
        places = np.interp(steps, curves.steps, at)
        panel.plot(places, nats * scale, 'o', color=colour, ms=4.5, mfc='white', mew=1.2)
    places = np.interp(curves.prunings, curves.steps, at)
    heights = np.interp(curves.prunings, curves.steps, losses)
    panel.plot(places, heights, 'v', color=colour, ms=7, mec='white', mew=0.8, zorder=4)


def legend_of(named):
    """Return handles of the legend: a line for each run, a mark for each kind of event that one of them has."""
    from matplotlib.lines import Line2D
    handles = []
    for i, name in enumerate(named):
        colour, style = look_of(i)
        handles.append(Line2D([], [], ls=style, color=colour, lw=1.3, label=name))
    if any(curves.val for curves in named.values()):
        handles.append(Line2D([], [], ls='', marker='o', color=GREY, ms=4.5, mfc='white', mew=1.2, label='validation'))
    if any(curves.prunings for curves in named.values()):
        handles.append(Line2D([], [], ls='', marker='v', color=GREY, ms=7, label='pruning'))
    return handles


def draw_run(folder, loss_file):
    """Write loss.png into a run folder, loss against steps; return a line for the log. What fails here fails no run.

    loss_file: its train_loss.csv, still open.
    """
    path = os.path.join(folder, 'loss.png')
    loss_file.flush()
    try:
        import matplotlib
        curves = read_curves(folder)
        if curves is None:
            return 'no loss.png: fewer than two rows in train_loss.csv'
        name = os.path.basename(os.path.normpath(folder))
        with matplotlib.rc_context(LOOK):
            draw_curves({name: curves}, ('steps',)).savefig(path, dpi=100)
    except Exception as e:                      # a training of days is worth more than its picture
        return f'no loss.png ({type(e).__name__}: {e}); draw it with python plots.py {folder}'
    return f'drawn {path}'
