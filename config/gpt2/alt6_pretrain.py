# torchrun --nproc_per_node=8 train.py config/gpt2/alt6_pretrain.py
# about 2.5 hours on 8 H100-class GPUs (estimated: 1.5e19 FLOPs at 8 x 200 TFLOP/s; not run).
# Needs: python prepare_text.py config/data/openwebtext.py
# Needs: python prune.py --from_ckpt=gpt2 --strategy=alt --out_dir=out/gpt2-alt6
# Six of GPT-2's twelve layers, pretrained further on OpenWebText (Li et al. 2021, arXiv 2110.08460): 81.9 M parameters.
out_dir = 'out/gpt2_alt6_pretrain'
init_from = 'out/gpt2-alt6'
dataset = 'openwebtext'
model = 'gpt2'
n_layer = 6
positions = 'learned'           # these three make it a GPT-2
activation = 'gelu_tanh'
tied = True
dropout = 0.1
epochs = 3.0                    # published: 3 to 4
batch_size = 512                # sequences of 1,024 tokens
micro_batch_size = 16
learning_rate = 5e-5
schedule = 'linear'
min_learning_rate_ratio = 0.0
eval_interval = 1000
eval_blocks = 512
final_train_blocks = -1         # 9 billion tokens need not be scored again
checkpoint_time = 3600.0
