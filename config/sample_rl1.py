# python train.py config/sample_rl1.py
# COST on 2 cores of an AMD EPYC (Zen 5), measured alone. Needs: python prepare_sample.py
# alpha·|θ|, then TAMADE, then fine-tuning: the smallest complete run of this procedure.
out_dir = 'out/sample_rl1'
dataset = 'sample'              # 0.38 MB of Python's documentation
model = 'transformer200k'
block_size = 256
positions = 'rotary'            # 2.07 bits per byte where the seed's sinusoids reach 3.1 in the same steps
procedure = 'rl1'
alpha = 5e-5
epochs_prelude = 4.0            # of 9 in all, as many steps as sample_vanilla.py takes
epochs = 2.5
epochs_fine_tuning = 2.5
do_pruning = True
first_pruning_after = 0         # once, at the end of the main phase
tolerated_relative_loss_increase = 0.02
batch_size = 8
learning_rate = 3e-3
schedule = 'cosine'             # one over the whole run
warmup_iters = 40
log_interval = 50
