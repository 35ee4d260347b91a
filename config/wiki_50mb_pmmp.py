# torchrun --nproc_per_node=8 train.py config/wiki_50mb_pmmp.py
# about 4.2 h on one H100-class GPU (estimated: 9.0e17 FLOPs at 60 TFLOP/s; not run). Needs: python prepare_wiki40b.py
# Wiki-40B/en, leading 50,003,968 bytes, with the settings of arXiv 2505.17469 v1: probabilistic minimax pruning.
out_dir = 'out/wiki_50mb_pmmp'
dataset = 'wiki40b_en'
train_only_on_leading_tokens = 50_003_968
model = 'transformer4.1m'
procedure = 'pmmp'
alpha = 4.44e-07                # 32·ln2/N: the penalty is then the size of 32-bit weights;
                                # a starting point for a sweep over two decades either way, not a published value
epochs_prelude = 100.0
epochs = 150.0
epochs_fine_tuning = 75.0
do_pruning = True
first_pruning_after = 100
prune_every = 10
tolerated_relative_loss_increase = 0.01
batch_size = 8
learning_rate = 1e-5            # constant, as published: very slow; wiki_16mb_pmmp_fast.py holds a quicker recipe
checkpoint_time = 83_000.0      # seconds between checkpoints; Ctrl-C and SIGTERM save at any time
max_runtime = 86_000.0          # for a queue with a limit of 24 hours
