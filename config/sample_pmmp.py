# python train.py config/sample_pmmp.py
# COST on 2 cores of an AMD EPYC (Zen 5), measured alone. Needs: python prepare_sample.py
# Probabilistic minimax pruning, then TAMADE, then fine-tuning: what `make demo` trains.
out_dir = 'out/sample_pmmp'
dataset = 'sample'              # 0.38 MB of Python's documentation
model = 'transformer200k'
block_size = 256
positions = 'rotary'            # 2.07 bits per byte where the seed's sinusoids reach 3.1 in the same steps
procedure = 'pmmp'
alpha = 1e-4                    # weights with θ² < alpha/u are drawn to zero while u grows
procedure_learning_rate = 1e-3  # γ needs about 1/rate steps from 1 to 0, and the main phase has 470
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
