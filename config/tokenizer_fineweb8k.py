# python train_tokenizer.py config/tokenizer_fineweb8k.py
# about 10 minutes on one CPU core beside the download (estimated: 1 GB at 2 MB/s; not run). Offline: --source
# A byte-level BPE of 8,000 ids from the leading 1 GB of FineWeb-Edu's 10-billion-token sample, as published.
name = 'fineweb8k'
source = 'HuggingFaceFW/fineweb-edu'    # or local files: jsonl, parquet or text
hub_config = 'sample-10BT'
vocab_size = 8000
max_bytes = 1_000_000_000
