"""The parity gate: every precision is compared with the model before a bundle is written."""
