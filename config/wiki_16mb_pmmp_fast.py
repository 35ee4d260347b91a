# torchrun --nproc_per_node=8 train.py config/wiki_16mb_pmmp_fast.py
# about 12 minutes on one H100-class GPU (estimated: 4e16 FLOPs at 60 TFLOP/s; not run).
# Needs: python prepare_wiki40b.py
# wiki_16mb_pmmp.py's data and model from a tenth of its training bytes (45 epochs instead of 450), and why.
out_dir = 'out/wiki_16mb_pmmp_fast'
dataset = 'wiki40b_en'
train_only_on_leading_tokens = 16_384_000
model = 'transformer4.1m'
block_size = 1024               # half of the seed's: twice the rows a step, and attention costs half
procedure = 'pmmp'
alpha = 1.35e-6                 # 32·ln2/N, as in wiki_16mb_pmmp.py; sweep it
epochs_prelude = 0.0            # PMMP starts with u = 0, so its first epochs are a prelude already
epochs = 35.0
epochs_fine_tuning = 10.0
do_pruning = True
first_pruning_after = 0         # once: a mask that grows while the rate is high is grown too early
tolerated_relative_loss_increase = 0.01
batch_size = 32
learning_rate = 1e-3            # the seed's 1e-5 needs a hundred times the steps
schedule = 'cosine'
warmup_iters = 500
beta2 = 0.95                    # short runs want a short memory of the squared gradient
weight_decay = 0.0              # PMMP is the regulariser
grad_clip = 1.0
log_interval = 100
