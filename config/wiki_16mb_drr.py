# torchrun --nproc_per_node=8 train.py config/wiki_16mb_drr.py
# about 2 h on one H100-class GPU (estimated: 4.1e17 FLOPs at 60 TFLOP/s; not run). Needs: python prepare_wiki40b.py
# Wiki-40B/en, leading 16,384,000 bytes, with the settings of arXiv 2505.17469 v1: alpha·(1 - exp(-beta|θ|)).
out_dir = 'out/wiki_16mb_drr'
dataset = 'wiki40b_en'
train_only_on_leading_tokens = 16_384_000
model = 'transformer4.1m'
procedure = 'drr'
alpha = 1.35e-06                # 32·ln2/N: the penalty is then the size of 32-bit weights;
                                # a starting point for a sweep over two decades either way, not a published value
beta = 5.0
epochs_prelude = 150.0
epochs = 200.0
epochs_fine_tuning = 100.0
do_pruning = True
first_pruning_after = 150
prune_every = 25
tolerated_relative_loss_increase = 0.01
batch_size = 8
learning_rate = 1e-5            # constant, as published: very slow; wiki_16mb_pmmp_fast.py holds a quicker recipe
checkpoint_time = 83_000.0      # seconds between checkpoints; Ctrl-C and SIGTERM save at any time
max_runtime = 86_000.0          # for a queue with a limit of 24 hours
