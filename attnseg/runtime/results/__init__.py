"""Result files: report, picture, output folder."""
