"""Import of MONAI bundles: configuration, transforms, inferer and network."""
