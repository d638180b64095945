"""The trainer: from labelled cases to a checkpoint. Needs PyTorch (the extra `train`)."""
