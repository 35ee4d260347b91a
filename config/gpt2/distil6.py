# torchrun --nproc_per_node=8 distill.py config/gpt2/distil6.py
# about 6 hours on 8 H100-class GPUs (estimated: 3.0e19 FLOPs at 8 x 170 TFLOP/s; not run).
# Needs: python prepare_text.py config/data/openwebtext.py
# Needs: python prune.py --from_ckpt=gpt2 --strategy=alt --out_dir=out/gpt2-alt6
# GPT-2 small teaches six of its own layers; weights and optimiser are DistilBERT's (DistilGPT2's were never published).
#
# The control, a student of the same shape, tokens, batch and optimiser that starts at random and asks no teacher:
#     torchrun --nproc_per_node=8 distill.py config/gpt2/distil6.py --init_from=scratch --a_ce=0 --a_clm=1 --a_cos=0 \
#         --no-freeze_positions --out_dir=out/gpt2_scratch_control6
# about 4 hours on the same GPUs (estimated: 2.0e19 FLOPs; not run). For the same wall-clock, raise epochs by the ratio
# of the runs' tokens per second. Without --init_from and --no-freeze_positions only the loss is taken away.
out_dir = 'out/gpt2_distil6'
teacher = 'gpt2'
init_from = 'out/gpt2-alt6'
dataset = 'openwebtext'
model = 'gpt2'
n_layer = 6
positions = 'learned'           # these three make it a GPT-2
activation = 'gelu_tanh'
tied = True
a_ce = 5.0                      # of the teacher's distribution
a_clm = 2.0                     # of the next token
a_cos = 1.0                     # of the direction of the last states
temperature = 2.0
freeze_positions = True
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
