"""Checkpoints of strangers and of failing disks: no code of theirs is run, no flipped bit is resumed from.

The sharded folder is one that two real ranks wrote; what is done to it here is done to copies.
"""
import dataclasses
import json
import os
import pickle
import random
import shutil
import sys
import types
import warnings

import pytest
import torch
from conftest import ROOT, TINY, run_here, same, snapshot, torchrun
from test_checksums import flip, refused
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from configurator import UserError
from training import parallel, untrusted
from training.checkpoint import CHECKPOINT_FORMAT, load_checkpoint

pytestmark = pytest.mark.slow                   # two ranks write the folder


class Planted:
    """What a hostile file would hold: makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('planted',)


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory, toy):
    """The run folder of a training by two ranks, which holds ckpt.sharded."""
    folder = tmp_path_factory.mktemp('shards') / 'run'
    flags = ('--max_iters=2', '--shard=full', '--sharded_ckpt', '--procedure=pmmp', '--final_train_blocks=0')
    done = torchrun(2, os.path.join(ROOT, 'train.py'), *TINY, f'--data_dir={toy}', '--dataset=toy',
                    f'--out_dir={folder}', *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def shards(two_ranks, tmp_path):
    """A copy of the sharded folder."""
    return shutil.copytree(two_ranks / 'ckpt.sharded', tmp_path / 'ckpt.sharded')


@pytest.fixture
def old_shards(shards):
    """A copy as the code before checksums wrote it."""
    (shards / 'checksums.json').unlink(missing_ok=True)
    return shards


# --- .metadata runs no code ---

@pytest.fixture
def hostile(shards, tmp_path, monkeypatch):
    """A sharded folder whose .metadata plants something in the working folder."""
    monkeypatch.chdir(tmp_path)
    (shards / '.metadata').write_bytes(pickle.dumps(Planted()))
    (shards / 'checksums.json').unlink(missing_ok=True)                 # a stranger would write fitting ones
    return str(shards)


def lm_eval_in_name(monkeypatch):
    """Let harness.py come as far as its checkpoint where lm_eval is not installed."""
    modules = {'lm_eval': {}, 'lm_eval.api': {}, 'lm_eval.api.model': dict(LM=object),
               'lm_eval.tasks': dict(TaskManager=None), 'lm_eval.utils': dict(make_table=None)}
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


IN_NEW = ('--data_dir={data}', '--dataset=toy', '--out_dir=new')
CONSUMERS = {
    'train init_from': ('train.py', '--init_from={bad}', *TINY, *IN_NEW),
    'train encoder_ckpt': ('train.py', '--encoder_ckpt={bad}', '--wrapper=autoencoder', '--objective=autoencode',
                           '--spread=unroll', *TINY, *IN_NEW),
    'distill teacher': ('distill.py', '--teacher={bad}', *TINY, *IN_NEW),
    'distill init_from': ('distill.py', '--teacher={good}', '--init_from={bad}', *TINY, *IN_NEW),
    'prune': ('prune.py', '--from_ckpt={bad}', '--device=cpu', *IN_NEW),
    'eval': ('eval.py', '--from_ckpt={bad}', '--data_dir={data}', '--dataset=toy', '--device=cpu'),
    'sample': ('sample.py', '--from_ckpt={bad}', '--device=cpu'),
    'compress pack': ('compress.py', 'pack', '{bad}', 'text.txt', 'new.mdl'),
    'probe': ('lab/probe.py', '--from_ckpt={bad}', '--device=cpu', *IN_NEW),
    'harness': ('lab/harness.py', '--from_ckpt={bad}', '--tasks=lambada_openai', '--device=cpu'),
    'runs convert': ('runs.py', 'convert', '{bad}', 'new.pt'),
    'runs export': ('runs.py', 'export', '{bad}', 'new'),
    'runs export_weights': ('runs.py', 'export_weights', '{bad}', 'new.pt')}


@pytest.mark.parametrize('name', CONSUMERS)
def test_every_script_refuses_a_hostile_folder(name, hostile, two_ranks, toy, tmp_path, monkeypatch):
    """torch's own reader unpickles .metadata: sample.py --from_ckpt=FOLDER ran whatever a stranger had put there."""
    lm_eval_in_name(monkeypatch)
    (tmp_path / 'text.txt').write_bytes(b'a text')
    script, *flags = CONSUMERS[name]
    with pytest.raises(UserError) as e:
        run_here(script, *(flag.format(bad=hostile, good=two_ranks, data=toy) for flag in flags))
    line = str(e.value)
    assert '\n' not in line and 'mkdir' in line and hostile in line, line
    assert not os.path.exists('planted')


def test_resuming_a_hostile_folder_is_refused(hostile, two_ranks, toy, tmp_path):
    """A run folder from a stranger, continued."""
    run = shutil.copytree(two_ranks, tmp_path / 'run')
    shutil.rmtree(run / 'ckpt.sharded')
    os.rename(hostile, run / 'ckpt.sharded')
    with pytest.raises(UserError, match='mkdir'):
        run_here('train.py', *TINY, f'--data_dir={toy}', '--dataset=toy', f'--out_dir={run}', '--init_from=resume',
                 '--max_iters=2', '--procedure=pmmp', '--final_train_blocks=0')
    assert not os.path.exists('planted')


def plant_deep(metadata):
    metadata.planner_data['/x'] = Planted()


def plant_in_key(metadata):
    metadata.storage_data[Planted()] = None


def plant_in_state(metadata):
    next(iter(metadata.state_dict_metadata.values())).chunks.append(Planted())


@pytest.mark.parametrize('plant', [plant_deep, plant_in_key, plant_in_state])
def test_code_inside_a_real_metadata_is_not_run(plant, old_shards, tmp_path, monkeypatch):
    """In a field that nobody reads, in a key, in a list."""
    monkeypatch.chdir(tmp_path)
    edit_metadata(old_shards, plant)
    refused(str(old_shards), 'mkdir')
    assert not os.path.exists('planted')


def test_pieces_and_the_rest_run_no_code(old_shards, tmp_path, monkeypatch):
    """The other files of the folder are pickles too."""
    monkeypatch.chdir(tmp_path)
    torch.save(dict(format=CHECKPOINT_FORMAT, model=Planted()), old_shards / 'rest.pt')
    refused(str(old_shards))
    assert not os.path.exists('planted')


def test_a_piece_is_read_by_weights_only(old_shards, tmp_path, monkeypatch):
    """A piece with code in it, in the place and of the length that .metadata names."""
    monkeypatch.chdir(tmp_path)
    torch.save([Planted(), torch.zeros(100_000)], old_shards / '__9_0.distcp')

    def point_there(metadata):
        info = first_info(metadata)
        info.relative_path = '__9_0.distcp'
        info.offset = 0
        info.length = (old_shards / '__9_0.distcp').stat().st_size
    edit_metadata(old_shards, point_there)
    refused(str(old_shards), 'Weights only load failed')
    assert not os.path.exists('planted')


# --- .metadata stays in its folder and within its files ---

def edit_metadata(folder, change):
    """Change the Metadata object of a folder."""
    path = os.path.join(folder, '.metadata')
    with open(path, 'rb') as f:
        metadata = pickle.load(f)
    change(metadata)
    with open(path, 'wb') as f:
        pickle.dump(metadata, f)


def first_info(metadata):
    return next(iter(metadata.storage_data.values()))


def first_tensor(metadata):
    """The first weight with several rows on both ranks."""
    return next(t for t in metadata.state_dict_metadata.values() if len(t.size) == 2 and len(t.chunks) == 2)


def leave_by_dots(metadata):
    first_info(metadata).relative_path = '../elsewhere.distcp'


def leave_by_root(metadata):
    first_info(metadata).relative_path = '/elsewhere.distcp'


def point_at_nothing(metadata):
    first_info(metadata).relative_path = '__7_0.distcp'


def point_at_a_folder(metadata):
    first_info(metadata).relative_path = '.'


def read_behind_the_end(metadata):
    first_info(metadata).offset = 1 << 40


def read_before_the_start(metadata):
    first_info(metadata).offset = -1


def read_too_much(metadata):
    first_info(metadata).length = 1 << 40


def be_huge(metadata):
    tensor = first_tensor(metadata)
    tensor.size = torch.Size([1 << 40, tensor.size[1]])


def be_huge_in_one_piece(metadata):
    tensor = first_tensor(metadata)
    tensor.size = torch.Size([1 << 40, tensor.size[1]])
    tensor.chunks = [dataclasses.replace(tensor.chunks[0], sizes=tensor.size)]


def have_a_gap(metadata):
    tensor = first_tensor(metadata)
    tensor.chunks = tensor.chunks[:1]


def be_of_bytes(metadata):
    key = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[key] = BytesStorageMetadata()


def be_compressed(metadata):
    first_info(metadata).transform_descriptors = ['stream.zstd']


def be_of_another_type(metadata):
    first_tensor(metadata).properties.dtype = torch.float16


def share_bytes(metadata):
    """Every tensor in the bytes of the longest one: a small file would fill any amount of memory."""
    longest = max(metadata.storage_data.values(), key=lambda info: info.length)
    for info in metadata.storage_data.values():
        vars(info).update(vars(longest))


CHANGES = [leave_by_dots, leave_by_root, point_at_nothing, point_at_a_folder, read_behind_the_end,
           read_before_the_start, read_too_much, be_huge, be_huge_in_one_piece, have_a_gap, be_of_bytes, be_compressed,
           be_of_another_type, share_bytes]


@pytest.mark.parametrize('change', CHANGES)
def test_metadata_that_lies_is_refused(change, old_shards, tmp_path):
    """Paths outside the folder, places outside the files, tensors that nothing fills: one line each."""
    shutil.copy(old_shards / '__0_0.distcp', tmp_path / 'elsewhere.distcp')
    edit_metadata(old_shards, change)
    refused(str(old_shards), 'cut short or not a checkpoint')


def test_a_path_outside_is_named(old_shards, tmp_path):
    """The file outside is a good one, so it is the name that is refused."""
    shutil.copy(old_shards / '__0_0.distcp', tmp_path / 'elsewhere.distcp')

    def move_out(metadata):
        for info in metadata.storage_data.values():
            if info.relative_path == '__0_0.distcp':
                info.relative_path = str(tmp_path / 'elsewhere.distcp')
    edit_metadata(old_shards, move_out)
    refused(str(old_shards), 'outside the folder')


def test_metadata_that_is_no_pickle_is_one_line(old_shards):
    for content in (b'', b'\x80\x04.', b'\x80\x04N.', b'no pickle', b'\x80\x04P1\n.', pickle.dumps([1])):
        (old_shards / '.metadata').write_bytes(content)
        refused(str(old_shards))


# --- sharded folders of real runs still load ---

def test_a_folder_of_two_ranks_equals_what_torch_reads(two_ranks, old_shards):
    """Read by torch's own reader and by ours, with checksums and as older code wrote it."""
    import torch.distributed.checkpoint as dcp
    metadata = dcp.FileSystemReader(two_ranks / 'ckpt.sharded').read_metadata().state_dict_metadata
    tensors = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in metadata.items()}
    with warnings.catch_warnings(action='ignore'):          # that it loads in a single process: as asked
        dcp.load(tensors, checkpoint_id=two_ranks / 'ckpt.sharded', no_dist=True)
    layouts = untrusted.read_metadata(old_shards)
    assert len(tensors) > 50 and layouts.keys() == tensors.keys()
    assert all(same(untrusted.read_tensor(old_shards, layouts[key]), t) for key, t in tensors.items())
    assert same(load_checkpoint(two_ranks), load_checkpoint(old_shards))


def test_uneven_rows_and_no_rows(tmp_path):
    """Three ranks and 1 to 9 rows: several empty pieces lie at the end of a tensor, at one place."""
    worker = tmp_path / 'worker.py'
    worker.write_text(THREE_RANKS)
    done = torchrun(3, worker, tmp_path / 'folder')
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = parallel.load_sharded(str(tmp_path / 'folder'))
    expected = [torch.arange(n * 5.0).view(n, 5) for n in (1, 2, 3, 5, 9)]
    assert same(checkpoint['rows'], expected) and checkpoint['scalar'] == 2 and checkpoint['empty'].shape == (0, 4)


THREE_RANKS = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from training import parallel
dist.init_process_group('gloo')
mesh = init_device_mesh('cpu', (3,))
rows = [distribute_tensor(torch.arange(n * 5.0).view(n, 5), mesh, [Shard(0)]) for n in (1, 2, 3, 5, 9)]
parallel.save_sharded(sys.argv[1], dict(rows=rows, scalar=torch.tensor(2.0), empty=torch.zeros(0, 4)))
dist.destroy_process_group()
"""


# --- bit rot ---

def test_a_flipped_bit_in_a_sharded_folder_is_refused(shards):
    """Every file of the folder, .metadata too, has a checksum that was written with it."""
    listed = json.loads((shards / 'checksums.json').read_text())
    assert listed.keys() == set(os.listdir(shards)) - {'checksums.json'} and len(listed) == 4
    rng, before = random.Random(0), snapshot(shards)
    for name in listed:
        for _ in range(5):
            place, bit = rng.randrange(os.path.getsize(shards / name)), rng.randrange(8)
            flip(shards / name, place, bit)
            refused(str(shards), f'the checksum of {name} does not fit')
            flip(shards / name, place, bit)
    assert snapshot(shards) == before
    load_checkpoint(shards)


def test_checksums_that_name_other_files_are_refused(shards):
    """Checksums are a stranger's words as well."""
    listed = json.loads((shards / 'checksums.json').read_text())
    for changed in ({**listed, '../ckpt.sharded/rest.pt': listed['rest.pt']}, {**listed, 'absent': 0}, {}, [], 3):
        (shards / 'checksums.json').write_text(json.dumps(changed))
        refused(str(shards))
    (shards / 'checksums.json').write_text('[' * 100_000)
    refused(str(shards))


def test_a_flipped_bit_in_an_old_sharded_folder_is_refused(old_shards):
    """Without checksums of the files, the pieces have those of their zips."""
    with open(old_shards / '.metadata', 'rb') as f:
        places = pickle.load(f).storage_data.values()
    largest = max(places, key=lambda info: info.length)
    path = old_shards / largest.relative_path
    flip(path, largest.offset + largest.length // 2, 5)
    refused(str(old_shards), 'CRC')
