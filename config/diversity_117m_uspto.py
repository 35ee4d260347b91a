# torchrun --nproc_per_node=4 train.py config/diversity_117m_uspto.py
# COST about 3.1 h on one H100-class GPU (estimated: 1.1e18 FLOPs at 100 TFLOP/s; not run).
# Needs: python prepare_pile.py --subsets=pubmed,uspto
# Lee et al. 2023 (arXiv 2306.13840): only the training set differs.
# Here: USPTO backgrounds.
out_dir = 'out/diversity_117m_uspto'
data_mix = 'uspto:1'            # a mixture of one: whole blocks, so that equal steps are equal tokens
n_layer = 12
n_head = 12
n_embd = 768                    # 124.4 M (GPT-2 small, "117M") parameters
block_size = 1024
positions = 'learned'
activation = 'gelu_tanh'
tied = True
dropout = 0.1
max_iters = 20_000              # 1.31 B tokens
batch_size = 64
micro_batch_size = 8
learning_rate = 5e-5
schedule = 'linear'
min_learning_rate_ratio = 0.0
eval_interval = 1000
eval_blocks = 1000              # half of each source in a mixture
final_train_blocks = 1000
checkpoint_time = 1800.0
