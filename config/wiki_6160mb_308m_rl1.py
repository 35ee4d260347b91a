# torchrun --nproc_per_node=8 train.py config/wiki_6160mb_308m_rl1.py
# about 13 h on one H100-class GPU (estimated: 1.4e19 FLOPs at 300 TFLOP/s; not run). Needs: python prepare_wiki40b.py
# Wiki-40B/en, leading 6,160,000,000 bytes, 308 M parameters, with the settings of arXiv 2505.17469 v2.
out_dir = 'out/wiki_6160mb_308m_rl1'
dataset = 'wiki40b_en'
train_only_on_leading_tokens = 6_160_000_000
model = 'transformer308m'
procedure = 'rl1'
alpha = 1e-07                   # the published optimum at this size
epochs_prelude = 0.0
epochs = 1.0
epochs_fine_tuning = 0.15
do_pruning = True
first_pruning_after = 0         # one pruning, at the end of the main phase
tolerated_relative_loss_increase = 0.02
batch_size = 128
micro_batch_size = 16
learning_rate = 3e-4
schedule = 'cosine'             # one cosine over the whole run, to 10 %
warmup_iters = 2000
beta2 = 0.95
grad_clip = 1.0
log_interval = 50
checkpoint_time = 83_000.0      # seconds between checkpoints; Ctrl-C and SIGTERM save at any time
max_runtime = 86_000.0          # for a queue with a limit of 24 hours
