"""QoQ: weights of four bits, activations of eight (QServe, arXiv:2405.04532), through transformers' own loader."""
