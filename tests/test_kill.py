"""Four kills of the kill test, and that its comparison sees what it is there to see."""
import os

import pytest
import torch
from kill_test import N_STEPS, differences, interrupt_test, kill_test, online_test

from training.checkpoint import save_checkpoint


@pytest.mark.slow
def test_four_kills_leave_the_result_as_it_was(tmp_path, capsys):
    """kill -9 at any moment, then --init_from=resume: same tensors to the bit, no gap and no repeat in the log."""
    problems = kill_test(str(tmp_path), 4, 1, seed=1)
    assert problems == [] and capsys.readouterr().out.count('kill ') == 4


@pytest.mark.slow
@pytest.mark.parametrize('name, ranks', [('train', 2), ('distill', 1), ('probe', 1)])
def test_ctrl_c_at_any_moment_leaves_the_result_as_it_was(name, ranks, tmp_path, capsys):
    """Ctrl-C on the process that a terminal would send it to, then --init_from=resume."""
    seed = 1                                                # early in the run: hundreds of steps follow
    assert interrupt_test(str(tmp_path), name, 1, ranks, seed) == []
    assert capsys.readouterr().out.count('paused at step') == 1


@pytest.mark.slow
def test_ctrl_c_while_coding_with_a_state(tmp_path):
    """online and unpack with --state, each stopped and continued until it is done."""
    assert online_test(str(tmp_path), 1, seed=2) == []


def fake_run(folder, theta, steps=range(1, N_STEPS + 1), loss='1.0', moment=0.5):
    os.mkdir(folder)
    for name in ('ckpt.pt', 'best.pt'):
        save_checkpoint(str(folder / name), dict(
            model=dict(a=torch.tensor(theta)), train_seconds=len(str(folder)), config=dict(init_from=str(folder)),
            optimizer=dict(state={0: dict(exp_avg=torch.tensor([moment]))})))
    rows = ''.join(f'main,0,{step},{loss},{step * len(folder.name)}\n' for step in steps)
    (folder / 'train_loss.csv').write_text('phase,epoch,step,loss_nats,seconds\n' + rows)
    return str(folder)


@pytest.mark.parametrize('change, words', [
    (dict(), None), (dict(theta=[1.0, 0.0 + 1e-9]), 'model differs'), (dict(moment=0.5000001), 'optimizer differs'),
    (dict(loss='1.000001'), 'first different row 1'), (dict(steps=[*range(1, N_STEPS), N_STEPS - 1]), '599 different'),
    (dict(steps=range(2, N_STEPS + 1)), '599 steps')])
def test_the_comparison_sees_the_last_bit(tmp_path, change, words):
    """A comparison that skips a tensor would call every resume exact."""
    a = fake_run(tmp_path / 'a', [1.0, 0.0])
    b = fake_run(tmp_path / 'bb', **dict(dict(theta=[1.0, 0.0]), **change))
    found = differences(a, b)
    assert found == [] if words is None else any(words in line for line in found), found
