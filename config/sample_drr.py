# python train.py config/sample_drr.py
# about 3 minutes on 2 CPU cores (see README). Needs: python prepare_sample.py
# alpha·(1 - exp(-beta|θ|)), then TAMADE, then fine-tuning.
out_dir = 'out/sample_drr'
dataset = 'sample'              # 0.38 MB of Python's documentation
model = 'transformer200k'
n_embd = 72                     # 289,584 weights
block_size = 256
positions = 'rotary'            # learns this text far faster than the published sinusoids (LOG)
procedure = 'drr'
alpha = 1e-5                    # its steepest pull is alpha·beta, at zero
beta = 5.0
epochs_prelude = 5.0            # of 14 in all, as many steps as sample_vanilla.py takes
epochs = 3.5
epochs_fine_tuning = 5.5
do_pruning = True
first_pruning_after = 0         # once, at the end of the main phase
tolerated_relative_loss_increase = 0.01
batch_size = 8
learning_rate = 3e-3
schedule = 'cosine'             # one over the whole run
warmup_iters = 40
log_interval = 50
