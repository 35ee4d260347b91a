"""Tables of numbers: markdown for people, csv for programs."""
import csv
import os

# Columns of runs.csv, in order; every other knob and metric follows.
COLUMNS = (
    'run_id', 'experiment_name', 'timestamp', 'run_time', 'status', 'procedure', 'model', 'dataset', 'alpha', 'beta',
    'initial_p_value', 'initial_u_value', 'learning_rate', 'batch_size', 'seq_length', 'epochs_prelude', 'epochs',
    'epochs_fine_tuning', 'seed', 'tolerated_relative_loss_increase', 'epsilon', 'final_train_loss', 'final_val_loss',
    'mean_train_loss', 'mean_test_loss', 'model_byte_size', 'non_zero_params', 'online_description_length_bytes',
    'training_runtime', 'total_number_of_GPUs')


def write_csv(path, records):
    """Write a table of dicts whole: COLUMNS first, then every other key in sorted order."""
    keys = {key for record in records for key in record}
    others = sorted(keys - set(COLUMNS))
    tmp = f'{path}.{os.getpid()}.tmp'
    with open(tmp, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, [*COLUMNS, *others], restval='', extrasaction='ignore')
        writer.writeheader()
        writer.writerows(records)
    os.replace(tmp, path)


def markdown(rows, columns):
    """Format a list of dicts as a markdown table, columns of numbers to the right."""
    cells = [[text_of(row.get(name, '')) for name in columns] for row in rows]
    lines = [[], []]
    body = [[] for _ in rows]
    for i, name in enumerate(columns):
        width = max(len(name), *(len(row[i]) for row in cells)) if cells else len(name)
        numeric = all(isinstance(row.get(name, 0), (int, float)) for row in rows)
        lines[0].append(f' {name.ljust(width)} ')
        lines[1].append('-' * (width + 1) + (':' if numeric else '-'))
        for line, row in zip(body, cells):
            if numeric:
                line.append(f' {row[i].rjust(width)} ')
            else:
                line.append(f' {row[i].ljust(width)} ')
    return '\n'.join(f'|{"|".join(line)}|' for line in lines + body)


def text_of(value):
    """Return a cell: four places, or none above a thousand; whole numbers with commas."""
    if isinstance(value, float):
        return f'{value:.4f}' if abs(value) < 1000 else f'{value:,.0f}'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'{value:,}'
    return str(value)
