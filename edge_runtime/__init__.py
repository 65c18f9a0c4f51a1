"""The runtime: packages, tokenizer, engine, memory, tiers, server and command line."""
