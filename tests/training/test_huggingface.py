"""huggingface.py against transformers: the same logits in and out, tokenizers that go along, clear refusals."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import run_here, write_dataset

from configurator import UserError
from corpus import tokens
from model import GPT, ModelConfig, model_args
from training import checkpoint, huggingface

transformers = pytest.importorskip('transformers')
TINY = dict(vocab_size=300, n_positions=32, n_embd=24, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
IDS = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))


def hf_model(seed=0, **options):
    """A GPT-2 of transformers, its weights far from their start, so that every one of them counts."""
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A tiny GPT-2 as save_pretrained writes it; tests only read it."""
    path = tmp_path_factory.mktemp('hf') / 'tiny'
    hf_model().save_pretrained(path)
    return str(path)


@torch.no_grad()
def theirs(model):
    return model(IDS).logits


@torch.no_grad()
def ours(path):
    return checkpoint.load_model(str(path))[0].eval()(IDS)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_logits_are_those_of_transformers(tmp_path, tied, activation):
    """Issue 5: to 1e-5 on a randomly initialised model that transformers saved, and back."""
    model = hf_model(tie_word_embeddings=tied, activation_function=activation)
    model.save_pretrained(tmp_path / 'hf')
    assert float((ours(tmp_path / 'hf') - theirs(model)).abs().max()) < 1e-5
    assert checkpoint.load_checkpoint(str(tmp_path / 'hf'))['model_args']['tied'] == tied
    run_here('runs.py', 'export', str(tmp_path / 'hf'), str(tmp_path / 'back'))
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'back').eval()
    assert torch.equal(theirs(back), theirs(model))


def test_half_precision_shards_and_bare_names(folder, tmp_path):
    """Files of the hub: float16, several safetensors with an index, names without prefix, causal masks as buffers."""
    from safetensors.torch import load_file, save_file
    model = hf_model().half()
    model.save_pretrained(tmp_path / 'half', max_shard_size='20kB')
    assert len(huggingface.weight_files(str(tmp_path / 'half'))) > 1
    assert float((ours(tmp_path / 'half') - theirs(model.float())).abs().max()) < 1e-5
    shutil.copytree(folder, tmp_path / 'bare')
    file = str(tmp_path / 'bare' / 'model.safetensors')
    bare = {k.removeprefix('transformer.'): v for k, v in load_file(file).items()}
    save_file(dict(bare, **{'h.0.attn.bias': torch.ones(1, 1, 32, 32)}), file)
    assert torch.equal(ours(tmp_path / 'bare'), ours(folder))


@pytest.mark.parametrize('positions', ['sinusoidal', 'learned'])
def test_byte_models_and_zeros_go_out(tmp_path, positions):
    """A sparse byte-level model becomes a GPT-2 with its zeros; its tokenizer gives the bytes."""
    model = GPT(ModelConfig(block_size=32, vocab_size=300, n_embd=24, n_layer=2, n_head=2, positions=positions)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p)).mul_(torch.rand_like(p) < 0.3)
    checkpoint.save_checkpoint(str(tmp_path / 'ckpt.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={},
        data=dict(dataset='', sha256='', tokenizer='byte', start_id=10)))
    run_here('runs.py', 'export', str(tmp_path), str(tmp_path / 'hf'))
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'hf').eval()
    with torch.no_grad():
        assert float((theirs(back) - model(IDS)).abs().max()) < 1e-5
    table = 32 * 24 if positions == 'sinusoidal' else 0           # the table of sinusoids is a weight there
    assert sum(int((p != 0).sum()) for n, p in back.named_parameters() if not (table and 'wpe' in n)) == sum(
        int((p != 0).sum()) for p in model.parameters())
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert tok.encode('aé\n日') == list('aé\n日'.encode()) and tok.decode(tok.encode('a é\n')) == 'a é\n'
    again = checkpoint.load_checkpoint(str(tmp_path / 'hf'))
    assert (again['data']['tokenizer'], again['data']['start_id']) == ('byte', 10)


def learned_bpe():
    """A byte-level BPE learned here by the tokenizers library, 300 ids with end-of-text as id 0."""
    from tokenizers import ByteLevelBPETokenizer
    tok = ByteLevelBPETokenizer()
    tok.train_from_iterator(['the model weighs nothing until the text of the model is the text, 日本 and é'] * 50, 300,
                            special_tokens=['<|endoftext|>'], show_progress=False)
    return tok


def test_a_tokenizer_is_rebuilt_from_its_pieces():
    """GPT-2's goes along though tiktoken keeps pieces without merges; checked on a BPE of the tokenizers library."""
    original = learned_bpe()
    vocab = original.get_vocab()
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    as_byte = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(
        b for b in range(256) if b not in visible)}
    pieces = [bytes(as_byte[c] for c in spelled) for spelled, i in sorted(vocab.items(), key=lambda v: v[1]) if i]
    rebuilt = tokens.build_tokenizer([*pieces, b''], len(pieces))
    for text in ('the model weighs the text', "  It's é 日本 nothing\n\n untilmodel", '<|endoftext'):
        assert rebuilt.encode(text).ids == [i - 1 for i in original.encode(text).ids]
        assert rebuilt.decode(rebuilt.encode(text).ids) == text
    assert rebuilt.encode('a<|endoftext|>').ids[-1] == len(pieces)


def test_tokenizer_files_go_along(folder, tmp_path, capsys):
    """Those of the folder it came from, or of the data set it was trained on; a missing one is said."""
    shutil.copytree(folder, tmp_path / 'own')
    learned_bpe().save(str(tmp_path / 'own' / 'tokenizer.json'))
    run_here('runs.py', 'export', str(tmp_path / 'own'), str(tmp_path / 'a'))
    assert (tmp_path / 'a' / 'tokenizer.json').read_bytes() == (tmp_path / 'own' / 'tokenizer.json').read_bytes()
    saved = checkpoint.load_checkpoint(str(tmp_path / 'own'))
    write_dataset(str(tmp_path / 'data'))
    shutil.copy(tmp_path / 'own' / 'tokenizer.json', tmp_path / 'data' / 'toy')
    facts = dict(dataset='toy', sha256='', tokenizer='own', start_id=0)
    config = dict(data_dir=str(tmp_path / 'data'))
    checkpoint.save_checkpoint(str(tmp_path / 'ckpt.pt'), dict(saved, data=facts, config=config))
    run_here('runs.py', 'export', str(tmp_path / 'ckpt.pt'), str(tmp_path / 'b'))
    assert os.path.exists(tmp_path / 'b' / 'tokenizer.json')
    capsys.readouterr()
    run_here('runs.py', 'export', folder, str(tmp_path / 'c'))
    assert "no tokenizer.json of 'tiny'" in capsys.readouterr().out


def test_fifty_thousand_ids_are_gpt2s(tmp_path):
    """Vocabulary 50,257 means GPT-2's BPE and 50,256 its end-of-text: eval.py compares the name."""
    hf_model(vocab_size=50257, n_embd=4, n_layer=1, bos_token_id=50256, eos_token_id=50256).save_pretrained(tmp_path)
    found = checkpoint.load_checkpoint(str(tmp_path))['data']
    assert (found['tokenizer'], found['start_id']) == ('gpt2', 50256)


def broken(folder, tmp_path, config=(), cut=0):
    """Copy the folder, change config.json, cut bytes off the weights."""
    path = tmp_path / 'broken'
    shutil.copytree(folder, path)
    values = json.loads((path / 'config.json').read_text()) | dict(config)
    (path / 'config.json').write_text(json.dumps(values))
    if cut:
        os.truncate(path / 'model.safetensors', (path / 'model.safetensors').stat().st_size - cut)
    return str(path)


@pytest.mark.parametrize('change, words', [
    (dict(config=dict(model_type='llama')), "holds a 'llama' model"),
    (dict(config=dict(activation_function='silu')), "activation_function = 'silu', expected one of gelu_new"),
    (dict(config=dict(n_inner=48)), 'n_inner = 48 (expected 96)'),
    (dict(config=dict(scale_attn_by_inverse_layer_idx=True)), 'scale_attn_by_inverse_layer_idx = True'),
    (dict(config=dict(n_layer=4)), 'missing h.3.'), (dict(config=dict(n_layer=2)), 'unknown h.2.'),
    (dict(config=dict(eos_token_id=50256)), 'expected an id below vocab_size = 300'), (dict(cut=100), 'is cut short')])
def test_refusals(folder, tmp_path, change, words):
    """One line that names the file, the value and what is expected."""
    with pytest.raises(UserError) as error:
        checkpoint.load_model(broken(folder, tmp_path, **change))
    assert words in str(error.value) and '\n' not in str(error.value)


def test_a_folder_without_safetensors_and_with_a_broken_config(folder, tmp_path):
    """What older saves look like, and a half-fetched folder."""
    path = broken(folder, tmp_path)
    os.remove(os.path.join(path, 'model.safetensors'))
    with pytest.raises(UserError, match='no model.safetensors'):
        checkpoint.load_checkpoint(path)
    with open(os.path.join(path, 'config.json'), 'w') as f:
        f.write('{')
    with pytest.raises(UserError, match='cannot be read as JSON'):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize('path, words', [('gpt2', 'no model of that id'), ('no/such-model', 'no model of that id'),
                                         ('out/nowhere/ckpt.pt', 'no checkpoint at'), ('../x', 'no checkpoint at')])
def test_hub_out_of_reach(path, words, tmp_path, monkeypatch):
    """What is no path is a hub id; offline that is one line with both cures. A .pt is never asked for on the hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        checkpoint.load_checkpoint(path)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_a_hub_id_is_taken_from_the_cache(folder, tmp_path, monkeypatch):
    """An id reaches the folder that huggingface_hub names, and asks for no more files than it needs."""
    import huggingface_hub
    asked = {}
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda repo, allow_patterns: asked.update(
        repo=repo, patterns=allow_patterns) or folder)
    assert torch.equal(ours('someone/tiny'), ours(folder))
    assert asked['repo'] == 'someone/tiny' and 'pytorch_model.bin' not in asked['patterns']
    sha256 = checkpoint.parent_of(folder)['sha256']
    assert checkpoint.parent_of('someone/tiny') == dict(path='someone/tiny', sha256=sha256)


def test_export_refuses(folder, tmp_path):
    """Rotary positions are no GPT-2, and an earlier export is not overwritten unasked."""
    model = GPT(ModelConfig(block_size=8, n_embd=8, n_layer=1, n_head=2, positions='rotary', norm='rmsnorm'))
    checkpoint.save_checkpoint(str(tmp_path / 'ckpt.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={},
        data=dict(dataset='', tokenizer='byte', start_id=10)))
    with pytest.raises(UserError, match="norm = 'rmsnorm', positions = 'rotary'"):
        run_here('runs.py', 'export', str(tmp_path / 'ckpt.pt'), str(tmp_path / 'x'))
    run_here('runs.py', 'export', folder, str(tmp_path / 'y'))
    with pytest.raises(UserError, match='--overwrite'):
        run_here('runs.py', 'export', folder, str(tmp_path / 'y'))
    run_here('runs.py', 'export', folder, str(tmp_path / 'y'), '--overwrite')


def test_generation_agrees(folder):
    """Stepwise with our cache, transformers' in one go: the next token is the same."""
    model, hf = checkpoint.load_model(folder)[0].eval(), transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    cache, steps = model.new_cache(), []
    with torch.no_grad():
        for i in range(8):
            steps.append(model(IDS[:, i:i + 1], cache=cache)[:, 0])
        expected = hf(IDS[:, :8]).logits
    np.testing.assert_allclose(torch.stack(steps, 1), expected, atol=1e-5)
