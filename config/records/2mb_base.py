# python train.py config/records/2mb_base.py
# about 12 CPU-minutes on one core (measured: 725 s of processor time)
# Needs: python prepare_text.py --name=wiki2mb --source=FILE --max_bytes=2000000 --val_source=OTHER --test_source=THIRD
# What the arms of the duel for the smallest archive of 2,000,000 bytes start from: the same dense model for all.
out_dir = 'out/record_2mb_base'
dataset = 'wiki2mb'
model = 'transformer200k'
n_embd = 96                     # 468,000 weights
block_size = 256
positions = 'rotary'
norm = 'rmsnorm'                # its gains are folded into the matrices after them, so they cost nothing
bias = False
tied = True                     # one table of 256 bytes in the archive, not two
qk_norm = True
activation = 'relu2'
epochs = 6.0
batch_size = 4                  # 1,024 bytes a step: many small steps beat few large ones (LOG)
learning_rate = 4e-3
matrix_optimizer = 'muon'
schedule = 'cosine'             # to where the arms begin
warmup_iters = 200
min_learning_rate_ratio = 0.4
beta2 = 0.95
grad_clip = 1.0
final_train_blocks = -1         # the archive is what counts
