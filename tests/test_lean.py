"""pmmp_state = 'lean': resumes to the bit, prunes, holds what it says, and is no continuation of the exact one."""
import pytest
from conftest import THREE_PHASES, assert_resumes, stop_at

from configurator import UserError
from training.checkpoint import load_checkpoint, save_checkpoint
from training.folder import read_run

LEAN = (*THREE_PHASES, '--pmmp_state=lean')


@pytest.mark.parametrize('stop', (3, 14, 20))
def test_resume_is_bit_exact(stop, train_tiny, tmp_path, monkeypatch):
    """γ and u of a checkpoint, before, between and after prunings."""
    assert_resumes(LEAN, stop, train_tiny, tmp_path, monkeypatch)


def test_masked_weights_have_no_gamma(train_tiny, tmp_path, monkeypatch):
    """A dropped weight is not kept with any probability; u, a multiplier, stays."""
    stop_at(monkeypatch, 14)                                # in the main phase, after the first pruning
    assert train_tiny(*LEAN) == 85
    saved = load_checkpoint(str(tmp_path / 'run'))
    assert set(saved['procedure']) == {'gamma', 'u', 'optimizer'} and saved['masks']
    for name, mask in saved['masks'].items():
        assert not saved['procedure']['gamma'][name][~mask & (saved['model'][name] == 0)].any()
        assert (saved['procedure']['u'][name] >= 0.1 - 1e-6).all()      # where it began
    assert any(bool((~m).any()) for m in saved['masks'].values())


def test_it_adds_as_much_state_as_an_optimiser(train_tiny, tmp_path):
    """8 bytes for each penalised weight, as Adam's moments, where the exact form adds 36."""
    held = {}
    flags = ('--max_iters=2', '--alpha=1e-4', '--final_train_blocks=0')
    for name, more in (('vanilla', ()), ('lean', ('--procedure=pmmp', '--pmmp_state=lean')),
                       ('exact', ('--procedure=pmmp',))):
        assert train_tiny(*flags, *more, out=name) == 0
        held[name] = read_run(tmp_path / name)['held_bytes_per_rank']
    n = sum(t.numel() for t in load_checkpoint(str(tmp_path / 'lean'))['procedure']['gamma'].values())
    assert held['lean'] - held['vanilla'] == 8 * n
    assert 36 * n <= held['exact'] - held['vanilla'] < 36.5 * n         # a step counter per tensor


def test_the_other_form_cannot_be_continued(train_tiny, monkeypatch):
    """w and moments that one has and the other lacks: refused in one line instead of a KeyError."""
    with monkeypatch.context() as patch:
        stop_at(patch, 14)
        assert train_tiny(*LEAN) == 85
    with pytest.raises(UserError, match='pmmp_state'):
        train_tiny(*THREE_PHASES, '--init_from=resume')
    with pytest.raises(UserError, match='pmmp_state'):
        train_tiny(*THREE_PHASES, '--pmmp_state=leaner', '--overwrite')
    with pytest.raises(UserError, match='procedure_learning_rate = -1'):        # sign steps would go uphill
        train_tiny(*LEAN, '--procedure_learning_rate=-1', '--overwrite')


def test_a_checkpoint_from_before_the_knob_is_an_exact_one(train_tiny, tmp_path, monkeypatch):
    """A knob that a checkpoint lacks has the value that its run had, not the one asked for now."""
    with monkeypatch.context() as patch:
        stop_at(patch, 14)
        assert train_tiny(*THREE_PHASES) == 85
    path = str(tmp_path / 'run' / 'ckpt.pt')
    checkpoint = load_checkpoint(path)
    for knob in ('pmmp_state', 'matrix_optimizer', 'muon_rate_ratio', 'qat_bits'):
        checkpoint['config'].pop(knob)
    save_checkpoint(path, checkpoint, 1)
    for flag, had in (('--pmmp_state=lean', 'exact'), ('--matrix_optimizer=muon', 'adamw')):
        with pytest.raises(UserError, match=f'the checkpoint has {had!r}'):
            train_tiny(*THREE_PHASES, flag, '--init_from=resume')
    assert train_tiny(*THREE_PHASES, '--init_from=resume') == 0


def test_a_checkpoint_of_a_retired_knob_goes_on_where_it_was_off(train_tiny, tmp_path, monkeypatch):
    """decoupled = False is what is always done now; a run that had it on would go on with other arithmetic."""
    with monkeypatch.context() as patch:
        stop_at(patch, 14)
        assert train_tiny(*THREE_PHASES) == 85
    path = str(tmp_path / 'run' / 'ckpt.pt')
    checkpoint = load_checkpoint(path)
    assert 'decoupled' not in checkpoint['config']
    checkpoint['config'] |= dict(decoupled=True, tokens_per_second=1e5)
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError, match='cannot resume: decoupled = False, the checkpoint has True') as e:
        train_tiny(*THREE_PHASES, '--init_from=resume')
    assert '\n' not in str(e.value)
    checkpoint['config']['decoupled'] = False
    save_checkpoint(path, checkpoint)
    assert train_tiny(*THREE_PHASES, '--init_from=resume') == 0


def test_best_weights_can_be_continued_as_they_are(train_tiny, tmp_path, monkeypatch):
    """best.pt in place of ckpt.pt: weights and masks at their step; optimisers, γ and u start afresh."""
    with monkeypatch.context() as patch:
        stop_at(patch, 17)
        assert train_tiny(*LEAN, '--eval_interval=4') == 85
    (tmp_path / 'run' / 'best.pt').replace(tmp_path / 'run' / 'ckpt.pt')
    assert train_tiny(*LEAN, '--eval_interval=4', '--init_from=resume') == 0
    assert 'start afresh' in (tmp_path / 'run' / 'log.txt').read_text()
