# python prepare_text.py config/data/fineweb.py
# about 3 h (estimated: 60 GB of text at 5 MB/s; not run); 30 GB of ids.
# Needs: python train_tokenizer.py config/data/tokenizer_fineweb8k.py
# FineWeb-Edu's sample of 10 billion GPT-2 tokens, in an own BPE of 8,000. --rows=512: each document has own rows.
name = 'fineweb8k'
source = 'HuggingFaceFW/fineweb-edu'    # or local files: parquet, jsonl, text
hub_config = 'sample-10BT'
tokenizer = 'fineweb8k'
val_fraction = 0.0005
test_fraction = 0.0005
