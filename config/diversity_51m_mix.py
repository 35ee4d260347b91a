# torchrun --nproc_per_node=4 train.py config/diversity_51m_mix.py
# COST about 1.3 h on one H100-class GPU (estimated: 4.7e17 FLOPs at 100 TFLOP/s; not run).
# Needs: python prepare_pile.py --subsets=pubmed,uspto
# Lee et al. 2023 (arXiv 2306.13840): only the training set differs.
# Here: PubMed abstracts and USPTO backgrounds, half of the rows each.
out_dir = 'out/diversity_51m_mix'
data_mix = 'pubmed:0.5,uspto:0.5'  # shares of the rows
n_layer = 8
n_head = 8
n_embd = 512                    # 51.48 M parameters
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
