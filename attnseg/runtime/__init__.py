"""The runtime: from scans to labels with numpy and one inference engine, without PyTorch."""
