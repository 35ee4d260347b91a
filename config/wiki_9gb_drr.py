# torchrun --nproc_per_node=4 train.py config/wiki_9gb_drr.py
# about 2.5 h on one H100-class GPU (estimated: 5.4e17 FLOPs at 60 TFLOP/s; not run). Needs: python prepare_wiki40b.py
# Wiki-40B/en, leading 9,307,817,984 bytes, with the settings of arXiv 2505.17469 v1: alpha·(1 - exp(-beta|θ|)).
out_dir = 'out/wiki_9gb_drr'
dataset = 'wiki40b_en'
train_only_on_leading_tokens = 9_307_817_984
model = 'transformer4.1m'
procedure = 'drr'
alpha = 2.38e-09                # 32·ln2/N: the penalty is then the size of 32-bit weights;
                                # a starting point for a sweep over two decades either way, not a published value
beta = 5.0
epochs_prelude = 0.0
epochs = 1.0
epochs_fine_tuning = 1.0
stop_epoch_at_batch_fine_tuning = 50_000
do_pruning = True
first_pruning_after = 1
prune_every = 1
tolerated_relative_loss_increase = 0.01
batch_size = 4
learning_rate = 1e-5            # constant, as published: very slow; wiki_16mb_pmmp_fast.py holds a quicker recipe
checkpoint_time = 83_000.0      # seconds between checkpoints; Ctrl-C and SIGTERM save at any time
max_runtime = 86_000.0          # for a queue with a limit of 24 hours
