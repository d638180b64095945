"""Import of models of other frameworks, unchanged: nnU-Net, MONAI and TorchScript."""
