"""Text as ids: files of tokens, rows, mixtures, objectives, and the tokenizers and documents behind them."""
