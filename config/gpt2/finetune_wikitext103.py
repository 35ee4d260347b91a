# torchrun --nproc_per_node=8 train.py config/gpt2/finetune_wikitext103.py
# about 10 minutes on 8 H100-class GPUs (estimated: 3.9e17 FLOPs at 8 x 100 TFLOP/s; not run).
# Needs: python prepare_text.py config/data/wikitext103.py
# and a six-layer checkpoint: --init_from=out/gpt2_distil6, out/gpt2_scratch_control6, out/gpt2_alt6_pretrain or
# distilgpt2; for GPT-2 small itself --init_from=gpt2 --n_layer=12.
# Published test perplexity per token: GPT-2 small 16.3, DistilGPT2 21.1.
out_dir = 'out/gpt2_finetune_wikitext103'
init_from = 'out/gpt2_distil6'
dataset = 'wikitext103'
model = 'gpt2'
n_layer = 6
positions = 'learned'           # these three make it a GPT-2
activation = 'gelu_tanh'
tied = True
dropout = 0.1
epochs = 6.0
batch_size = 256
micro_batch_size = 16
learning_rate = 5e-5
schedule = 'linear'
min_learning_rate_ratio = 0.0
eval_interval = 450             # an epoch
final_train_blocks = -1
checkpoint_time = 3600.0
