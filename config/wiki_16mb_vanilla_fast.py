# torchrun --nproc_per_node=8 train.py config/wiki_16mb_vanilla_fast.py
# about 12 minutes on one H100-class GPU (estimated: 2.9e16 FLOPs at 40 TFLOP/s; not run).
# Needs: python prepare_wiki40b.py
# wiki_16mb_vanilla.py's data and width from a tenth of its training bytes (45 epochs instead of 450). What each line is
# worth was measured on 0.1 and 1 MB with two small models (LOG), not on this run.
out_dir = 'out/wiki_16mb_vanilla_fast'
dataset = 'wiki40b_en'
train_only_on_leading_tokens = 16_384_000
model = 'transformer4.1m'
block_size = 1024               # half of the seed's: twice the rows a step, and attention costs half
positions = 'rotary'            # the largest single gain
norm = 'rmsnorm'
bias = False
qk_norm = True
activation = 'relu2'
tied = True                     # 4.0 M weights
epochs = 45.0
batch_size = 32
matrix_optimizer = 'muon'       # its step has the size of AdamW's, so it shares the learning rate
learning_rate = 2e-3            # the seed's 1e-5 needs a hundred times the steps
schedule = 'cosine'
warmup_iters = 500
beta2 = 0.95                    # short runs want a short memory of the squared gradient
grad_clip = 1.0
log_interval = 100
checkpoint_time = 83_000.0      # seconds between checkpoints; Ctrl-C and SIGTERM save at any time
max_runtime = 86_000.0          # for a queue with a limit of 24 hours
