# torchrun --nproc_per_node=8 distill.py config/gpt2_scratch_control6.py
# about 4 hours on 8 H100-class GPUs (estimated: 2.0e19 FLOPs at 8 x 170 TFLOP/s; not run).
# Needs: data_openwebtext.py
# gpt2_distil6.py without a teacher: same shape, tokens, batch and optimiser, but random start and next-token loss alone
# (the teacher is named, not asked). For the same wall-clock, raise epochs by the ratio of the runs' tokens per second.
# --init_from=out/gpt2-alt6 --freeze_positions keeps the start and takes away the loss alone.
out_dir = 'out/gpt2_scratch_control6'
teacher = 'gpt2'
init_from = 'scratch'
dataset = 'openwebtext'
model = 'gpt2'
n_layer = 6
positions = 'learned'           # these three make it a GPT-2
activation = 'gelu_tanh'
tied = True
a_ce = 0.0
a_clm = 1.0
a_cos = 0.0
temperature = 2.0
freeze_positions = False
chunk_tokens = 512
dropout = 0.1
epochs = 4.0
batch_size = 4096               # sequences of 1,024 tokens
micro_batch_size = 16
learning_rate = 2.5e-4
schedule = 'linear'
warmup_iters = 431              # 5 % of about 8,620 steps
min_learning_rate_ratio = 0.0
adam_epsilon = 1e-6
grad_clip = 5.0
eval_interval = 200
eval_blocks = 512
checkpoint_time = 3600.0
