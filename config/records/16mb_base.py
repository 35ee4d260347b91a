# python train.py config/records/16mb_base.py
# about 16 minutes on one H200-class GPU (estimated: 1.9e16 FLOPs at 20 TFLOP/s; not run)
# Needs: python prepare_text.py --name=wiki16mb --source=FILE --val_source=OTHER --test_source=THIRD
# The dense model that the record of 16,384,000 bytes starts from. 2mb_base.py is its small twin, whose outcome on a CPU
# is in LOG.
out_dir = 'out/record_16mb_base'
dataset = 'wiki16mb'
model = 'transformer4.1m'
n_layer = 6
n_embd = 160                    # 1,884,000 weights: at 3 bits 0.7 MB of a 3.85 MB archive
n_head = 5
block_size = 1024
positions = 'rotary'
norm = 'rmsnorm'                # its gains are folded into the matrices after them, so they cost nothing
bias = False
tied = True                     # one table of 256 bytes in the archive, not two
qk_norm = True
activation = 'relu2'
epochs = 50.0
batch_size = 16
learning_rate = 2e-3
matrix_optimizer = 'muon'
schedule = 'cosine'             # to where the arms begin
warmup_iters = 500
min_learning_rate_ratio = 0.4
beta2 = 0.95
grad_clip = 1.0
final_train_blocks = -1         # the archive is what counts
