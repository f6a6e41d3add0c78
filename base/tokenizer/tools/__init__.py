"""graft tokenizer: the commands, the coloured view of tokens, and the comparison of ways to cut text."""
