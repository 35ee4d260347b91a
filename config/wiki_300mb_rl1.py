# torchrun --nproc_per_node=8 train.py config/wiki_300mb_rl1.py
# about 4.6 h on one H100-class GPU (estimated: 1.0e18 FLOPs at 60 TFLOP/s; not run). Needs: python prepare_wiki40b.py
# Wiki-40B/en, leading 299,991,040 bytes, with the settings of arXiv 2505.17469 v1: alpha·|θ|.
out_dir = 'out/wiki_300mb_rl1'
dataset = 'wiki40b_en'
train_only_on_leading_tokens = 299_991_040
model = 'transformer4.1m'
procedure = 'rl1'
alpha = 2.22e-06                # 30·32·ln2/N: 30 times pmmp's hint, as the published optimum on 6.16 GB is;
                                # a starting point for a sweep over two decades either way, not a published value
epochs_prelude = 20.0
epochs = 30.0
epochs_fine_tuning = 10.0
do_pruning = True
first_pruning_after = 20
prune_every = 1
tolerated_relative_loss_increase = 0.01
batch_size = 8
learning_rate = 1e-5            # constant, as published: very slow; wiki_16mb_pmmp_fast.py holds a quicker recipe
checkpoint_time = 83_000.0      # seconds between checkpoints; Ctrl-C and SIGTERM save at any time
max_runtime = 86_000.0          # for a queue with a limit of 24 hours
