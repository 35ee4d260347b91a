# torchrun --nproc_per_node=8 train.py config/wiki_1230mb_308m_pmmp.py
# about 11 h on one H100-class GPU (estimated: 1.2e19 FLOPs at 300 TFLOP/s; not run). Needs: python prepare_wiki40b.py
# Wiki-40B/en, leading 1,230,000,128 bytes, 308 M parameters, with the settings of arXiv 2505.17469 v2.
out_dir = 'out/wiki_1230mb_308m_pmmp'
dataset = 'wiki40b_en'
train_only_on_leading_tokens = 1_230_000_128
model = 'transformer308m'
procedure = 'pmmp'
alpha = 1.8e-08                 # 32·ln2/N, a starting point for a sweep, not a published value
epochs_prelude = 0.0
epochs = 4.0
epochs_fine_tuning = 1.0
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
