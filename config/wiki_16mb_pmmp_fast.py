# torchrun --nproc_per_node=8 train.py config/wiki_16mb_pmmp_fast.py
# about 12 minutes on one H100-class GPU (estimated: 2.9e16 FLOPs at 40 TFLOP/s; not run).
# Needs: python prepare_wiki40b.py
# wiki_16mb_pmmp.py's data and width from a tenth of its training bytes (45 epochs instead of 450). What each line is
# worth was measured on 0.1 and 1 MB with two small models (LOG), not on this run.
#
# The unpruned twin, with Muon, whose step has the size of AdamW's and shares the learning rate:
#     torchrun --nproc_per_node=8 train.py config/wiki_16mb_pmmp_fast.py --procedure=vanilla --no-do_pruning \
#         --epochs_prelude=0 --epochs=45 --epochs_fine_tuning=0 --matrix_optimizer=muon \
#         --out_dir=out/wiki_16mb_vanilla_fast
out_dir = 'out/wiki_16mb_pmmp_fast'
dataset = 'wiki40b_en'
train_only_on_leading_tokens = 16_384_000
model = 'transformer4.1m'
block_size = 1024               # half of the published: twice the rows a step, and attention costs half
positions = 'rotary'            # the largest single gain
norm = 'rmsnorm'
bias = False
qk_norm = True
activation = 'relu2'
tied = True                     # 4.0 M weights
procedure = 'pmmp'
alpha = 9e-5                    # a starting point for a sweep: what AdamW's weights wanted on the sample (LOG)
procedure_learning_rate = 4e-4  # γ needs about 1/rate steps from 1 to 0, and the main phase has 5,000
epochs_prelude = 20.0
epochs = 10.0
epochs_fine_tuning = 15.0
do_pruning = True
first_pruning_after = 0         # once: a mask that grows while the rate is high is grown too early
tolerated_relative_loss_increase = 0.01
batch_size = 32
matrix_optimizer = 'adamw'
learning_rate = 2e-3            # the published 1e-5 needs a hundred times the steps
schedule = 'cosine'
warmup_iters = 500
beta2 = 0.95                    # short runs want a short memory of the squared gradient
grad_clip = 1.0
log_interval = 100
checkpoint_time = 83_000.0      # seconds between checkpoints; Ctrl-C and SIGTERM save at any time
max_runtime = 86_000.0          # for a queue with a limit of 24 hours
