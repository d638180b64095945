"""Documents of a bundle: model card and software bill of materials."""
